"""Step and branch of each forward, in pipelines of all kinds.

The naive loop of `probes` counts denoiser calls of one known pipeline and knows nothing else: where our output has the
same bits, every forward was taken for the step and branch that it is.
"""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import SCHEDULERS, TINY, fresh, run, shared, watch, with_scheduler
from probes import BRANCHES, bound, hold, leaf_calls, naive_reuse, ours
from torch import Tensor

from diffcache import CacheSchedule, accelerate, accelerated, report, restore
from diffcache import host as hosting
from diffcache.documents import DenoiserPlan, Guidance
from diffcache.errors import ScheduleMismatch
from diffcache.executor import FailedOpen, wrappers
from diffcache.host.kinds import pipeline

SWAPS = [(name, scheduler) for name in ("sd3", "flux", "wan", "sd15", "ddpm") for scheduler in SCHEDULERS[name]]
SEPARATE = Guidance(mode="separate", branches=2)
BATCHED = Guidance(mode="batched", branches=2)
NONE = Guidance(mode="none", branches=1)


def assert_like_the_naive_loop(pipe: Any, name: str, every: int = 2, **over: Any) -> None:
    tiny, call = TINY[name], {**TINY[name].call(pipe), **over}
    with naive_reuse(pipe, tiny.denoisers, BRANCHES[tiny.guidance], every):
        expected = run(pipe, call)
    with accelerated(pipe, f"uniform:every={every}"):
        assert torch.equal(run(pipe, call), expected)
        assert report(pipe).predicted > 0
    assert not torch.equal(run(pipe, call), expected)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- noise schedulers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheduler"), SWAPS)
def test_every_noise_scheduler_is_followed_step_by_step(name: str, scheduler: str) -> None:
    assert_like_the_naive_loop(with_scheduler(fresh(name), scheduler), name)


def test_a_second_order_noise_scheduler_counts_both_its_evaluations() -> None:
    pipe = shared("sd3_heun")
    with accelerated(pipe, "uniform:every=3"):
        run(pipe, TINY["sd3_heun"].call(pipe))
        assert (report(pipe).computed, report(pipe).predicted) == (4, 7)  # 11 evaluations: 0, 3, 6, 9 computed


def test_under_a_rule_the_noise_scheduler_may_be_swapped_between_runs() -> None:
    pipe = fresh("sd15")
    plain = run(pipe, TINY["sd15"].call(pipe))
    first = pipe.scheduler
    with accelerated(pipe, "uniform:every=2"):
        fast = run(pipe, TINY["sd15"].call(pipe))
        with_scheduler(pipe, "ddim")
        run(pipe, TINY["sd15"].call(pipe))
        assert (report(pipe).computed, report(pipe).predicted) == (3, 3)
        pipe.scheduler = first
        assert torch.equal(run(pipe, TINY["sd15"].call(pipe)), fast)
        assert (report(pipe).computed, report(pipe).predicted) == (4, 3)
    assert torch.equal(run(pipe, TINY["sd15"].call(pipe)), plain)


# --- late starts and early ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_img2img", "flux_inpaint", "sdxl_img2img"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_late_start_begins_with_a_computed_step(name: str, strength: float) -> None:
    pipe = shared(name)
    over = {"strength": strength, "num_inference_steps": 10}
    assert_like_the_naive_loop(pipe, name, **over)
    with accelerated(pipe, "uniform:every=2"), watch(pipe, TINY[name].denoisers) as calls:
        run(pipe, TINY[name].call(pipe), **over)
        assert report(pipe).computed == (len(calls) + 1) // 2


@pytest.mark.parametrize("scheduler", SCHEDULERS["sdxl_img2img"])
def test_a_late_start_is_seen_with_noise_schedulers_that_do_not_record_it(scheduler: str) -> None:
    pipe = with_scheduler(fresh("sdxl_img2img"), scheduler)
    started = []

    def look(pipe: Any, _step: int, _timestep: Tensor, _inputs: Any) -> dict[str, Any]:
        started.append(vars(pipe)["_diffcache"].executor.host.run.start)
        return {}

    with accelerated(pipe, "uniform:every=2"), watch(pipe, ["unet"]) as calls:
        run(pipe, TINY["sdxl_img2img"].call(pipe), num_inference_steps=10, callback_on_step_end=look)
        timesteps = pipe.scheduler.timesteps
        assert calls[0].timestep == timesteps[started[0]]


