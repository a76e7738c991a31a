"""The rule that needs no calibration and corrects what its predictions missed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffcache.documents import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, auto, parse_rule
from diffcache.schedulers.taylorseer import extrapolated
from diffcache.schedulers.uniform import reuse

pytestmark = pytest.mark.fast
STEPS = 40
TIMES = np.linspace(1000.0, 25.0, STEPS)


def euler(steps: int) -> np.ndarray:
    """Return what outputs add to later states in a loop of equal Euler steps."""
    return np.tril(np.full((steps, steps), -1.0 / steps))


def error(plan: SitePlan, outputs: np.ndarray) -> float:
    """Return the error of the last state of an Euler loop, for outputs [T] that do not depend on the state."""
    kept: list[float] = []
    handed = []
    for i, output in enumerate(outputs):
        if plan.compute[i]:
            kept = [output, *kept][: plan.weights.shape[2]]
        handed.append(output if plan.compute[i] else float(plan.weights[0, i, : len(kept)] @ kept))
    return abs(float(np.sum(handed - outputs))) / len(outputs)


@pytest.mark.parametrize("guided", [True, False, None])
def test_smooth_outputs_end_nearer_than_with_reuse_and_extrapolation(guided: bool | None) -> None:
    grid = Grid(TIMES, guided=guided, propagation=lambda: euler(STEPS))
    draw = np.random.default_rng(0)
    x = TIMES / 1000
    plan = auto.rule(grid, speedup=4)
    others = [reuse(plan.compute), extrapolated(grid, plan.compute, 1)]
    found = []
    for _ in range(50):
        outputs = sum(draw.normal() * np.cos(draw.uniform(0, 6) * x + draw.uniform(0, 6)) for _ in range(4))
        found.append([error(p, outputs) for p in (plan, *others)])
    mine, reused, extrapolations = np.mean(found, 0)
    assert mine < 0.5 * reused
    assert mine < 0.7 * extrapolations


def test_a_sampler_that_is_not_known_still_gives_a_plan() -> None:
    plan = auto.rule(Grid(TIMES), speedup=4)
    outputs = np.cos(TIMES / 300)
    assert error(plan, outputs) < 0.5 * error(reuse(plan.compute), outputs)


@pytest.mark.parametrize("speedup", [1, 1.5, 2, 3, 7.3, 100])
@pytest.mark.parametrize("steps", [1, 4, 5, 20, 50])
def test_the_number_of_computed_steps(speedup: float, steps: int) -> None:
    plan = auto.rule(Grid(np.linspace(1000, 1, steps)), speedup=speedup)
    assert plan.steps_computed == min(steps, max(4, math.ceil(steps / speedup)))
    assert plan.compute[0]


def test_guided_loops_compute_more_at_the_beginning() -> None:
    halves = {}
    for guided in (True, False):
        plan = auto.rule(Grid(TIMES, guided=guided, propagation=lambda: euler(STEPS)), speedup=2)
        halves[guided] = plan.compute[: STEPS // 2].sum()
        assert plan.steps_computed == STEPS // 2
    assert halves[True] > halves[False] > STEPS // 4


def test_steps_before_the_start_of_the_loop_do_not_count() -> None:
    plan = auto.rule(Grid(TIMES, start=20, propagation=lambda: euler(STEPS)), speedup=4)
    assert plan.compute[:21].all()
    assert plan.compute[20:].sum() == 5


@pytest.mark.parametrize("digits", [17, 7])
def test_a_ratio_of_steps_computes_exactly_these_steps(digits: int) -> None:
    """Rounding of floats made 50 / (50 / 29) more than 29, and computed a step too many."""
    for steps in (28, 50):
        for computed in range(auto.FEWEST, steps + 1):
            speedup = max(float(f"{steps / computed:.{digits}g}"), 1.0)
            assert auto.rule(Grid(np.ones(steps)), speedup=speedup).steps_computed == computed


@pytest.mark.parametrize("speedup", [0.5, 0, -1, float("nan"), "fast"])
def test_a_speedup_below_one_is_refused(speedup: object) -> None:
    with pytest.raises(BadOption, match="speedup"):
        auto.rule(Grid(TIMES), speedup=speedup)


def test_its_spec() -> None:
    assert str(parse_rule("auto:speedup=2.5")) == "auto:speedup=2.5"
    with pytest.raises(BadOption, match="1 or more"):
        parse_rule("auto:speedup=0.5")
