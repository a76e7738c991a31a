"""Forecasts by a ridge fit of Chebyshev polynomials, against a fit by least squares; and growing windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measurements import STEPS as MEASURED
from measurements import measurement

from diffcache.documents import SitePlan
from diffcache.errors import BadOption
from diffcache.planning import plan as planned
from diffcache.schedulers import Grid, parse_rule, spectrum

pytestmark = pytest.mark.fast
STEPS = 50
GRID = Grid(np.linspace(1000.0, 1.0, STEPS))


def computed(plan: SitePlan, i: int, start: int = 0) -> list[int]:
    """Return the computed steps of the loop before step i, the newest first."""
    return [a for a in range(i - 1, start - 1, -1) if plan.compute[a]]


def fitted(seen: list[int], outputs: np.ndarray, i: int, degree: int, ridge: float, start: int = 0) -> np.ndarray:
    """Return the value at step i of a polynomial fitted to the outputs [T, C] of the steps ``seen``.

    The penalty is written as further rows of a least-squares problem.
    """
    steps = len(outputs)
    angle = np.arccos(np.clip(2 * (np.arange(steps) - start) / (steps - start) - 1, -1, 1))
    design = np.cos(np.outer(angle, np.arange(degree + 1)))
    rows = np.vstack([design[seen], np.sqrt(ridge) * np.eye(degree + 1)])
    targets = np.vstack([outputs[seen], np.zeros((degree + 1, outputs.shape[1]))])
    coefficients, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    return np.asarray(design[i] @ coefficients)


def forecasts(plan: SitePlan, outputs: np.ndarray, start: int = 0) -> dict[int, np.ndarray]:
    """Return what the weights predict from the computed outputs [T, C], by step."""
    found = {}
    for i in np.flatnonzero(~plan.compute):
        anchors = computed(plan, i, start)[: plan.weights.shape[2]]
        assert not plan.weights[0, i, len(anchors) :].any()
        found[int(i)] = plan.weights[0, i, : len(anchors)] @ outputs[anchors]
    return found


@pytest.mark.parametrize(("degree", "ridge"), [(4, 0.1), (0, 0.1), (2, 3.0), (7, 0.01)])
@pytest.mark.parametrize("start", [0, 11])
def test_the_weights_are_those_of_a_ridge_fit(degree: int, ridge: float, start: int) -> None:
    outputs = np.random.default_rng(degree).normal(size=(STEPS, 6))
    plan = spectrum.rule(Grid(GRID.timesteps, start), degree=degree, ridge=ridge)
    assert plan.compute[: start + 5].all()
    found = forecasts(plan, outputs, start)
    assert len(found) > 20
    for i, value in found.items():
        np.testing.assert_allclose(
            value, fitted(computed(plan, i, start), outputs, i, degree, ridge, start), rtol=1e-7, atol=1e-9
        )


def test_with_little_penalty_it_is_exact_on_polynomials_of_its_degree() -> None:
    t = np.linspace(-1, 1, STEPS)
    outputs = np.stack([t**4 - t, 3 * t**3 + t**2, np.ones(STEPS)], axis=1)
    plan = spectrum.rule(GRID, ridge=1e-9)
    assert all(np.allclose(v, outputs[i], atol=1e-3) for i, v in forecasts(plan, outputs).items())
    lower = spectrum.rule(GRID, ridge=1e-9, degree=2)
    assert not all(np.allclose(v, outputs[i], atol=1e-3) for i, v in forecasts(lower, outputs).items())


def test_the_rest_of_the_blend_is_a_line_through_the_two_newest_outputs() -> None:
    outputs = np.random.default_rng(1).normal(size=(STEPS, 6))
    whole, half, line = (forecasts(spectrum.rule(GRID, blend=b), outputs) for b in (1.0, 0.5, 0.0))
    compute = spectrum.rule(GRID).compute
    for i, value in line.items():
        older, newer = np.flatnonzero(compute[:i])[-2:]
        slope = (outputs[newer] - outputs[older]) / (newer - older)
        np.testing.assert_allclose(value, outputs[newer] + slope * (i - newer))
        np.testing.assert_allclose(half[i], (whole[i] + value) / 2)
    reuse = spectrum.rule(GRID, blend=0.0, warmup=1).weights[0, 1]
    assert reuse[0] == 1
    assert not reuse[1:].any()


def test_the_number_of_anchors_is_limited() -> None:
    outputs = np.random.default_rng(2).normal(size=(STEPS, 3))
    plan = spectrum.rule(GRID, anchors=3)
    assert plan.anchors == 3
    for i, value in forecasts(plan, outputs).items():
        expected = fitted(computed(plan, i)[:3], outputs, i, 4, 0.1)
        np.testing.assert_allclose(value, expected, rtol=1e-7, atol=1e-9)
    assert spectrum.rule(GRID, anchors=1).anchors == 1


# --- computed steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("growth", "number"), [(0.75, 14), (3.0, 10)])
def test_the_published_settings_compute_as_many_steps_as_the_authors_state(growth: float, number: int) -> None:
    assert spectrum.rule(GRID, growth=growth).compute.sum() == number


@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 6), st.integers(0, 5000))
def test_a_step_is_computed_when_the_window_is_full(steps: int, warmup: int, window: int, growth: int) -> None:
    expected, since, done = [], 0, 0
    for i in range(steps):
        since += 1
        full = i < warmup or since >= window + done * growth // 1000
        done += i >= warmup and full
        since = 0 if full else since
        expected.append(full)
    assert spectrum.windows(steps, warmup, window, growth).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"warmup": 1}, {"window": 1}, {"warmup": 30, "window": 9}])
def test_every_budget_is_met(options: dict[str, int]) -> None:
    profile = measurement()
    for budget in range(1, MEASURED + 1):
        found = spectrum.plan(profile, budget, **options).sites["model"].compute
        assert found.sum() == budget
        assert found[0]


@pytest.mark.parametrize(("growth", "number"), [(0.75, 14), (3.0, 10)])
def test_the_growth_for_a_budget_is_near_the_published_one(growth: float, number: int) -> None:
    chosen = spectrum._growth(STEPS, 5, 2, number) / spectrum.FINE
    assert spectrum.windows(STEPS, 5, 2, round(chosen * spectrum.FINE)).sum() == number
    assert abs(chosen - growth) < 0.1


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window", 0),
        ("window", 2.5),
        ("growth", -0.1),
        ("growth", "fast"),
        ("warmup", 0),
        ("degree", -1),
        ("degree", 17),
        ("ridge", 0),
        ("ridge", -1.0),
        ("blend", 1.5),
        ("blend", -0.5),
        ("anchors", 0),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_name(option: str, value: object) -> None:
    with pytest.raises(BadOption, match=f"{option}=.*was given. Allowed: "):
        parse_rule(f"spectrum:{option}={value}")
    if option != "growth":
        with pytest.raises(BadOption, match=f"{option}=.*was given. Allowed: "):
            planned(measurement(), f"spectrum:{option}={value}", 7)