@pytest.mark.parametrize("every", [2, 3])
def test_a_schedule_that_leaves_out_the_first_step_of_a_late_start_computes_it(every: int) -> None:
    """The schedule was made for the whole loop; the run enters it at step 2, where nothing is kept yet."""
    name, pipe = "flux_img2img", fresh("flux_img2img")
    schedule = bound(pipe, hold([i % every == 0 for i in range(6)]))
    with accelerated(pipe, schedule):
        if every == 2:  # step 2 is computed: all is well
            run(pipe, TINY[name].call(pipe))
            assert (report(pipe).computed, report(pipe).predicted) == (2, 2)
            return
        with pytest.warns(FailedOpen, match="1 predictions were computed in full instead: an anchor is missing"):
            run(pipe, TINY[name].call(pipe))
        assert (report(pipe).computed, report(pipe).predicted) == (2, 2)
        assert [sum(row.failed_open.values()) for row in report(pipe).rows] == [1]


@pytest.mark.parametrize(("scheduler", "predicted"), [("euler", [1, 3, 5]), ("ddim", [4, 6])])
def test_a_loop_that_ends_early_is_right_at_every_step(scheduler: str, predicted: list[int]) -> None:
    """SDXL stops at `denoising_end`. DDIM does not record a start, so the short progress bar looks like a late start
    at step 3: what comes before is computed, and nothing kept under a wrong number is used."""
    pipe, tiny = with_scheduler(fresh("sdxl"), scheduler), TINY["sdxl"]
    over = {"denoising_end": 0.7, "num_inference_steps": 10}
    plain = run(pipe, tiny.call(pipe), **over)
    with accelerated(pipe, "full"):
        assert torch.equal(run(pipe, tiny.call(pipe), **over), plain)
    with accelerated(pipe, "uniform:every=2"), watch(pipe, tiny.denoisers) as calls:
        run(pipe, tiny.call(pipe), **over)
    steps = [pipe.scheduler.timesteps.tolist().index(call.timestep) for call in calls]
    assert steps == list(range(7))
    same = [i for i in steps[1:] if torch.equal(calls[i].output, calls[i - 1].output)]
    assert same == predicted


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_true_cfg", "chroma", "qwen_image", "lumina2", "wan", "hunyuan_video_true_cfg"])
def test_branches_in_separate_calls_have_separate_anchors(name: str) -> None:
    pipe = shared(name)
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, TINY[name].call(pipe))
        rows = report(pipe).rows
    assert [(row.branch, row.computed, row.predicted) for row in rows] == [(0, 3, 3), (1, 3, 3)]


@pytest.mark.parametrize("name", ["sd3", "sana", "ltx", "sd15_ddim", "z_image"])
def test_branches_in_one_batch_are_one_call(name: str) -> None:
    pipe = shared(name)
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, TINY[name].call(pipe))
        rows = report(pipe).rows
    assert [(row.branch, row.computed, row.predicted) for row in rows] == [(0, 3, 3)]


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *((name, SEPARATE) for name in ("flux_true_cfg", "wan")),
        *((name, BATCHED) for name in ("sd3", "dit", "z_image", "ltx2", "sd15_controlnet")),
        ("flux", NONE),
    ],
)
def test_each_branch_is_predicted_with_its_own_coefficients(name: str, guidance: Guidance) -> None:
    """Equal rows of coefficients for all branches are the same as one row; other rows are not."""
    pipe, call = fresh(name), TINY[name].call(shared(name))
    mask = [i % 2 == 0 for i in range(6)]
    with accelerated(pipe, bound(pipe, hold(mask), guidance=guidance)):
        expected = run(pipe, call)
    with accelerated(pipe, bound(pipe, hold(mask, guidance.branches), guidance=guidance)):
        assert torch.equal(run(pipe, call), expected)
    results = []
    for b in range(guidance.branches):
        scale = np.ones((guidance.branches, 6))
        scale[b] = 1.05
        with accelerated(pipe, bound(pipe, hold(mask, guidance.branches, scale=scale), guidance=guidance)):
            results.append(run(pipe, call))
            assert report(pipe).predicted == 3 * (2 if guidance.mode == "separate" else 1)
    assert not any(torch.equal(result, expected) for result in results)
    assert guidance.branches == 1 or not torch.equal(*results)


