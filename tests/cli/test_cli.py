"""The command: what it writes and prints is what the library makes, and its errors are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Command, command_of
from documents import hold, profile, schedule

from diffcache import cli, planning
from diffcache.cli import _samples, show
from diffcache.documents import Budget, CacheSchedule, Profile, SitePlan
from diffcache.errors import BadOption

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
    assert (code, out) == (2, "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    return complaint.removeprefix("error: ").strip()


def test_every_file_of_the_folder_is_a_subcommand_with_a_line_of_help(command: Command) -> None:
    files = {path.stem for path in (ROOT / "diffcache" / "cli").glob("[a-z]*.py")}
    named = {found.name for found in (*cli.app.registered_commands, *cli.app.registered_groups)}
    assert named == files >= {"demo", "plan", "show", "eval"}
    code, out, _ = command("--help")
    assert code == 0
    for name in files:
        assert re.search(rf"{name} +[A-Z]", out)


BARE = """
import sys, types
package = types.ModuleType("diffcache")  # the command alone, without what the package imports for others
package.__path__ = ["diffcache"]
sys.modules["diffcache"] = package
sys.argv = ["diffcache", *sys.argv[1:]]
from diffcache.cli import main
try:
    main()
finally:
    print(sorted({"torch", "diffusers", "matplotlib", "transformers"} & sys.modules.keys()))
"""


def test_planning_and_showing_bring_in_nothing_heavy(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "schedule.safetensors"
    for words in (["plan", measured, "--steps", "5", "--out", out], ["show", out], ["plan", "--list"]):
        run = subprocess.run(
            [sys.executable, "-c", BARE, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == "[]"


# plan


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["--steps", 5], Budget(computed_steps=5)),
        (["--speedup", 1.6], Budget(speedup=1.6)),
        (["--max-error-db", 20], Budget(max_error_db=20)),
        (["--steps", 5, "--memory-bytes", 9000], Budget(computed_steps=5, memory_bytes=9000)),
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
    assert said == f"{wanted.describe()}\nwritten to {out}\n"


def test_plan_without_a_scheduler_takes_this_projects_own(command: Command, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "planned.safetensors"
    command("plan", measured, "--steps", 4, "--out", out)
    assert CacheSchedule.load(out).provenance["scheduler"] == "closed_loop"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "budget cannot be used: no goal was given. Pass exactly one of --steps, --speedup, --max-error-db."),
        (["--memory-bytes", 9], "no goal was given."),
        (
            ["--steps", 4, "--speedup", 2],
            "budget cannot be used: --steps and --speedup were given. Pass exactly one of",
        ),
        (["--steps", 0], "computed_steps=0.0 was given. Allowed: 1 or more."),
        (["--steps", 13], "computed_steps=13.0 was given. Allowed: 1 to 12, the steps of the profile."),
        (["--speedup", 0.5], "speedup=0.5 was given."),
        (["--steps", 4, "--memory-bytes", 9], "memory_bytes=9 was given. Allowed: 4096 or more, the bytes that"),
        (["--steps", 4, "--scheduler", "unifrom"], "Did you mean 'uniform'?"),
        (["--steps", 4, "--scheduler", "taylorseer:order=9"], "order=9 was given. Allowed: 0 to 4."),
        (["--steps", 4, "--out", "nowhere/file.safetensors"], "a file in a folder that exists"),
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
    assert f"and {words[0]} was given too. Use --compare with a profile, one goal and --memory-bytes" in complaint
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


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_list_names_every_scheduler(command: Command, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = command("plan", "--list")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    text = " ".join(out.split())
    for scheduler in planning.available():
        assert f"\n  {scheduler.name} " in out
        assert scheduler.summary in text


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
    assert code == 2
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
