"""The command: what it writes and prints is what the library makes, and its errors are one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from commands import Command, command_of, status_of
from documents import hold, profile, schedule

from diffcache import cli, planning, registry, tokens
from diffcache.cli import _printing, _samples, show
from diffcache.documents import Budget, CacheSchedule, DenoiserPlan, Profile, ScheduleSet, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import GROUPS, rules

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return profile(steps=12, start=0).save(tmp_path / "profile.safetensors")


def refused(command: Command, *words: object) -> str:
    """The one line of the error, without its head."""
    code, out, complaint = command(*words)
    assert (code, out) == (status_of(complaint), "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    return complaint.removeprefix("error: ").strip()


def test_every_file_of_the_folder_is_a_subcommand_with_a_line_of_help(command: Command) -> None:
    files = {path.stem for path in (ROOT / "diffcache" / "cli").glob("[a-z]*.py")}
    named = {found.name for found in (*cli.app.registered_commands, *cli.app.registered_groups)}
    assert named == files >= {"demo", "optimize", "plan", "show", "eval"}
    code, out, _ = command("--help")
    assert code == 0
    for name in files:
        assert re.search(rf"{name} +[A-Z]", out)


COMMANDS = (
    "demo",
    "optimize",
    "plan",
    "presets",
    "profile",
    "show",
    "eval run",
    "eval policy",
    "eval fid",
    "eval clip",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_is_one_line_that_names_the_page(command: Command, name: str) -> None:
    code, out, complaint = command(*name.split(), "--hlep")
    assert (code, out) == (2, "")
    assert complaint.count("\n") == 1
    assert complaint.startswith("error: No such option: --hlep")
    assert complaint.endswith(f"{name} --help lists what is allowed.\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plann"], "No such command 'plann'. Did you mean 'plan'?"),
        (["eval", "fidd"], "No such command 'fidd'. Did you mean 'fid'?"),
        (["show"], "Missing argument 'file'."),
        (["plan", "x", "--computed", "ten"], "Invalid value for '--computed': "),
        (["demo", "--model", "sdxl"], "Invalid value for '--model': "),
    ],
)
def test_wrong_words_are_one_line(command: Command, words: list[str], said: str) -> None:
    code, out, complaint = command(*words)
    assert (code, out) == (2, "")
    assert complaint.startswith(f"error: {said}")
    assert complaint.count("\n") == 1


def test_no_words_print_the_help_page(command: Command) -> None:
    for words in ([], ["eval"]):
        code, out, complaint = command(*words)
        assert code == 2
        assert "Usage:" in out + complaint
        assert "error:" not in out + complaint


def test_ctrl_c_is_one_word_and_an_exit_status(
    command: Command, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "plan", stop)
    assert command("plan", measured, "--computed", 5) == (130, "", "stopped\n")


def test_a_file_of_another_kind_is_an_error_with_the_next_step(command: Command, tmp_path: Path) -> None:
    path = schedule().save(tmp_path / "s.safetensors")
    assert "The file is a schedule and needs no planning. Pass it to diffcache.accelerate" in refused(
        command, "plan", path, "--computed", 5
    )


BARE = """
import sys
sys.argv = ["diffcache", *sys.argv[1:]]
from diffcache.cli import main
try:
    main()
finally:
    print(sorted({"torch", "diffusers", "matplotlib", "transformers"} & sys.modules.keys()))