GUIDED = {"flux_true_cfg": {"true_cfg_scale": 1.0}, "wan": {"guidance_scale": 1.0}}
BATCH_GUIDED = {"sd3": {"guidance_scale": 1.0}, "sd15_ddim": {"guidance_scale": 1.0}, "dit": {"guidance_scale": 1.0}}
ASKS_FOR_2 = r"fitted for 2 calls of 'transformer' at each step \(guidance 'separate'\); this run makes 1"
ASKS_FOR_1 = r"fitted for 1 calls of 'transformer' at each step \(guidance 'none'\); this run makes 2"


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_turned_off_is_refused_by_a_schedule_for_two_calls(name: str) -> None:
    pipe, call = fresh(name), TINY[name].call(shared(name))
    with accelerated(pipe, bound(pipe, hold("#.#.#.", 2), guidance=SEPARATE)):
        fast = run(pipe, call)
        with pytest.raises(ScheduleMismatch, match=ASKS_FOR_2):
            run(pipe, {**call, **GUIDED[name]})
        assert torch.equal(run(pipe, call), fast)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_turned_on_is_refused_by_a_schedule_for_one_call(name: str) -> None:
    pipe, call = fresh(name), TINY[name].call(shared(name))
    with accelerated(pipe, bound(pipe, hold("#.#.#."), guidance=NONE)):
        fast = run(pipe, {**call, **GUIDED[name]})
        with pytest.raises(ScheduleMismatch, match=ASKS_FOR_1):
            run(pipe, call)
        assert torch.equal(run(pipe, {**call, **GUIDED[name]}), fast)


@pytest.mark.parametrize("name", BATCH_GUIDED)
def test_guidance_turned_off_is_refused_by_a_schedule_for_one_batch_before_anything_is_computed(name: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    call = tiny.call(pipe)
    with accelerated(pipe, bound(pipe, hold("#.#.#.", 2), guidance=BATCHED)):
        fast = run(pipe, call)
        for batch in (1, 2):
            with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match="2 branches in one"):
                run(pipe, {**tiny.call(pipe, batch=batch), **BATCH_GUIDED[name]}, seed=list(range(batch)))
            assert not calls
        assert torch.equal(run(pipe, call), fast)


@pytest.mark.parametrize("name", ["sd3", "sd15_ddim"])
def test_guidance_turned_on_in_one_batch_is_refused_by_a_schedule_without(name: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    call = {**tiny.call(pipe), **BATCH_GUIDED[name]}
    with accelerated(pipe, bound(pipe, hold("#.#.#."), guidance=NONE)):
        fast = run(pipe, call)
        with (
            leaf_calls(pipe, tiny.denoisers) as calls,
            pytest.raises(ScheduleMismatch, match="fitted without guidance"),
        ):
            run(pipe, tiny.call(pipe))
        assert not calls
        same_noise = {**tiny.call(pipe, batch=2), **BATCH_GUIDED[name]}
        run(pipe, same_noise, seed=[5, 5])  # a batch that happens to repeat itself is not guidance
        assert torch.equal(run(pipe, call), fast)


CALLS_CHANGE = {
    "sd3": {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.8},
    "lumina2": {"cfg_trunc_ratio": 0.5},
    "z_image": {"cfg_truncation": 0.5},
    "ltx2": {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]},
}


@pytest.mark.parametrize("name", CALLS_CHANGE)
@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")
def test_calls_that_come_and_go_within_a_run_keep_their_own_anchors(name: str) -> None:
    """Guidance by skipped layers adds a call at some steps, truncated guidance drops one, or half of the batch."""
    pipe, tiny = shared(name), TINY[name]
    call = {**tiny.call(pipe), **CALLS_CHANGE[name]}
    with watch(pipe, tiny.denoisers) as calls:
        plain = run(pipe, call)
    kinds = {(c.batch, tuple(c.output.shape)) for c in calls}
    assert len(kinds) > 1 or len(calls) % tiny.steps
    with accelerated(pipe, "full"):
        assert torch.equal(run(pipe, call), plain)
    with accelerated(pipe, "uniform:every=2"):
        assert bool(run(pipe, call).isfinite().all())
        rows = report(pipe).rows
    assert sum(row.predicted for row in rows) > 0
    assert sum(row.computed + row.predicted + sum(row.failed_open.values()) for row in rows) == len(calls)


# --- several denoisers -----------------------------------------------------------------------------------------------


