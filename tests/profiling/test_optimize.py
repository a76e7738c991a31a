"""From calls to a schedule, on every tiny pipeline: it skips what it says, and ends where it was expected to end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import BATCH, CALLS, calibration, calls, final_states
from pipelines import STEPS, TINY, shared

import diffcache
from diffcache import optimize
from diffcache.documents import Budget, CacheSchedule, DenoiserPlan, SitePlan
from diffcache.errors import BadOption, ScheduleMismatch, UnknownName
from diffcache.profiling import Calibration
from diffcache.profiling.calibration import calibration as calibrating
from diffcache.profiling.calibration import search as searching
from diffcache.profiling.fitting import Fit, replayed_psnr_db
from diffcache.profiling.fitting.fit import ANCHORS, fit
from diffcache.profiling.fitting.promise import JUDGING_SHARE
from diffcache.profiling.replay.warp import Movable
from diffcache.schedulers.uniform import evenly

SEARCH = 0.1  # seconds; a search may only better what it starts from


def psnr(ends: torch.Tensor, full: torch.Tensor) -> list[float]:
    """In dB per sample; the peak is the range of the full run's sample."""
    pairs = zip(ends.double().flatten(1).numpy(), full.double().flatten(1).numpy(), strict=True)
    return [10 * np.log10(np.ptp(b) ** 2 / np.square(a - b).mean()) for a, b in pairs]


def tried_out(calibrated: Calibration, name: str, schedule: Any) -> tuple[list[float], diffcache.Report]:
    """How near the accelerated calls come to the recorded ones, and the report of the last."""
    pipe = calibrated.pipe
    diffcache.accelerate(pipe, schedule)
    try:
        ends = final_states(pipe, calls(name, pipe))
        report = diffcache.report(pipe)
    finally:
        diffcache.restore(pipe)
    found = []
    for end, trajectory in zip(ends, calibrated.trajectories, strict=True):
        full = trajectory.steps[-1].result
        assert full is not None
        count = len(full) // (calibrated.replays[0].batch_copies if calibrated.replays else 1)
        found += psnr(end[:count], full[:count])
    return found, report


def anew(name: str) -> Calibration:
    """The calibration of a pipeline, without what earlier budgets found."""
    known = calibration(name)
    return Calibration(known.pipe, known.trajectories)


def reuse(schedule: CacheSchedule) -> CacheSchedule:
    """The same computed steps, with plain reuse of the newest output in between."""

    def held(plan: SitePlan) -> SitePlan:
        return SitePlan(compute=plan.compute, weights=np.where(plan.compute, 0.0, 1.0)[None, :, None])

    plans = {
        name: DenoiserPlan(sites={site: held(plan) for site, plan in d.sites.items()})
        for name, d in schedule.denoisers.items()
    }
    return dataclasses.replace(schedule, denoisers=plans)


