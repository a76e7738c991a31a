"""The rows of ``benchmarks/methods.py``: every spec is known, ``auto`` computes as many steps as its row states, and
rows that are added to a record leave its other rows as they are. A record is of one model and one number of steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import method_results
import methods
import methods_figure
import methods_pages
import real_search
import trained_solvers
from method_results import RESULTS, Record, Result

from diffcache import accelerated
from diffcache.assets import NAMES, load
from diffcache.demo.run import STEPS, machine
from diffcache.profiling.recording import final_states
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
    rows = [*method_results.PUBLISHED, method_results.AUTO, *method_results.COSTLY]
    assert {methods_figure._family(row) for row in rows} <= set(methods_figure.STYLES)
    assert methods_figure._short(method_results.AUTO) == "auto"
    assert [row for row in rows if methods_figure._family(row) == "auto"] == [method_results.AUTO]
    assert [methods_figure._short(row) for row in method_results.COSTLY] == [
        *["DyWeight"] * 2,
        *["S4S"] * 2,
        "BudCache",
    ]


def test_every_trained_row_has_a_solver_and_a_kind() -> None:
    for row, (kind, times) in method_results.TRAINED.items():
        assert kind in trained_solvers.SOLVERS
        assert times in (1, 10)
        assert ("ten times" in row) == (times == 10)
        assert [name for name, belongs in methods_pages.KINDS.items() if belongs(result(row))] == ["trained solvers"]
    assert methods_pages.KINDS["published methods"](result(method_results.SEARCHED))


# --- rows that are added to a record ---------------------------------------------------------------------------------


def result(method: str, budget: float = 8, psnr_db: float = 30.0, **more: Any) -> Result:
    return Result(method, budget, budget, 50 / budget, psnr_db, psnr_db - 5, 0.9, **more)


OLD = [result("ZEUS"), result("ZEUS", 12), result("optimize"), result("cache-dit 1: DBCache", note="a=1")]


def saved(
    folder: Path, new: list[Result], about: dict[str, Any], model: str = "flux", steps: int = STEPS
) -> list[dict[str, Any]]:
    """The rows of a record after new ones were added."""
    table = methods.Table.__new__(methods.Table)
    table.results = new
    table.save(folder, Record(model, steps, about, OLD))
    (path,) = folder.glob("methods-*.json")
    found = json.loads(path.read_text())
    assert (found["model"], found["steps"], found["circumstances"]) == (model, steps, about)
    rows: list[dict[str, Any]] = found["rows"]
    assert [r.row() for r in Record.load(path).rows] == rows
    return rows


def test_new_rows_replace_those_of_the_same_method_and_budget(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    new = [result("ZEUS", 12, 40.0), result(next(iter(method_results.TRAINED)), note="61 s, 40 updates")]
    rows = saved(tmp_path, new, {"size": {}, **machine()})
    assert rows == [OLD[0].row(), new[0].row(), OLD[2].row(), OLD[3].row(), new[1].row()]
    assert "| trained solvers |" in (tmp_path / "leads-flux.md").read_text()


def test_rows_of_another_machine_name_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = saved(tmp_path, [result("ZEUS", 12, 40.0)], {"size": {}, **machine(), "torch": "1.0"})
    assert [row.get("ran_on") for row in rows] == [None, machine(), None, None]
    assert "trained solvers" not in (tmp_path / "leads-flux.md").read_text()  # a kind without rows has no column


@pytest.mark.parametrize(("model", "steps", "name"), [("flux", 28, "flux-28"), ("flux-guided", 50, "flux-guided")])
def test_rows_are_added_to_the_record_of_their_model_and_steps(
    model: str, steps: int, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    new = [result("ZEUS", 12, 40.0)]
    rows = saved(tmp_path, new, {"size": {}, **machine()}, model, steps)
    assert rows == [OLD[0].row(), new[0].row(), OLD[2].row(), OLD[3].row()]
    assert f"| 8.0 of {steps} |" in (tmp_path / f"methods-{name}.md").read_text()
    assert f"--model {model}" in (tmp_path / "methods-sections.md").read_text()


def options(steps: int = STEPS, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(steps=steps, **dict.fromkeys(("budgets", "calibration", "held_out", "repeats")) | given)


def refuse(message: str) -> None:
    raise SystemExit(message)


def test_rows_are_added_with_the_pictures_of_the_record() -> None:
    recorded = {"budgets": [17, 8], "calibration": 16, "held_out": 24, "repeats": 3, "search_s": 20.0}
    size = methods.size_of(options(budgets=[8]), recorded, refuse)
    assert (size.budgets, size.calibration, size.held_out, size.repeats) == ((8,), 16, 24, 3)
    assert methods.size_of(options(held_out=24), recorded, refuse).budgets == (17, 8)
    with pytest.raises(SystemExit, match="--held-out is 32, and the record has 24; leave the option out"):
        methods.size_of(options(held_out=32), recorded, refuse)
    size = methods.size_of(options(held_out=48), {}, refuse)
    assert (size.budgets, size.calibration, size.held_out) == ((25, 17, 12, 10, 8, 6), 32, 48)
    with pytest.raises(SystemExit, match="--budgets is 17 8; allowed: 1 to 11, fewer than --steps"):
        methods.size_of(options(steps=12), recorded, refuse)


def test_only_needs_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--only", "ZEUS", "--out", str(tmp_path)], "methods-flux.json does not exist; run without --only first"),
        (["--only", "ZEUS", "--out", str(tmp_path), "--steps", "28"], "methods-flux-28.json does not exist"),
        (["--only", "zeus"], "invalid choice: 'zeus'"),
    ):
        monkeypatch.setattr(sys, "argv", ["methods.py", *arguments])
        with pytest.raises(SystemExit):
            methods.main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_seconds_of_a_kept_schedule_are_read(tmp_path: Path) -> None:
    optimized = methods.Optimized(load("flux"), [], STEPS, tmp_path)
    path = optimized.kept(8, "optimize", ".json")
    assert path is not None
    path.write_text('{"seconds": 61.5}')
    assert optimized.seconds(8) == 61.5


def test_kept_files_name_their_model_and_steps(tmp_path: Path) -> None:
    found = [
        methods.Optimized(load(model), [], steps, tmp_path).kept(8, "CEM + TaylorSeer")
        for model in ("flux", "flux-guided")
        for steps in (50, 28)
    ]
    assert [path.name for path in found if path is not None] == [
        f"{name}-8-CEM-+-TaylorSeer.safetensors" for name in ("flux", "flux-28", "flux-guided", "flux-guided-28")
    ]


@pytest.mark.parametrize("name", ["flux", "flux-guided"])
def test_costly_rows_are_made_for_the_steps_of_the_full_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps, budget = load(name), 6, 2
    calls = [model.call(model.subjects[:1], [0], steps=steps)]
    optimized = methods.Optimized(model, calls, steps, tmp_path)
    monkeypatch.setattr(optimized, "seconds", lambda _: 0.5)
    made = methods.schedules(optimized, [budget], [method_results.SEARCHED])[method_results.SEARCHED, budget]
    solvers = methods.solvers_of(optimized, [budget], list(method_results.TRAINED)[:1])
    again = methods.schedules(optimized, [budget], [method_results.SEARCHED])[method_results.SEARCHED, budget]
    assert (again.schedule.steps, again.note) == (made.schedule.steps, made.note) == (steps, made.note)
    assert "masks" in made.note
    table = methods.Table(model, (model.subjects[:1], [0]), 1, methods.trial(model, (model.subjects[:1], [0]), 6, 1), 6)
    table.plan(method_results.SEARCHED, budget, made.schedule, made.note)
    for (method, computed), solver in solvers.items():
        table.solver(method, computed, solver)
    assert [(row.computed, row.budget) for row in table.results] == [(budget, budget)] * 2
    assert all(np.isfinite(row.psnr_db) for row in table.results)
    assert {path.name.partition("-2-")[0] for path in tmp_path.iterdir()} == {f"{name}-6"}


# --- the search with real runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_search_with_real_runs_finds_the_best_mask_and_counts_its_cost(name: str) -> None:
    """Against all masks: with the first step fixed, one of 6 steps moves, and the search may try each."""
    model, steps, computed = load(name), 7, 2
    call = model.call(model.subjects[:2], [0, 1], steps=steps)
    found = real_search.search(model.pipe, call, computed, sa_iters=20)
    (end,) = final_states(model.pipe, [call])
    errors = []
    for step in range(1, steps):
        with accelerated(model.pipe, real_search.schedule_of(np.isin(np.arange(steps), (0, step)))):
            (state,) = final_states(model.pipe, [call])
        errors.append(float((state - end).square().mean()))
    (site,) = found.schedule.denoisers["transformer"].sites.values()
    assert np.flatnonzero(site.compute).tolist() == [0, 1 + int(np.argmin(errors))]
    assert found.error == min(errors)
    assert found.masks <= len(errors)
    assert found.full_runs == 2 * (1 + found.masks * computed / steps)


# --- records of several models and numbers of steps -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the committed records, one of the guided model and one of 28 steps, both with the rows of Flux."""
    monkeypatch.setattr(methods_pages, "plot", lambda *_: None)
    monkeypatch.setattr(methods_pages, "plot_all", lambda _: None)
    for name in ("dit", "flux"):
        found = json.loads((RESULTS / f"methods-{name}.json").read_text())
        found.pop("steps", None)  # as files from before --steps
        (tmp_path / f"methods-{name}.json").write_text(json.dumps(found))
    flux = Record.load(RESULTS / "methods-flux.json")
    for more in (
        dataclasses.replace(flux, model="flux-guided"),
        dataclasses.replace(flux, steps=28, rows=[row for row in flux.rows if row.budget < 17]),
    ):
        more.save(tmp_path)
    return tmp_path