def test_each_of_two_denoisers_has_its_own_anchors_and_the_loop_one_step_count() -> None:
    """Wan 2.2: `transformer` runs steps 0 and 1, `transformer_2` the rest; step 2 cannot reuse the output of step 1."""
    pipe = shared("wan22")
    with watch(pipe, TINY["wan22"].denoisers) as calls:
        run(pipe, TINY["wan22"].call(pipe))
    high = sum(call.component == "transformer" for call in calls) // 2
    assert 0 < high < 6
    with accelerated(pipe, "uniform:every=6"):
        with pytest.warns(FailedOpen, match="another denoiser"):
            run(pipe, TINY["wan22"].call(pipe))
        rows = {(row.denoiser, row.branch): row for row in report(pipe).rows}
    for branch in (0, 1):
        first, second = rows["transformer", branch], rows["transformer_2", branch]
        assert (first.computed, first.predicted, sum(first.failed_open.values())) == (1, high - 1, 0)
        assert (second.computed, second.predicted, sum(second.failed_open.values())) == (0, 0, 6 - high)


def test_a_schedule_for_one_of_two_denoisers_leaves_the_other_alone() -> None:
    pipe = shared("wan22")
    plan = DenoiserPlan(sites={"model": hold("#..#.#")})  # this one takes over at step 3
    schedule = CacheSchedule(steps=6, denoisers={"transformer_2": plan})
    with accelerated(pipe, schedule), leaf_calls(pipe, ["transformer"]) as accelerated_calls:
        run(pipe, TINY["wan22"].call(pipe))
        rows = {(row.denoiser, row.branch): (row.computed, row.predicted) for row in report(pipe).rows}
    with leaf_calls(pipe, ["transformer"]) as untouched_calls:
        run(pipe, TINY["wan22"].call(pipe))
    assert accelerated_calls == untouched_calls
    assert rows["transformer", 0] == rows["transformer", 1] == (3, 0)
    assert rows["transformer_2", 0] == rows["transformer_2", 1] == (2, 1)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_with_pipelines_that_share_a_denoiser_do_not_meet() -> None:
    one = fresh("flux_true_cfg")
    other = quiet(type(one)(**{**one.components, "scheduler": copy.deepcopy(one.scheduler)}))
    call = TINY["flux_true_cfg"].call(one)
    specs = {one: "uniform:every=2", other: "taylorseer:every=3,sites=block"}
    alone = {}
    for pipe, spec in specs.items():
        with accelerated(pipe, spec):
            alone[pipe] = [run_unforked(pipe, call, seed) for seed in range(4)]
    for pipe, spec in specs.items():
        accelerate(pipe, spec)
    together: dict[Any, list[Tensor]] = {one: [], other: []}
    failed: list[Exception] = []
    meet = threading.Barrier(2, timeout=60)

    def work(pipe: Any) -> None:
        try:
            for seed in range(4):
                meet.wait()
                together[pipe].append(run_unforked(pipe, call, seed))
        except Exception as error:
            failed.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(pipe,)) for pipe in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for pipe in specs:
        assert all(map(torch.equal, together[pipe], alone[pipe]))
        assert report(pipe).runs == 4
        restore(pipe)
    assert not torch.equal(together[one][0], together[other][0])
    assert ours(one) == ours(other) == []


def run_unforked(pipe: Any, call: dict[str, Any], seed: int) -> Tensor:
    """Without touching the process's random state, which threads would share. Gradients are a thread's own setting."""
    with torch.no_grad():
        return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(seed)).images)


# --- the comparisons can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd3_heun"])
def test_a_loop_read_one_step_off_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting.loop_run, "position", lambda timestep, timesteps: None)
    assert_like_the_naive_loop(shared(name), name)  # without addresses, counting is right here too
    done = hosting.LoopRun.step_done
    skip = iter([False, True] + [False] * 20)

    def lose_one(self: Any, timestep: Any) -> None:
        if not next(skip):
            done(self, timestep)

    monkeypatch.setattr(hosting.LoopRun, "step_done", lose_one)
    monkeypatch.setattr(hosting.LoopRun, "bar_moved", lambda self: None)
    with pytest.raises((AssertionError, FailedOpen)):
        assert_like_the_naive_loop(shared(name), name)


def test_a_late_start_taken_for_an_early_one_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "start_of", lambda scheduler, total: 0)
    with pytest.raises((AssertionError, FailedOpen)):
        test_a_late_start_begins_with_a_computed_step("sdxl_img2img", 0.3)


def test_a_run_seen_by_every_thread_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hosting.watcher, wrappers):
        monkeypatch.setattr(
            module,
            "threading",
            SimpleNamespace(local=SimpleNamespace, current_thread=threading.current_thread, Lock=threading.Lock),
        )
    with pytest.raises(AssertionError):
        test_two_threads_with_pipelines_that_share_a_denoiser_do_not_meet()