"""


def test_help_planning_and_showing_bring_in_nothing_heavy(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "schedule.safetensors"
    plans = (["plan", measured, "--computed", "5", "--out", out], ["plan", measured, "--computed", "5", "--compare"])
    pages = (["--help"], ["--version"], ["optimize", "--help"], ["eval", "run", "--help"])
    for words in (*plans, ["show", out], ["plan", "--list"], *pages):
        run = subprocess.run(
            [sys.executable, "-c", BARE, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == "[]"


# plan


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["--computed", 5], Budget(computed_steps=5)),
        (["--steps", 5], Budget(computed_steps=5)),
        (["--speedup", 1.6], Budget(speedup=1.6)),
        (["--min-psnr-db", 20], Budget(max_error_db=20)),
        (["--max-error-db", 20], Budget(max_error_db=20)),
        (["--computed", 5, "--memory", "9kB"], Budget(computed_steps=5, memory_bytes=9000)),
        (["--computed", 5, "--memory", "9 KiB"], Budget(computed_steps=5, memory_bytes=9216)),
        (["--computed", 5, "--memory-bytes", 9000], Budget(computed_steps=5, memory_bytes=9000)),
    ],
)
def test_plan_writes_and_prints_what_the_library_plans(
    command: Command, measured: Path, tmp_path: Path, words: list[object], budget: Budget
) -> None:
    out = tmp_path / "planned.safetensors"
    wanted = planning.plan(Profile.load(measured), "closed_loop:anchors=3", budget)
    code, said, complaint = command("plan", measured, "--scheduler", "closed_loop:anchors=3", *words, "--out", out)
    assert (code, complaint) == (0, "")
    assert CacheSchedule.load(out) == wanted
    assert said.startswith(f"{wanted.describe()}\nwritten to {out}\n\nUse it with the same steps, size and guidance:\n")
    assert said.endswith(f"  pipe = diffcache.accelerate(pipe, '{out}')\nLook at it:\n  diffcache show {out}\n")


def test_plan_without_a_scheduler_takes_this_projects_own(command: Command, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "planned.safetensors"
    command("plan", measured, "--steps", 4, "--out", out)
    assert CacheSchedule.load(out).provenance["scheduler"] == "closed_loop"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "budget cannot be used: no goal was given. Pass exactly one of --computed, --speedup, --min-psnr-db."),
        (["--memory-bytes", 9], "no goal was given."),
        (
            ["--computed", 4, "--speedup", 2],
            "budget cannot be used: --computed and --speedup were given. Pass exactly one of",
        ),
        (
            ["--steps", 4, "--speedup", 2],
            "budget cannot be used: --computed and --speedup were given. Pass exactly one of",
        ),
        (["--computed", 4, "--steps", 5], "computed='4.0 and --steps 5.0' was given. Allowed: --computed alone"),
        (["--min-psnr-db", 4, "--max-error-db", 4], "--max-error-db is its old name"),
        (["--computed", 4, "--memory", "9 apples"], "memory='9 apples' was given. Allowed: a size such as 500MB"),
        (["--computed", 4, "--memory", "-9MB"], "memory_bytes=-9000000 was given."),
        (["--computed", 0], "computed_steps=0 was given. Allowed: 1 or more."),
        (["--computed", 13], "computed_steps=13 was given. Allowed: 1 to 12, the steps of the profile."),
        (["--speedup", 0.5], "speedup=0.5 was given."),
        (["--computed", 4, "--memory-bytes", 9], "memory_bytes=9 was given. Allowed: 4096 or more, the bytes that"),
        (["--computed", 4, "--scheduler", "unifrom"], "Did you mean 'uniform'?"),
        (["--computed", 4, "--scheduler", "taylorseer:order=9"], "order=9 was given. Allowed: 0 to 4."),
        (["--computed", 4, "--out", "nowhere/file.safetensors"], "a file in a folder that exists"),
    ],
)
def test_plan_refuses_in_one_line_and_writes_nothing(
    command: Command,
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, complaint = command("plan", measured, *words)
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert says in complaint
    assert list(tmp_path.iterdir()) == [measured]


@pytest.mark.parametrize("words", [["--scheduler", "uniform"], ["--store", "int8"], ["--out", "schedule.safetensors"]])
def test_compare_refuses_options_that_it_would_ignore(command: Command, measured: Path, words: list[str]) -> None:
    complaint = refused(command, "plan", measured, "--steps", 4, "--compare", *words)
    assert f"and {words[0]} was given too. Use --compare with a profile, one goal and --memory" in complaint
    code, out, _ = command("plan", measured, "--steps", 4, "--compare", "--memory-bytes", 10**9)
    assert code == 0
    assert "uniform" in out


def test_plan_wants_a_profile(command: Command, measured: Path, tmp_path: Path) -> None:
    assert "Allowed: the file of a profile, or --list." in refused(command, "plan", "--steps", 4)
    assert "no such file" in refused(command, "plan", tmp_path / "missing", "--steps", 4)
    other = schedule().save(tmp_path / "schedule.safetensors")
    assert "'diffcache.profile', which Profile reads" in refused(command, "plan", other, "--steps", 4)
    measured.write_bytes(measured.read_bytes()[:-1])
    assert "damaged" in refused(command, "plan", measured, "--steps", 4)


@pytest.mark.parametrize("columns", [20, 160])
def test_the_list_in_a_pipe_is_tab_separated_at_any_width(
    command: Command, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = command("plan", "--list")
    assert code == 0
    heads, *rows = (line.split("\t") for line in out.splitlines())
    models = sorted({model for one in planning.available() for model in one.demo_db})
    assert {"dit", "flux"} <= set(models)
    assert heads == ["scheduler", "needs", *(f"{model} dB" for model in models), "summary", "group"]
    assert {len(row) for row in rows} == {len(heads)}
    found = {row[0]: row for row in rows if row[1] != "no profile"}
    for scheduler in planning.available():
        row = found.pop(scheduler.name)
        assert row[1] == (scheduler.needs or "any profile")
        assert row[2:-2] == [f"{scheduler.demo_db[m]:.1f}" if m in scheduler.demo_db else "–" for m in models]
        assert row[-2] == scheduler.summary
    assert not found
    without = {row[0]: row for row in rows if row[1] == "no profile" and "language models" not in row[-1]}
    assert list(without) == list(rules())
    of_tokens = [row for row in rows if row[-1].startswith("language models, ")]
    assert [row[0] for row in of_tokens] == list(tokens.token_rules())
    for name, needs, *decibels, summary, _ in of_tokens:
        assert (needs, *decibels) == ("no profile", *("–" for _ in models))
        about = registry.load(tokens.RULES, name).__doc__
        assert about is not None
        assert about.startswith(summary[:20])
        assert " ".join(about.split()).startswith(summary)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output goes to a terminal of 100 columns."""
    monkeypatch.setattr(_printing, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("columns", [70, 100, 160])
def test_the_list_on_a_terminal_is_a_table_with_groups(
    command: Command, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = command("plan", "--list")
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= columns
    filled = {one.group for one in planning.available()}
    assert [line for line in lines if line in GROUPS] == [group for group in GROUPS if group in filled]
    text = " ".join(out.split())
    assert 'language models, without a profile: accelerate(model, "dkv:refresh=8")' in text
    for scheduler in planning.available():
        (row,) = [line for line in lines if line.startswith(f"{scheduler.name} ") and "no profile" not in line]
        decibels = [f"{value:.1f}" for _, value in sorted(scheduler.demo_db.items())]
        assert [word for word in row.split() if re.fullmatch(r"\d+\.\d", word)] == decibels
        assert scheduler.summary in text
    assert "\t" not in out


def test_the_comparison_in_a_pipe_is_tab_separated_and_on_a_terminal_a_table(
    command: Command, measured: Path, request: pytest.FixtureRequest
) -> None:
    words = ("plan", measured, "--computed", 4, "--compare")
    code, out, _ = command(*words)
    assert code == 0
    found = planning.compare(Profile.load(measured), Budget(computed_steps=4))
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["scheduler", "computed steps", "expected dB", "note"]
    assert [row[0] for row in rows[1:]] == [one.name for one in found]
    for one, row in zip(found, rows[1:], strict=True):
        if one.schedule is None:
            assert row[1:] == ["–", "–", f"cannot plan: {one.reason}"]
        else:
            assert row[1] == f"{one.schedule.computed_steps:g}"
            expected = one.schedule.expected
            assert row[2] == ("–" if expected is None else f"{expected.mean_db:.1f}")
            if expected is not None:  # the mean has its own column
                assert row[3].startswith(("worst tenth", "no difference"))
                assert str(expected).endswith(row[3])
    request.getfixturevalue("terminal")
    _, drawn, _ = command(*words)
    assert "\t" not in drawn
    assert max(map(len, drawn.splitlines())) <= 100
    lines = [line.split() for line in drawn.splitlines()]
    assert [line[0] for line in lines if line and line[0] in {one.name for one in found}] == [one.name for one in found]


def test_markdown_is_drawn_on_a_terminal_and_left_alone_elsewhere(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    text = "| method | PSNR |\n|---|---:|\n| uniform\\|2 | 41.0 |\n\nFloors: 3."
    _printing.markdown(text)
    assert capsys.readouterr().out == f"{text}\n"
    request.getfixturevalue("terminal")
    _printing.markdown(text)
    drawn = capsys.readouterr().out
    assert "|---" not in drawn
    assert "uniform|2" in drawn
    assert "Floors: 3." in drawn


def results(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a table of results in a window of this width."""
    heads = ["method", "computed steps", "speed-up (loop)", *(f"metric {n} (dB) ↑" for n in range(6)), "verdict"]
    cells = [f"{n}.25 ({n}.00 to {n}.50)" for n in range(20, 26)]
    rows = [[name, "5 of 12", "2.00×", *cells, "better than x"] for name in ("full run", "uniform reuse, 5 computed")]
    lines = [heads, ["---", *["---:"] * 8, "---"], *rows]
    monkeypatch.setenv("COLUMNS", str(columns))
    _printing.markdown("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\nOnly 4 samples.")
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("columns", [80, 110, 220])
def test_results_fit_into_the_window_and_no_name_or_number_is_cut(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = results(columns, monkeypatch, capsys)
    assert max(map(len, lines)) <= columns
    assert not any("…" in line for line in lines)
    numbers = "5 of 12 +2.00× +" + " +".join(
        rf"{n}\.25 \({n}\.00 to {n}\.50\)" if columns == 220 else rf"{n}\.25" for n in range(20, 26)
    )
    name = "uniform reuse, 5 computed"
    if columns == 80:  # the name is above the numbers
        assert re.fullmatch(f" +{numbers}", lines[lines.index(name) + 1])
    else:
        assert any(re.fullmatch(f"{name} +{numbers}", line) for line in lines)
    assert sum(line.strip() == "verdict: better than x" for line in lines) == 2
    assert any("Without the intervals" in line for line in lines) == (columns != 220)
    assert "Only 4 samples." in lines


@pytest.mark.usefixtures("terminal")
def test_presets_fit_into_the_window(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("presets", "--method", "teacache", "--model", "flux")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "threshold=0.25 (1.5x)" in out


# help


def pages(command: typer.core.TyperCommand | Any, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and every group."""
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from pages(inner, *words, name)


def test_every_help_page_has_an_example_and_flags_without_a_type(command: Command) -> None:
    found = list(pages(typer.main.get_command(cli.app)))
    assert {(), ("optimize",), ("plan",), ("eval",), ("eval", "run"), ("eval", "policy")} <= set(found)
    for words in found:
        code, out, _ = command(*words, "--help")
        assert code == 0
        example = re.search(rf"Example:\s+diffcache {' '.join(words)}\b", out)
        assert example, words
        assert re.search("(?i)bool", out) is None, words


def test_old_spellings_are_not_on_the_help_pages(command: Command) -> None:
    _, out, _ = command("plan", "--help")
    options = set(re.findall(r"--[\w-]+", out))
    assert {"--computed", "--min-psnr-db", "--memory"} <= options
    assert not {"--steps", "--max-error-db", "--memory-bytes"} & options


def test_the_page_of_profile_says_how_many_prompts_and_what_must_stay_equal(command: Command) -> None:
    for name in ("profile", "optimize"):
        text = " ".join(re.sub("[│╭╮╰╯─]", " ", command(name, "--help")[1]).split())
        assert "16 prompts or more" in text
        assert "Steps, size and guidance must equal those of later use." in text


def test_the_version_is_one_line(command: Command) -> None:
    code, out, _ = command("--version")
    assert code == 0
    assert re.fullmatch(r"diffcache \S+ \(torch \S+, diffusers \S+\)\n", out)
    assert f" {metadata.version('diffcache')} " in out


def test_the_shell_completes_commands() -> None:
    environment = os.environ | {"_DIFFCACHE_COMPLETE": "complete_bash", "COMP_WORDS": "diffcache p", "COMP_CWORD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", BARE.replace("finally", "except SystemExit"), "p"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {"plan", "profile"} <= set(run.stdout.split())
    assert "show" not in run.stdout.split()


def test_the_list_describes_one_scheduler(command: Command) -> None:
    for scheduler in planning.available():
        code, out, _ = command("plan", "--list", "--scheduler", scheduler.name)
        assert code == 0
        assert f"source: {scheduler.source}" in out
        for name, default in scheduler.options.items():
            assert re.search(rf"options: .*\b{name}={re.escape(str(default))}", out)
    assert "no scheduler called 'slowcache'" in refused(command, "plan", "--list", "--scheduler", "slowcache")


# show


def test_show_prints_either_document_as_it_describes_itself(command: Command, tmp_path: Path) -> None:
    for document in (schedule(), profile()):
        assert command("show", document.save(tmp_path / "file.safetensors")) == (0, f"{document.describe()}\n", "")


def test_show_prints_all_schedules_of_a_set_or_the_one_that_is_asked_for(command: Command, tmp_path: Path) -> None:
    four, six = (
        CacheSchedule(steps=len(mask), denoisers={"unet": DenoiserPlan(sites={"model": hold(mask)})})
        for mask in ("■·■·", "■··■··")
    )
    both = ScheduleSet.of(four, six)
    path = both.save(tmp_path / "flux.json")
    assert command("show", path) == (0, both.describe() + "\n", "")
    assert command("show", path, "--steps", 6) == (0, six.describe() + "\n", "")
    _, out, _ = command("show", path, "--coefficients")
    assert out.startswith(both.describe())
    assert out.index("4 steps, unet model\n") < out.index("6 steps, unet model\n")
    assert "steps, unet" not in command("show", path, "--steps", 6, "--coefficients")[1]
    plot = tmp_path / "a.png"
    assert "holds schedules for 4, 6 steps. Choose one: --steps 4." in refused(command, "show", path, "--plot", plot)
    assert "steps=5 was given. Allowed: 4, 6" in refused(command, "show", path, "--steps", 5)
    one = four.save(tmp_path / "one.safetensors")
    assert "--steps cannot be used" in refused(command, "show", one, "--steps", 4)
    assert not plot.exists()
    assert command("show", path, "--steps", 4, "--plot", plot)[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_show_of_what_is_neither(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    assert "no such file" in refused(command, "show", path)
    path.write_bytes(profile().to_bytes().replace(b"diffcache.profile", b"diffcache.process"))
    assert "found 'diffcache.process'. Allowed: 'diffcache.profile'" in refused(command, "show", path)
    path.write_bytes(schedule().to_bytes().replace(b'\\"most\\":3', b'\\"most\\":0'))
    assert "field 'transformer/online/most'" in refused(command, "show", path)


def test_coefficients_are_those_of_the_plan(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("show", schedule().save(tmp_path / "file.safetensors"), "--coefficients")
    assert code == 0
    described, block, model = out.split("\n\n")
    assert described == schedule().describe()
    assert block.splitlines() == [
        "transformer block:blocks.0",
        "  step  newest  w0",
        "     1       0   1",
        "     2       0   1",
        "     3       0   1",
        "     4       0   1",
        "     5       0   1",
    ]
    assert model.splitlines() == [
        "transformer model",
        "  step  branch  newest   w0    w1      v0     v1     κ    s                 b",
        "     2       0       1  1.5  -0.5  -1.125  0.375  0.25  0.5  -0.125 to -0.125",
        "     2       1       1    1     0   -0.75      0  0.25  0.5  -0.125 to -0.125",
        "     4       0       3  1.5  -0.5  -1.125  0.375  0.25  0.5  -0.125 to -0.125",
        "     4       1       3    1     0   -0.75      0  0.25  0.5  -0.125 to -0.125",
        "     5       0       3  1.5  -0.5  -1.125  0.375  0.25  0.5  -0.125 to -0.125",
        "     5       1       3    1     0   -0.75      0  0.25  0.5  -0.125 to -0.125",
    ]


def test_coefficients_of_anchors_that_do_not_exist_yet_are_left_out() -> None:
    weights = np.zeros((1, 4, 3))
    weights[0, 1, :1], weights[0, 3, :2] = 1, [2, -1]
    assert show.table(SitePlan(compute=hold("■·■·").compute, weights=weights)).splitlines() == [
        "  step  newest  w0  w1",
        "     1       0   1",
        "     3       2   2  -1",
    ]
    assert show.table(hold("■■■")) == "  every step is computed"


def test_show_refuses_what_does_not_go_together(command: Command, tmp_path: Path) -> None:
    plan, found = schedule().save(tmp_path / "s.safetensors"), profile().save(tmp_path / "p.safetensors")
    assert "is a profile, and --coefficients and --profile need a schedule" in refused(
        command, "show", found, "--coefficients"
    )
    assert "is a profile, and --coefficients and --profile need a schedule" in refused(
        command, "show", found, "--profile", found, "--plot", "x.png"
    )
    assert "it has an effect only with --plot" in refused(command, "show", plan, "--profile", found)


def test_a_plot_without_matplotlib_is_one_error_that_names_the_extra(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = profile().save(tmp_path / "p.safetensors")
    code, _, complaint = command("show", path, "--plot", tmp_path / "x.png")
    assert code == 1
    assert complaint == "error: plots need matplotlib, which is not installed: pip install 'diffcache[report]'\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_is_written_where_it_is_wanted(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan, found = schedule().save(tmp_path / "s.safetensors"), profile(start=0).save(tmp_path / "p.safetensors")
    for n, words in enumerate(([plan], [found])):
        picture = tmp_path / f"{n}.png"
        code, out, _ = command("show", *words, "--plot", picture)
        assert (code, out.splitlines()[-1]) == (0, f"drawn into {picture}")
        assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, complaint = command("show", plan, "--plot", tmp_path / "x.doc")
    assert code == 2
    assert "Allowed: a name that ends in one of" in complaint
    _, _, complaint = command("show", plan, "--plot", tmp_path / "none" / "x.png")
    assert "Allowed: a file in a folder that exists" in complaint


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "[" * 200_000), ("a.jsonl", "{" * 9), ("a.jsonl", "[1]")])
def test_rows_that_are_no_objects_are_one_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadOption, match="one JSON object on each line"):
        _samples.read(tmp_path / name)


def test_a_nested_field_of_a_table_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,size\nx," + "[" * 100_000 + "\n")
    assert _samples.read(tmp_path / "a.csv") == [{"prompt": "x", "size": "[" * 100_000}]
