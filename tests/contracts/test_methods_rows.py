"""The rows of ``benchmarks/methods.py``: every spec is known, and ``auto`` computes as many steps as its row states."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import method_results
import methods
import methods_figure

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
