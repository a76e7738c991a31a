"""ZEUS: predictions and computed steps against a sampler that keeps its state as the authors' does."""

from __future__ import annotations

import numpy as np
import pytest
from documents import of_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.documents import Profile, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, zeus
from diffcache.schedulers.uniform import evenly

pytestmark = pytest.mark.fast


def grid(steps: int, start: int = 0) -> Grid:
    return Grid(np.linspace(1, 0.1, steps), start)


def handed(plan: SitePlan, found: np.ndarray) -> np.ndarray:
    """The outputs [T, C] that a sampler gets if ``found`` are the computed ones."""
    rows = []
    for i, computed in enumerate(plan.compute):
        anchors = np.flatnonzero(plan.compute[:i])[::-1][:2]
        rows.append(found[i] if computed else plan.weights[0, i, : len(anchors)] @ found[anchors])
    return np.array(rows)


def as_a_state_machine(
    found: np.ndarray,
    skips: np.ndarray | None = None,
    every: int = 3,
    window: tuple[int, int] = (10, 45),
    most: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the loop with the state of a patched sampler.

    A skipped network returns its last output again. After each step, the sampler decides about the next one. The first
    skip in a row extrapolates from the last two outputs that the network returned, and that result is used again at
    every other skip.
    """
    compute, rows = [], []
    last = older = np.zeros(found.shape[1])
    row, skip, extrapolated = 0, False, last
    for i, fresh in enumerate(found):
        compute.append(not skip)
        older, last = last, (last if skip else fresh)
        if skip:
            rows.append(extrapolated if row % 2 == 1 else last)
        else:
            rows.append(fresh)
        if skips is not None:
            skip = i + 1 < len(found) and bool(skips[i + 1])
            row = row + 1 if skip else 0
        elif row >= most:
            skip, row = False, 0
        elif i % every != every - 1 and window[0] <= i < window[1]:
            skip, row = True, row + 1
        else:
            skip, row = False, 0
        if skip and row == 1:
            extrapolated = last + (last - older)
    return np.array(compute), np.array(rows)


@pytest.mark.parametrize(("every", "most"), [(3, 4), (2, 4), (6, 4), (6, 5), (8, 8)])
def test_the_rule_runs_like_the_authors_sampler_at_fifty_steps(every: int, most: int) -> None:
    found = np.random.default_rng(0).normal(size=(50, 4))
    plan = zeus.rule(grid(50), every=every, most=most)
    compute, rows = as_a_state_machine(found, every=every, most=most)
    assert np.array_equal(plan.compute, compute)
    assert handed(plan, found) == pytest.approx(rows)


def test_the_published_rule_computes_27_of_50_steps() -> None:
    plan = zeus.rule(grid(50))
    assert plan.steps_computed == 27
    assert plan.compute[:11].all()
    assert plan.compute[46:].all()
    assert not plan.compute[[11, 13, 14, 43, 44]].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=14), st.integers(0, 99))
def test_predictions_are_those_of_the_state_machine_for_any_mask(skipped: list[bool], seed: int) -> None:
    skips = np.array([False, False, *skipped])
    found = np.random.default_rng(seed).normal(size=(len(skips), 3))
    _, rows = as_a_state_machine(found, skips=skips)
    assert handed(zeus.in_turns(~skips), found) == pytest.approx(rows)


def test_with_one_output_it_is_reused() -> None:
    assert zeus.in_turns(np.array([True, False, False])).weights[0].tolist() == [[0, 0], [1, 0], [1, 0]]


def test_steps_before_a_late_start_are_no_anchors() -> None:
    late, plain = zeus.rule(grid(25, start=5)), zeus.rule(grid(20))
    assert late.compute[:5].all()
    assert np.array_equal(late.compute[5:], plain.compute)
    assert np.array_equal(late.weights[:, 5:], plain.weights)
    only = zeus.in_turns(np.array([True, True, True, False]), start=2)
    assert only.weights[0, 3].tolist() == [1, 0]


def profile(steps: int) -> Profile:
    return of_outputs({"model": np.random.default_rng(0).normal(size=(1, steps, 4))})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))), st.integers(1, 8))
def test_a_plan_meets_its_budget(size: tuple[int, int], longest: int) -> None:
    steps, computed = size
    plan = zeus.plan(profile(steps), computed, longest=longest).sites["model"]
    assert plan.compute[0]
    assert plan.steps_computed == computed


def test_the_window_keeps_its_size_while_its_runs_are_short_enough() -> None:
    def runs(computed: int) -> tuple[int, int, int]:
        compute = zeus.plan(profile(50), computed).sites["model"].compute
        before = int(np.argmin(compute)) if not compute.all() else 50
        after = int(np.argmin(compute[::-1])) if not compute.all() else 50
        return before, after, int(np.diff([*np.flatnonzero(compute), 50]).max())

    assert runs(25) == (10, 5, 4)
    assert runs(21) == (10, 5, 6)
    before, after, longest = runs(12)
    assert (before, longest) == (3, 6)
    assert after == 1
    assert np.array_equal(zeus.plan(profile(50), 6).sites["model"].compute, evenly(50, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 was given. Allowed: a whole number, 1 or more"),
        ({"most": 0}, "most=0 was given. Allowed: a whole number, 1 or more"),
        ({"warmup": 1.0}, "warmup=1.0 was given. Allowed: a share of the steps, 0 or more and below 1"),
        ({"final": -0.1}, "final=-0.1 was given. Allowed: a share of the steps"),
        ({"warmup": 0.5, "final": 0.5}, "final=0.5 was given. Allowed: less than 0.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        zeus.rule(grid(20), **options)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="longest=0"):
        zeus.plan(profile(20), 5, longest=0)
