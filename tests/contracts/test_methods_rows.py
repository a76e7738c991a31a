"""The rows of ``benchmarks/methods.py``: every spec is known, and ``auto`` computes as many steps as its row states."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import method_results
import methods
import methods_figure
from method_results import RESULTS, Record

from diffcache.assets import NAMES
from diffcache.demo.run import STEPS
from diffcache.schedulers import Grid, Rule, auto, function, parse_spec

BUDGETS = range(4, STEPS + 1)
GRID = Grid(np.linspace(1000.0, 1.0, STEPS))


def computed(rule: Rule) -> int:
    (site,) = rule.schedule(GRID, {"transformer": ("model",)}).denoisers["transformer"].sites.values()
    return site.steps_computed


@pytest.mark.parametrize("method", method_results.PUBLISHED)
def test_every_spec_is_known(method: str) -> None:
    spec, correction = method_results.PUBLISHED[method]
    name, options = parse_spec(spec, "plan")
    function(name, "plan", options)
    assert correction in ("", "per channel", "one for all channels")


def test_auto_computes_as_many_steps_as_its_row_states() -> None:
    assert [computed(methods.auto(budget)) for budget in BUDGETS] == list(BUDGETS)


def test_a_rule_that_does_not_allow_for_rounding_computes_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above compares something."""
    monkeypatch.setattr(auto, "ROUNDING", 0.0)
    assert [computed(methods.auto(budget)) for budget in BUDGETS] != list(BUDGETS)


def test_every_row_has_a_style_in_the_figure() -> None:
    rows = [*method_results.PUBLISHED, method_results.AUTO]
    assert {methods_figure._family(row) for row in rows} <= set(methods_figure.STYLES)
    assert methods_figure._short(method_results.AUTO) == "auto"
    assert [row for row in rows if methods_figure._family(row) == "auto"] == [method_results.AUTO]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the committed records, one of the guided model and one of 28 steps, both with the rows of Flux."""
    monkeypatch.setattr(methods, "plot", lambda *_: None)
    monkeypatch.setattr(methods, "plot_all", lambda _: None)
    for name in ("dit", "flux"):
        (tmp_path / f"methods-{name}.json").write_text((RESULTS / f"methods-{name}.json").read_text())
    flux = Record.load(RESULTS / "methods-flux.json")
    for more in (
        dataclasses.replace(flux, model="flux-guided"),
        dataclasses.replace(flux, steps=28, rows=[row for row in flux.rows if row.budget < 17]),
    ):
        (tmp_path / f"methods-{more.name}.json").write_text(json.dumps(dataclasses.asdict(more)))
    return tmp_path


def test_a_record_without_a_number_of_steps_is_of_50(folder: Path) -> None:
    found = method_results.records(folder)
    assert [(one.model, one.steps) for one in found] == [("dit", 50), ("flux", 50), ("flux", 28), ("flux-guided", 50)]
    assert [one.name for one in found] == ["dit", "flux", "flux-28", "flux-guided"]
    assert "steps" not in json.loads((RESULTS / "methods-flux.json").read_text())


def test_every_demo_model_has_rows_in_the_table_of_the_readme(folder: Path) -> None:
    methods.write_front_page(folder)
    lines = (folder / "front-page.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {title}" for title in ("DiT, guided", "Flux", "Flux, guided") for _ in range(2)
    ]
    assert len({line.split(" | ")[0] for line in lines}) == len(NAMES)


def test_tables_state_the_steps_of_their_record(folder: Path) -> None:
    for record in method_results.records(folder):
        methods.write(record, folder)
    table, summary = (folder / "methods-flux-28.md").read_text(), (folder / "summary-flux-28.md").read_text()
    assert "| 12.0 of 28 |" in table
    assert summary.count("| 6.0 of 28 | **diffcache optimize** |") == 1
    assert "of 50 |" not in table + summary
    assert (folder / "methods-flux.md").read_text() == (RESULTS / "methods-flux.md").read_text()


def test_every_record_has_a_section_with_its_command(folder: Path) -> None:
    methods.write_sections(folder)
    text = (folder / "methods-sections.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# DiT: class to picture, DDIM, classifier-free guidance 4",
        "# Flux: text to picture, Euler, no guidance",
        "# Flux: text to picture, Euler, no guidance, 28 steps",
        "# Flux: text to picture, Euler, true classifier-free guidance 5",
    ]
    assert "`python benchmarks/methods.py --model flux --steps 28 --budgets 12 10 8 6`; [all budgets" in text
    assert (folder / "leads-sections.md").read_text().count("Lead of `optimize`") == len(headings)


def test_the_committed_sections_follow_from_the_committed_records(tmp_path: Path) -> None:
    for path in (*RESULTS.glob("methods-*.json"), *RESULTS.glob("evaluation-*.md")):
        (tmp_path / path.name).write_text(path.read_text())
    methods.write_sections(tmp_path)
    methods.write_front_page(tmp_path)
    for name in ("methods-sections.md", "leads-sections.md", "front-page.md"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_only_records_of_50_steps_reach_the_list_of_schedulers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.schedulers, "__file__", str(folder / "module.py"))
    methods.write_demo_psnr(folder)
    found = json.loads((folder / methods.planning.DEMO_FILE).read_text())["psnr_db"]
    assert set(found) == set(NAMES)
    assert found["flux"] == found["flux-guided"]


@pytest.mark.parametrize("given", [["--budgets", "28"], ["--budgets", "0"], []])
def test_a_budget_outside_the_steps_is_refused(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["methods.py", "--steps", "12" if not given else "28", *given])
    with pytest.raises(SystemExit):
        methods.main()
    assert "fewer than --steps" in capsys.readouterr().err
