"""The rows of ``benchmarks/methods.py``: every spec is known, ``auto`` computes as many steps as its row states, and
rows that are added to a record leave its other rows as they are.
"""

from __future__ import annotations

import argparse
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
import real_search
import trained_solvers
from method_results import Result

from diffcache import accelerated
from diffcache.assets import load
from diffcache.demo.run import STEPS, machine
from diffcache.profiling.recording import final_states
from diffcache.schedulers import Grid, Rule, function, parse_spec

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


def test_a_speedup_that_is_not_rounded_computes_too_many() -> None:
    """The test above compares something."""
    plain = [computed(Rule("auto", options={"speedup": STEPS / budget})) for budget in BUDGETS]
    assert plain != list(BUDGETS)


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
        assert [name for name, belongs in methods.KINDS.items() if belongs(result(row))] == ["trained solvers"]
    assert methods.KINDS["published methods"](result(method_results.SEARCHED))


# --- rows that are added to a record ---------------------------------------------------------------------------------


def result(method: str, budget: float = 8, psnr_db: float = 30.0, **more: Any) -> Result:
    return Result(method, budget, budget, 50 / budget, psnr_db, psnr_db - 5, 0.9, **more)


OLD = [result("ZEUS"), result("ZEUS", 12), result("optimize"), result("cache-dit 1: DBCache", note="a=1")]


def saved(folder: Path, new: list[Result], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record after new ones were added."""
    record = {"model": "flux", "circumstances": about, "rows": [r.row() for r in OLD]}
    table = methods.Table.__new__(methods.Table)
    table.results = new
    table.save(folder, "flux", record)
    found = json.loads((folder / "methods-flux.json").read_text())
    assert found["circumstances"] == about
    rows: list[dict[str, Any]] = found["rows"]
    assert [Result(**row) for row in rows] == [Result(**row) for row in json.loads(json.dumps(rows))]
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


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**dict.fromkeys(("budgets", "calibration", "held_out", "repeats")) | given)


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


def test_only_needs_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--only", "ZEUS", "--out", str(tmp_path)], "methods-flux.json does not exist; run without --only first"),
        (["--only", "zeus"], "invalid choice: 'zeus'"),
    ):
        monkeypatch.setattr(sys, "argv", ["methods.py", *arguments])
        with pytest.raises(SystemExit):
            methods.main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_seconds_of_a_kept_schedule_are_read(tmp_path: Path) -> None:
    model = load("flux")
    optimized = methods.Optimized(model, [], tmp_path)
    path = methods.kept(tmp_path, model, 8, "optimize", ".json")
    assert path is not None
    path.write_text('{"seconds": 61.5}')
    assert optimized.seconds(8) == 61.5


# --- the search with real runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "dit"])
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
