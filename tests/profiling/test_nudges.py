"""Noise levels of a loop's own: a replay on them is the pipeline's run over them; the search moves what pays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import calibration, calls, final_states
from pipelines import fresh, with_scheduler

from diffcache import accelerated
from diffcache.host import CannotFollow
from diffcache.profiling.calibration.search import NUDGE, Search
from diffcache.profiling.calibration.strategy import DEFAULT, Strategy
from diffcache.profiling.fitting import Fit, psnr_db, replayed_psnr_db
from diffcache.profiling.fitting.fit import fit
from diffcache.profiling.replay.warp import Movable, warped
from diffcache.schedulers.uniform import evenly

# Euler, second-order multistep, on tables of training steps and without; a ControlNet, which also receives the time
# as the denoiser; true guidance; a time that runs the other way.
MOVED = [
    *(("flux", ""), ("flux", "dpmpp_2m"), ("flux", "unipc"), ("sd3", ""), ("flux_controlnet", ""), ("chroma", "")),
    *(("sdxl", "euler"), ("sdxl", "dpmpp_2m"), ("dit", "dpmpp_2m"), ("wan", ""), ("lumina2", "")),
]
moved = pytest.mark.parametrize(("name", "scheduler"), MOVED, ids=lambda value: value or "own")


def levels_of(name: str, scheduler: str, shift: float = 0.4) -> tuple[list[Movable], np.ndarray, np.ndarray]:
    """(replays that can move, a mask, levels with its second computed step moved by ``shift`` of a step)."""
    made = calibration(name, scheduler)
    everyone = [Movable(made.pipe, replay) for replay in made.replays]
    compute = evenly(len(made.replays[0].steps), 3)
    places = np.flatnonzero(compute).astype(float)
    places[1] += shift
    return everyone, compute, warped(everyone[0].levels, compute, places)


@moved
def test_a_replay_on_other_levels_ends_where_the_pipeline_ends(name: str, scheduler: str) -> None:
    made = calibration(name, scheduler)
    everyone, compute, levels = levels_of(name, scheduler)
    found = fit([m.on(levels) for m in everyone], compute, levels=levels)
    there = dataclasses.replace(made.fitted(compute), sigmas=levels)
    plans = {
        d: dataclasses.replace(plan, sites={"model": dataclasses.replace(plan.sites["model"], weights=found.weights)})
        for d, plan in there.denoisers.items()
    }
    pipe = fresh(name)
    if scheduler:
        with_scheduler(pipe, scheduler)
    with accelerated(pipe, dataclasses.replace(there, denoisers=plans)):
        ends = final_states(pipe, calls(name, pipe))
    last = len(compute) - 1
    once = [r.reference(last)[: len(r.reference(last)) // r.batch_copies] for r in made.replays]
    errors = torch.cat([psnr_db(a[: len(b)], b) for a, b in zip(ends, once, strict=True)]).numpy()
    assert errors == pytest.approx(found.error_db, abs=0.05)
    stays = replayed_psnr_db(made.replays, compute, found.weights)
    assert np.abs(stays - found.error_db).max() > 0.05  # the levels make a difference


@moved
def test_on_its_own_levels_a_replay_is_as_it_was(name: str, scheduler: str) -> None:
    everyone, compute, _ = levels_of(name, scheduler)
    as_it_was = fit([m.replay for m in everyone], compute)
    again = fit([m.on(m.levels) for m in everyone], compute, levels=everyone[0].levels)
    assert again.error_db == pytest.approx(as_it_was.error_db, abs=1e-3)


def test_the_reference_between_two_levels_lies_between_their_states() -> None:
    movable = Movable(calibration("flux").pipe, calibration("flux").replays[0])
    levels = movable.levels.copy()
    levels[2] = 0.75 * levels[2] + 0.25 * levels[3]
    there, own = movable.on(levels), movable.replay
    assert torch.equal(there.reference(0), own.reference(0))
    assert torch.allclose(there.reference(1), 0.75 * own.reference(1) + 0.25 * own.reference(2), atol=1e-6)
    assert torch.equal(there.reference(5), own.reference(5))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 2, 4], [6, 5, 4, 3, 2, 1, 0]),
        ([0, 2.5, 4], [6, 4.75, 3.5, 2.75, 2, 1, 0]),
        ([0, 2, 3.5], [6, 5, 4, 3.25, 2.5, 1.25, 0]),
    ],
)
def test_levels_between_computed_steps_move_along(places: list[float], expected: list[float]) -> None:
    compute = np.array([True, False, True, False, True, False])
    assert warped(np.arange(6.0, -1, -1), compute, np.array(places)).tolist() == expected


@pytest.mark.parametrize("first", [2, 3, 5])
def test_a_run_taken_over_is_the_run_from_the_start(first: int) -> None:
    everyone, compute, _ = levels_of("flux", "dpmpp_2m")
    own = everyone[0].levels
    before = fit([m.on(own) for m in everyone], compute, levels=own)
    levels = own.copy()
    levels[first] = (own[first] + own[first + 1]) / 2
    there = [m.on(levels) for m in everyone]
    whole = fit(there, compute, levels=levels)
    resumed = fit(there, compute, levels=levels, resume=before)
    assert np.array_equal(resumed.weights, whole.weights)
    assert np.array_equal(resumed.error_db, whole.error_db)
    assert not np.array_equal(whole.error_db, before.error_db)
    assert resumed.checkpoints[first - 2] is before.checkpoints[first - 2]


@functools.cache
def nudged(name: str) -> tuple[Fit, Fit, list[Fit]]:
    """The fit of an even mask, what nudges made of it, and all they tried."""
    made, tried = calibration(name), list[Fit]()
    seeker = Search(made.replays[:1], made.replays[1:])
    best = seeker.evaluate(evenly(len(made.replays[0].steps), 3))
    seeker.tried = tried.append
    return best, seeker.nudged(made.pipe, best), tried


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_nudges_keep_the_mask_and_what_they_accept_is_better(name: str) -> None:
    before, after, tried = nudged(name)
    assert np.array_equal(after.compute, before.compute)
    assert after is before or (after.beats(before, DEFAULT.nudge_gain_db) and any(after is one for one in tried))
    own = Movable(calibration(name).pipe, calibration(name).replays[0]).levels
    for one in tried:
        assert one.levels is not None
        assert (np.diff(one.levels) < 0).all()
        assert one.levels[[0, -1]] == pytest.approx(own[[0, -1]])


def test_some_nudge_pays() -> None:
    assert any(nudged(name)[1].levels is not None for name in ("flux", "sd3", "chroma"))
    assert NUDGE < 1


def test_nudges_end_in_time() -> None:
    made = calibration("flux")
    seeker = Search(made.replays)
    best = seeker.evaluate(evenly(6, 3))
    assert seeker.nudged(made.pipe, best, until=0) is best
    assert seeker.nudged(made.pipe, best, fits=0) is best


@pytest.mark.parametrize(
    ("name", "scheduler", "why"),
    [
        ("dit", "", "does not have one noise level per step"),  # DDIM
        ("sd3_heun", "", "more than once"),
        ("sdxl_img2img", "", "starts at step"),
    ],
)
def test_a_loop_bound_to_its_levels_says_so(name: str, scheduler: str, why: str) -> None:
    made = calibration(name, scheduler)
    with pytest.raises(CannotFollow, match=why):
        Search(made.replays).nudged(made.pipe, Search(made.replays).evaluate(evenly(len(made.replays[0].steps), 3)))


def test_a_number_that_is_not_the_time_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibration("flux")
    calls_ = [step.calls[0] for step in made.replays[0].steps]
    for i, call in enumerate(calls_):
        monkeypatch.setattr(call, "kwargs", {**call.kwargs, "extra": float(i % 2)})
    with pytest.raises(CannotFollow, match="changes with the step number and not with the timestep"):
        Movable(made.pipe, made.replays[0])
    for call in calls_:
        monkeypatch.setattr(call, "kwargs", {**call.kwargs, "extra": 1.0, "timestep": torch.ones(2)})
    with pytest.raises(CannotFollow, match="is not known"):
        Movable(made.pipe, made.replays[0])


@pytest.mark.parametrize(("least", "kept"), [(-100.0, True), (100.0, False)])
def test_moved_levels_are_kept_where_they_pay(monkeypatch: pytest.MonkeyPatch, least: float, kept: bool) -> None:
    made: Any = calibration.__wrapped__("flux_control")  # its own: a calibration remembers the plans it has found
    monkeypatch.setattr(made, "strategy", Strategy(levels_gain_db=least))
    schedule = made.schedule(3)
    assert (schedule.sigmas is not None) is kept
    assert schedule.provenance.get("levels") == ("moved" if kept else None)