def test_a_record_without_a_number_of_steps_is_of_50(folder: Path) -> None:
    found = method_results.records(folder)
    assert [(one.model, one.steps) for one in found] == [("dit", 50), ("flux", 50), ("flux", 28), ("flux-guided", 50)]
    assert [one.name for one in found] == ["dit", "flux", "flux-28", "flux-guided"]
    assert "steps" not in json.loads((folder / "methods-flux.json").read_text())
    assert json.loads((folder / "methods-flux-28.json").read_text())["steps"] == 28


def test_every_demo_model_has_rows_in_the_table_of_the_readme(folder: Path) -> None:
    methods_pages.write_front_page(folder)
    lines = (folder / "front-page.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {title}" for title in ("DiT, guided", "Flux", "Flux, guided") for _ in range(2)
    ]
    assert len({line.split(" | ")[0] for line in lines}) == len(NAMES)


def test_tables_state_the_steps_of_their_record(folder: Path) -> None:
    for record in method_results.records(folder):
        methods_pages.write(record, folder)
    table, summary = (folder / "methods-flux-28.md").read_text(), (folder / "summary-flux-28.md").read_text()
    assert "| 12.0 of 28 |" in table
    assert summary.count("| 6.0 of 28 | **diffcache optimize** |") == 1
    assert "of 50 |" not in table + summary
    assert (folder / "methods-flux.md").read_text() == (RESULTS / "methods-flux.md").read_text()


def test_every_record_has_a_section_with_its_command(folder: Path) -> None:
    methods_pages.write_sections(folder)
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
    methods_pages.write_sections(tmp_path)
    methods_pages.write_front_page(tmp_path)
    for name in ("methods-sections.md", "leads-sections.md", "front-page.md"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_only_records_of_50_steps_reach_the_list_of_schedulers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_pages.schedulers, "__file__", str(folder / "module.py"))
    methods_pages.write_demo_psnr(folder)
    found = json.loads((folder / methods_pages.planning.DEMO_FILE).read_text())["psnr_db"]
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