@pytest.mark.parametrize("name", TINY)
def test_a_schedule_for_every_pipeline(name: str, tmp_path: Path) -> None:
    calibrated, tiny = calibration(name), TINY[name]
    computed = max(2, tiny.steps // 2)
    made = calibrated.schedule(computed, time_limit_s=SEARCH)
    schedule = CacheSchedule.load(made.save(tmp_path / "schedule.safetensors"))
    assert schedule == made
    assert set(schedule.denoisers) == set(tiny.denoisers)
    assert schedule.steps == calibrated.start + tiny.steps
    assert schedule.computed_steps == computed
    errors, report = tried_out(calibrated, name, schedule)
    branches = 2 if tiny.guidance == "separate" else 1
    assert (report.computed, report.predicted) == (branches * computed, branches * (tiny.steps - computed))
    assert not any(row.failed_open for row in report.rows)
    assert len(errors) == CALLS * BATCH
    if calibrated.target == "state":
        # The replays end where the pipeline ends.
        plans = {d: p.sites["model"] for d, p in schedule.denoisers.items()}
        if len(plans) == 1:
            (plan,) = plans.values()
            start = calibrated.start
            scale = None if plan.scale is None else plan.scale[:, start:]
            replays = calibrated.replays
            if schedule.sigmas is not None:
                replays = [Movable(calibrated.pipe, replay).on(schedule.sigmas) for replay in replays]
            replayed = replayed_psnr_db(replays, plan.compute[start:], plan.weights[:, start:], scale)
            assert np.mean(errors) == pytest.approx(replayed.mean(), abs=0.02)
        assert schedule.expected is not None
        assert (schedule.expected.origin, schedule.expected.samples) == ("held-out", CALLS * BATCH // JUDGING_SHARE)
        even = calibrated.fitted(evenly(tiny.steps, computed, calibrated.replays[0].first_steps))
        held, _ = tried_out(calibrated, name, reuse(even))
        assert np.mean(errors) > np.mean(held) + 0.02
    else:
        assert schedule.provenance["fit_target_reason"] == calibrated.why_output
        assert min(errors) > 0


def test_optimize_is_record_and_schedule() -> None:
    pipe = shared("flux")
    made = optimize(pipe, calls("flux", pipe), 3, time_limit_s=0)
    assert made == anew("flux").schedule(3, time_limit_s=0)
    assert made.provenance["scheduler"] == "search"
    assert made.provenance["fit_target"] == "state"
    assert made.provenance["budget"] == "computed_steps 3"
    assert made.provenance["samples"] == str(CALLS * BATCH)
    assert "3 of 6 steps computed" in str(made)


@pytest.mark.parametrize("sites", ["model", "block"])
def test_progress_is_shown_where_it_is_asked_for(sites: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = shared("flux")
    options = {"sites": sites} | ({"time_limit_s": SEARCH} if sites == "model" else {})
    quiet = optimize(pipe, calls("flux", pipe), 5, **options)
    assert capfd.readouterr().err == ""
    shown = optimize(pipe, calls("flux", pipe), 5, progress=True, **options)
    bars = capfd.readouterr().err
    if sites == "model":
        assert f"{CALLS}/{CALLS}" in bars
        assert "5 steps" in bars
        assert shown.computed_steps == quiet.computed_steps
    else:
        assert "measure" in bars  # the plan of blocks follows measured times, which differ from run to run
        assert shown.denoisers["transformer"].sites.keys() == quiet.denoisers["transformer"].sites.keys()


def expected_db(schedule: CacheSchedule) -> float:
    assert schedule.expected is not None
    return schedule.expected.mean_db


def test_more_computed_steps_end_nearer() -> None:
    calibrated = anew("sd15_ddim")
    made = [calibrated.schedule(n, time_limit_s=0) for n in range(1, STEPS + 1)]
    scores = [np.mean(tried_out(calibrated, "sd15_ddim", schedule)[0]) for schedule in made]
    assert scores == sorted(scores)
    assert scores[-1] > 100
    assert expected_db(made[-1]) > 100


def scores_of(schedule: CacheSchedule) -> dict[int, float]:
    """Computed steps -> the score in dB that the front gives."""
    entries = [entry.split() for entry in schedule.provenance["front"].split(", ")]
    return {int(entry[0]): float("inf" if entry[2] == "exact" else entry[2]) for entry in entries}


@pytest.mark.parametrize("name", ["flux", "sd15_ddim", "chroma", "wan22"])
@pytest.mark.parametrize("limit", [0.0, 0.5, None])
def test_no_smaller_budget_of_the_front_is_better(name: str, limit: float | None) -> None:
    calibrated = anew(name)
    tried: list[Fit] = []
    for computed in (3, 4):
        made = calibrated.schedule(computed, time_limit_s=limit, tried=tried.append)
        front = scores_of(made)
        best = max(found.score for found in tried if found.compute.sum() <= computed and found.levels is None)
        assert max(v for n, v in front.items() if n <= made.computed_steps) == front[made.computed_steps]
        assert front[made.computed_steps] >= best - 0.06  # as printed


def test_a_limit_of_time_is_written_down_and_bounds_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock, with every fit taking a second of it."""
    now = [0.0]

    def slow(*args: Any, **options: Any) -> Fit:
        now[0] += 1
        return fit(*args, **options)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for module in (calibrating, searching):
        monkeypatch.setattr(module, "fit", slow)
    calibrated = anew("flux")
    most = 15.0
    made = calibrated.schedule(3, time_limit_s=most)
    assert now[0] <= most
    assert now[0] > most / 2  # it is made use of
    assert made.provenance["time_limit_s"] == "15"
    assert made.provenance["search"] == "cut short by the time limit"
    assert 2 <= int(made.provenance["fits"]) < most
    now[0] = 0.0
    least = anew("flux").schedule(3, time_limit_s=0)
    assert least.provenance["fits"] == "2"  # the even and the simulated mask
    unlimited = anew("flux").schedule(3)
    assert unlimited.provenance["time_limit_s"] == "none"
    assert unlimited.provenance["search"] == "converged"
    few = anew("flux").schedule(3, fits=4)
    assert few.provenance["search"] == "ended after 4 fits"


def test_a_limit_of_time_at_inner_sites_is_refused() -> None:
    pipe = shared("flux")
    with pytest.raises(BadOption, match=r"time_limit_s cannot be used: sites='block' needs no search"):
        optimize(pipe, calls("flux", pipe), 3, sites="block", time_limit_s=5)


def test_an_optimum_is_the_same_every_time_and_says_what_its_neighbours_gave() -> None:
    pipe = shared("flux")
    first, second = (optimize(pipe, calls("flux", pipe), 3) for _ in range(2))
    assert first == second
    front = scores_of(first)
    assert list(front) == [1, 2, 3, 4, 5]
    assert list(front.values()) == sorted(front.values())


def test_held_out_calls_have_no_say_in_the_coefficients() -> None:
    pipe = shared("flux")
    every = calls("flux", pipe)
    named = optimize(pipe, every[:1], 3, held_out=every[1:], time_limit_s=0)
    plan = named.denoisers["transformer"].sites["model"]
    step = int(np.flatnonzero(~plan.compute)[0])  # a scale per channel, which they may decide on, bends later ones
    alone, both = (fit(calibration("flux").replays[:n], plan.compute).weights for n in (1, 2))
    assert np.array_equal(plan.weights[:, step], alone[:, step])
    assert not np.allclose(plan.weights[:, step], both[:, step])
    assert named.expected is not None
    assert (named.expected.origin, named.expected.samples) == ("held-out", BATCH - BATCH // 2)


def test_samples_of_one_batch_are_split() -> None:
    """Some samples of a single call are kept apart."""
    pipe = shared("flux")
    one = calls("flux", pipe)[:1]
    made = optimize(pipe, one, 3, time_limit_s=0)
    assert made.expected is not None
    assert (made.expected.origin, made.expected.samples) == ("held-out", 1)
    single = TINY["flux"].call(pipe) | {"generator": torch.Generator().manual_seed(0)}
    alone = optimize(pipe, [single], 3, time_limit_s=0)
    assert alone.expected is not None
    assert (alone.expected.origin, alone.expected.samples) == ("calibration", 1)
    assert "how far others spread is not known" in str(alone.expected)


@pytest.mark.parametrize("name", ["flux", "dit", "sd15_ddim", "chroma"])
def test_a_part_of_a_batch_is_fitted_as_if_it_had_run_alone(name: str) -> None:
    """The samples of a batch are independent: fitted rows give the weights of a run of these rows, others change
    nothing, and each is scored as in the whole batch."""
    replay = calibration(name).replays[0]
    mask = evenly(len(replay.steps), 3, replay.first_steps)
    first, second = replay.part(np.array([0])), replay.part(np.array([1]))
    found = fit([first], mask, held=[second])
    other = fit([second], mask, held=[first])
    assert (found.error_db.shape, found.held_db.shape) == ((1,), (1,))
    assert not np.allclose(found.weights, other.weights)
    whole = replayed_psnr_db([replay], mask, found.weights)
    assert np.concatenate([found.error_db, found.held_db]) == pytest.approx(whole, abs=1e-6)
    assert found.error_db[0] > other.held_db[0]  # each weight set suits its own sample best
    assert other.error_db[0] > found.held_db[0]


def test_what_is_promised_of_a_format_counts_what_it_costs() -> None:
    pipe, calibrated = shared("flux"), calibration("flux")
    every = calls("flux", pipe)
    exact, coarse = (optimize(pipe, every, 3, store=store, time_limit_s=0) for store in (None, "int4"))
    seen = [np.mean(tried_out(calibrated, "flux", schedule)[0]) for schedule in (coarse.stored("exact"), coarse)]
    kept = anew("flux").schedule(3, time_limit_s=0, store="int4")
    assert expected_db(kept) - expected_db(coarse) == pytest.approx(seen[0] - seen[1], abs=1e-3)
    assert expected_db(coarse) < expected_db(exact) - 0.1
    assert coarse.stored("int4") == coarse
    assert coarse.stored("int8").expected is None


def test_a_budget_of_fidelity_takes_the_fewest_steps_that_reach_it() -> None:
    calibrated = calibration("sd15_ddim")
    found = calibrated.schedule(Budget(min_psnr_db=30))
    assert scores_of(found)[found.computed_steps] >= 30
    fewer = calibrated.schedule(found.computed_steps - 1)
    assert scores_of(fewer)[fewer.computed_steps] < 31  # what the search adds to the simulated mask
    hurried = anew("sd15_ddim").schedule(Budget(min_psnr_db=30), time_limit_s=0)
    assert hurried.computed_steps == STEPS  # there was no time to find out that fewer do
    with pytest.raises(
        BadOption, match=r"min_psnr_db=300 .* Allowed: up to \d+\.\d( \(exact\))?, with every step computed"
    ):
        calibrated.schedule(Budget(min_psnr_db=300))


def test_a_budget_of_memory_limits_the_outputs_kept() -> None:
    calibrated = calibration("flux")
    one = sum(t.numel() * t.element_size() for t in calibrated.trajectories[0].steps[0].calls[0].outputs)
    found = calibrated.schedule(Budget(computed_steps=4, memory_bytes=2 * one + 1), time_limit_s=0)
    plan = found.denoisers["transformer"].sites["model"]
    assert plan.weights.shape[2] == 2
    with pytest.raises(BadOption, match=f"memory_bytes=3 .* Allowed: {one} or more"):
        calibrated.schedule(Budget(computed_steps=4, memory_bytes=3))


def test_the_mask_of_another_scheduler_is_fitted() -> None:
    calibrated = calibration("flux")
    made = calibrated.schedule(3, scheduler="uniform")
    plan = made.denoisers["transformer"].sites["model"]
    assert plan.compute.tolist() == evenly(6, 3).tolist()
    assert made.provenance["scheduler"] == "mask of uniform"
    even = calibrated.fitted(evenly(6, 3), per_channel=plan.scale is not None)
    assert np.array_equal(plan.weights, even.denoisers["transformer"].sites["model"].weights)
    with pytest.raises(UnknownName, match="no scheduler called 'unheard'"):
        calibrated.schedule(3, scheduler="unheard")


def test_a_schedule_serves_calls_it_was_not_fitted_on() -> None:
    calibrated = calibration("sd15_ddim")
    schedule = calibrated.schedule(3, time_limit_s=0)
    pipe = calibrated.pipe
    held_out = [TINY["sd15_ddim"].call(pipe) | {"generator": torch.Generator().manual_seed(99)}]
    (full,) = final_states(pipe, held_out)
    ends = []
    for how in (schedule, reuse(schedule)):
        held_out[0]["generator"].manual_seed(99)
        with diffcache.accelerated(pipe, how):
            ends += final_states(pipe, held_out)
    assert psnr(ends[0], full)[0] > psnr(ends[1], full)[0] + 3


def test_a_late_start_pads_the_schedule() -> None:
    plan = calibration("flux_img2img").schedule(2, time_limit_s=0).denoisers["transformer"].sites["model"]
    assert plan.compute[:3].tolist() == [True, True, True]
    assert plan.compute.sum() == 2 + 2
    assert not plan.weights[:, :3].any()


def test_two_denoisers_have_a_plan_each() -> None:
    calibrated = calibration("wan22")
    begin = calibrated.replays[0].first_steps[1]
    schedule = calibrated.schedule(4, time_limit_s=0)
    first, second = (schedule.denoisers[name].sites["model"] for name in ("transformer", "transformer_2"))
    assert first.compute[0]
    assert not first.compute[begin:].any()
    assert second.compute[begin]
    assert not second.compute[1:begin].any()
    assert first.compute[:begin].sum() + second.compute[begin:].sum() == schedule.computed_steps == 4
    assert not second.weights[:, begin + 1, 1:].any()  # an output of the other denoiser is not an anchor


def test_a_mask_of_ones_own_is_fitted() -> None:
    calibrated = calibration("chroma")
    compute = np.array([True, True, False, False, True, False])
    schedule = calibrated.fitted(compute)
    plan = schedule.denoisers["transformer"].sites["model"]
    assert plan.compute.tolist() == compute.tolist()
    assert plan.weights.shape == (2, 6, ANCHORS)
    together = calibrated.fitted(compute, per_branch=False).denoisers["transformer"].sites["model"]
    assert together.weights.shape == (1, 6, ANCHORS)
    with pytest.raises(BadOption, match="one entry for each of the loop's 6 steps"):
        calibrated.fitted(compute[:5])
    with pytest.raises(ScheduleMismatch, match=r"cannot be replayed: .*carries tensors"):
        calibration("cogvideox_dpm").fitted(compute)


def test_every_fit_that_was_tried_is_shown() -> None:
    tried: list[Fit] = []
    calibration("flux").schedule(3, time_limit_s=SEARCH, tried=tried.append)
    assert len(tried) > 1
    assert {int(f.compute.sum()) for f in tried} <= {1, 2, 3, 4, 5}
    tried.clear()
    anew("flux").schedule(3, tried=tried.append)
    assert {int(f.compute.sum()) for f in tried} == {1, 2, 3, 4, 5}  # budgets nearby are looked at, in the end


def test_calls_that_no_one_schedule_could_serve_are_refused() -> None:
    pipe = shared("flux_true_cfg")
    call = TINY["flux_true_cfg"].call(pipe)
    with pytest.raises(BadOption, match="calls that all take the same steps"):
        Calibration.record(pipe, [call, call | {"num_inference_steps": 4}])
    with pytest.raises(BadOption, match="they use several kinds of guidance"):
        Calibration.record(pipe, [call, call | {"true_cfg_scale": 1.0}])


def test_what_differs_from_call_to_call_is_not_in_the_schedule() -> None:
    pipe = shared("chroma")
    one = TINY["chroma"].call(pipe)
    both = Calibration.record(pipe, [one, one | {"guidance_scale": 3.0, "height": 48}])
    schedule = both.schedule(3, time_limit_s=0)
    assert schedule.guidance is not None
    assert "guidance_scale" not in schedule.guidance.scales
    assert np.array(both.replays[1].guidance) == pytest.approx(np.tile([3, -2], (STEPS, 1)), abs=2e-4)
    flux = shared("flux")
    small = TINY["flux"].call(flux)
    sizes = Calibration.record(flux, [small, small | {"height": 2 * small["height"]}])
    assert sizes.target == "state"
    assert (sizes.schedule(3, time_limit_s=0).timesteps is None) == (
        not torch.equal(sizes.trajectories[0].timesteps, sizes.trajectories[1].timesteps)
    )
    assert calibration("flux").schedule(3, time_limit_s=0).timesteps is not None


def test_branches_that_differ_in_their_input_share_coefficients() -> None:
    """The executor could not distinguish such a batch from one without guidance."""
    pipe = shared("sd3")
    call = TINY["sd3"].call(pipe) | {"generator": torch.Generator().manual_seed(0)}
    calibrated = Calibration.record(pipe, [call])
    assert calibrated.guidance is not None
    for one in calibrated.replays:
        for step in one.steps:
            x = step.calls[0].input.clone()
            x[0] *= 1 + 1e-6  # within the tolerance of a replay
            step.calls[0].kwargs = step.calls[0].kwargs | {"hidden_states": x}
    changed = Calibration(pipe, calibrated.trajectories)
    assert changed.target == "state"
    assert changed.guidance is None
    assert len(changed.schedule(3, time_limit_s=0).denoisers["transformer"].sites["model"].weights) == 1


def test_an_output_fit_is_least_squares_on_the_full_run() -> None:
    calibrated = calibration("cogvideox_dpm")
    plan = calibrated.schedule(3, time_limit_s=0).denoisers["transformer"].sites["model"]
    steps = [t.steps for t in calibrated.trajectories]
    for i in np.flatnonzero(~plan.compute):
        anchors = np.flatnonzero(plan.compute[:i])[::-1][:3]

        def column(step: int) -> np.ndarray:
            return np.concatenate([c.output.flatten().double().numpy() for s in steps for c in s[step].calls])

        table, target = np.stack([column(a) for a in anchors], 1), column(int(i))
        best, *_ = np.linalg.lstsq(table, target, rcond=None)
        ours = plan.weights[0, i, : len(anchors)]
        assert np.linalg.norm(table @ (ours - best)) < 1e-3 * np.linalg.norm(table @ best)
        assert np.linalg.norm(table @ (1.01 * ours - best)) > 1e-3 * np.linalg.norm(table @ best)
