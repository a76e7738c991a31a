"""Schedules on other grids: the same decisions at the same times, as nearly as the grid allows, and a warning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from calibrated import calibration, calls
from documents import hold, mask
from hypothesis import given
from hypothesis import strategies as st

import diffcache
from diffcache import resampled
from diffcache.documents import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.errors import BadOption
from diffcache.planning.resampling import Resampled
from diffcache.profiling.fitting import psnr_db
from diffcache.profiling.recording import final_states

pytestmark = pytest.mark.fast


def made(text: str, **more: np.ndarray) -> CacheSchedule:
    plan = hold(text, **more)
    return CacheSchedule(
        steps=len(text),
        denoisers={"unet": DenoiserPlan(sites={"model": plan})},
        timesteps=np.linspace(1000, 1000 / len(text), len(text)),
    )


def model(document: CacheSchedule) -> SitePlan:
    return document.denoisers["unet"].sites["model"]


def grid(steps: int) -> np.ndarray:
    return np.linspace(1000, 1000 / steps, steps)


def test_on_its_own_grid_a_schedule_is_what_it_was() -> None:
    weights = np.zeros((1, 8, 2))
    weights[0, [2, 3, 5, 6, 7]] = [[1.5, -0.5], [2.0, -1.0], [1.2, -0.2], [1.4, -0.4], [1.6, -0.6]]
    plan = SitePlan(compute=mask("■■··■···"), weights=weights, scale=np.linspace(1, 2, 8)[None])
    own = dataclasses.replace(made("■■··■···"), denoisers={"unet": DenoiserPlan(sites={"model": plan})})
    with pytest.warns(Resampled, match="fitted for 8 steps is resampled to 8"):
        again = model(resampled(own, own.timesteps))
    assert np.array_equal(again.compute, plan.compute)
    assert again.weights == pytest.approx(plan.weights)
    assert again.scale is not None
    assert plan.scale is not None
    assert again.scale[0, ~plan.compute] == pytest.approx(plan.scale[0, ~plan.compute])


@given(st.lists(st.booleans(), min_size=2, max_size=20), st.integers(2, 30))
def test_computed_steps_keep_their_times(computed: list[bool], steps: int) -> None:
    text = "■" + "".join("■" if c else "·" for c in computed)
    with pytest.warns(Resampled):
        found = resampled(made(text), grid(steps))
    plan, old = model(found), model(made(text))
    assert found.steps == steps
    assert plan.compute[0]
    assert plan.compute.sum() <= old.compute.sum()
    if steps >= 2 * len(text):  # enough steps for each
        assert plan.compute.sum() == old.compute.sum()
        apart = np.abs(grid(steps)[plan.compute] - grid(len(text))[old.compute])
        assert apart.max() <= 1000 / steps + 1e-9
    predicted = ~plan.compute
    assert plan.weights[:, predicted].sum(-1) == pytest.approx(np.ones((1, predicted.sum())))  # reuse, or along a line


def test_weights_between_old_steps_are_interpolated() -> None:
    weights = np.zeros((1, 5, 2))
    weights[0, 2:, 0], weights[0, 2:, 1] = [2, 3, 4], [-1, -2, -3]
    plan = SitePlan(compute=mask("■■···"), weights=weights)
    own = dataclasses.replace(made("■■···"), denoisers={"unet": DenoiserPlan(sites={"model": plan})})
    with pytest.warns(Resampled):
        fine = model(resampled(own, np.linspace(1000, 100, 10)))  # every old time, and the ones halfway
    assert fine.compute.nonzero()[0].tolist() == [0, 2]
    assert fine.weights[0, 3:, 0] == pytest.approx([1.5, 2, 2.5, 3, 3.5, 4, 4], abs=0.3)


def test_a_resampled_schedule_runs_and_beats_reuse() -> None:
    calibrated = calibration("sd15_ddim")
    pipe = calibrated.pipe
    schedule = calibrated.schedule(4, time_limit_s=0)
    every = [call | {"num_inference_steps": 9} for call in calls("sd15_ddim", pipe)]
    full = final_states(pipe, every)
    pipe.scheduler.set_timesteps(9)
    with pytest.warns(Resampled):
        moved = resampled(schedule, pipe.scheduler.timesteps.numpy())
    name = next(iter(moved.denoisers))
    plan = moved.denoisers[name].sites["model"]
    reuse = DenoiserPlan(sites={"model": hold("".join("■" if c else "·" for c in plan.compute))})
    scores = []
    for document in (moved, CacheSchedule(steps=9, denoisers={name: reuse})):
        with diffcache.accelerated(pipe, document):
            ends = final_states(pipe, every)
            assert diffcache.report(pipe).computed == 4
        scores.append(float(torch.cat([psnr_db(a, b) for a, b in zip(ends, full, strict=True)]).mean()))
    assert scores[0] > scores[1]


def test_moved_levels_are_dropped() -> None:
    own = made("■··■")
    moved = dataclasses.replace(own, sigmas=np.array([1.0, 0.8, 0.4, 0.3, 0.0]))
    with pytest.warns(Resampled):
        assert resampled(moved, [9.0, 5.0, 1.0]) == resampled(own, [9.0, 5.0, 1.0])


def test_what_cannot_be_resampled_is_refused() -> None:
    own = made("■··■")
    with pytest.raises(BadOption, match="a grid that falls"):
        resampled(own, [1.0, 2.0])
    with pytest.raises(BadOption, match="a grid that falls"):
        resampled(own, [])
    with pytest.raises(BadOption, match="it has no timesteps"):
        resampled(dataclasses.replace(own, timesteps=None), [3.0, 2.0])
