"""A guard on the input's drift computes extra steps, and does not change the plan's anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from online import HUGE, STEPS, decided, denoised, mean, played, strips
from pipelines import TINY, shared
from probes import BRANCHES

from diffcache import CacheSchedule
from diffcache.documents import DenoiserPlan
from diffcache.executor import Anchor, Output
from diffcache.executor.store import signature
from diffcache.schedulers.taylorseer import extrapolated

pytestmark = pytest.mark.fast


def guarded(pipe: Any, limit: float | Sequence[float], mask: str = "##..#..#....") -> CacheSchedule:
    timesteps = np.linspace(1.0, 0.1, len(mask))
    from diffcache.schedulers import Grid

    plan = extrapolated(Grid(timesteps), np.array([c == "#" for c in mask]), 1)
    return decided(pipe, "drift", limit, plan=plan)


def without_rule(schedule: CacheSchedule) -> CacheSchedule:
    sites = schedule.denoisers["transformer"].sites
    return CacheSchedule(steps=schedule.steps, denoisers={"transformer": DenoiserPlan(sites=sites)})


def drifts(name: str, schedule: CacheSchedule) -> list[np.ndarray]:
    """Relative change of the input since the newest planned step's, per branch [T], without a guard."""
    pipe, calls = shared(name), BRANCHES[TINY[name].guidance]
    compute = schedule.denoisers["transformer"].sites["model"].compute
    with denoised(pipe.transformer) as recorded:
        played(name, without_rule(schedule))
    found = []
    for branch in range(calls):
        xs = [x for x, _ in recorded[branch::calls]]
        newest = [max(np.flatnonzero(compute[: i + 1])) for i in range(len(xs))]
        found.append(np.array([mean(x - xs[a]) / mean(xs[a]) for x, a in zip(xs, newest, strict=True)]))
    return found


@pytest.mark.parametrize("name", ["flux", "dit", "wan"])
def test_a_guard_that_sees_nothing_unusual_changes_no_bit(name: str) -> None:
    pipe = shared(name)
    usual = np.max(drifts(name, guarded(pipe, HUGE)), axis=0)
    output, found = played(name, guarded(pipe, 1.001 * usual + 1e-9))
    assert torch.equal(output, played(name, without_rule(guarded(pipe, HUGE)))[0])
    assert sum(row.guarded for row in found.rows) == 0
    assert "guarded" not in str(found)


def test_a_guard_computes_where_the_input_has_moved_too_far_and_only_there() -> None:
    pipe = shared("flux")
    usual = drifts("flux", guarded(pipe, HUGE))[0]
    schedule = guarded(pipe, 1.001 * usual + 1e-9)

    def push(pipe: Any, i: int, t: Any, kept: Any) -> Any:
        return {"latents": kept["latents"] * (1.3 if i == 4 else 1.0)}

    with denoised(pipe.transformer) as calls:
        _, found = played("flux", schedule, callback_on_step_end=push)
    (row,) = found.rows
    assert row.strip == "■■··■■■■····"  # computed by plan: 0, 1, 4, 7; pushed after 4
    assert (row.computed, row.predicted, row.guarded, dict(row.failed_open)) == (4, 6, 2, {})
    assert found.computed == 6
    assert "guarded: the input had moved too far (2)" in str(found)
    assert "decided in the run by drift" in str(found)
    # An extra computed step was used once: later predictions refer to the planned anchors.
    plan = schedule.denoisers["transformer"].sites["model"]
    for i in range(8, STEPS):
        expected = plan.weights[0, i, 0] * calls[7][1] + plan.weights[0, i, 1] * calls[4][1]
        np.testing.assert_allclose(calls[i][1], expected, rtol=1e-4, atol=1e-5)


def test_a_guarded_output_that_became_an_anchor_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import site as decide

    keep = decide.store_output

    def keep_in_place_of_an_older_one(call: Any, site: str, inputs: Any, value: Any) -> None:
        keep(call, site, inputs, value)
        if call.step == 6:
            output = Output.of(value)
            call.state.store.put(call.key(site), 4, Anchor.of(output, (), signature(inputs.main)))

    monkeypatch.setattr(decide, "store_output", keep_in_place_of_an_older_one)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_a_guard_computes_where_the_input_has_moved_too_far_and_only_there()


def test_a_guard_compares_with_the_newest_planned_step() -> None:
    """Not with a step that it computed itself: the output there is no anchor."""
    pipe = shared("flux")
    limits = np.full(STEPS, HUGE)
    limits[8] = 0
    with denoised(pipe.transformer) as calls:
        played("flux", guarded(pipe, limits))
    moved = mean(calls[9][0] - calls[7][0]) / mean(calls[7][0])
    for factor, strip in ((1.01, "■■··■··■■···"), (0.99, "■■··■··■■■··")):
        limits[9] = factor * moved
        assert strips(played("flux", guarded(pipe, limits))[1], "model") == [strip]
