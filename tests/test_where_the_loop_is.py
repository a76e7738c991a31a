"""Which step and branch a forward serves, whatever the pipeline's habits; and runs a schedule was not made for.

The naive loop of `probes` counts denoiser calls of one known pipeline and knows nothing else: where our output has the
same bits, every forward was taken for the step and branch that it is.
"""

from __future__ import annotations

import copy
import threading
import warnings
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from pipelines import SCHEDULERS, TINY, fresh, run, shared, watch, with_scheduler
from probes import BRANCHES, bound, hold, leaf_calls, naive_reuse, ours
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerate, accelerated, report, restore
from diffcache import host as hosting
from diffcache.errors import ScheduleMismatch, UnsupportedModel
from diffcache.executor import FailedOpen, arounds
from diffcache.executor.guess import repeats
from diffcache.schedule import DenoiserPlan, Guidance

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
def test_a_late_start_is_seen_with_noise_schedulers_that_are_not_told_of_it(scheduler: str) -> None:
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
    """SDXL stops at `denoising_end`. DDIM is told of no start, so that the short progress bar looks like a late start
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
def test_branches_in_calls_of_their_own_have_anchors_of_their_own(name: str) -> None:
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


def test_batched_guidance_is_recognised_though_the_condition_channels_differ() -> None:
    """InstructPix2Pix puts the picture behind the latents of one branch and zeros behind those of the other."""
    latents, picture = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6)
    guided = torch.cat([torch.cat([latents] * 2), torch.cat([picture, torch.zeros_like(picture)])], dim=1)
    assert repeats([guided], 2)
    assert not repeats([torch.randn(2, 8, 6, 6)], 2)
    assert not repeats([guided], 3)
    samples = [torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6)]
    assert repeats([*samples, *(s.clone() for s in samples)], 2)
    assert not repeats([samples[0], samples[0], samples[1], samples[1]], 2)
    assert not repeats([], 2)


# --- several denoisers -----------------------------------------------------------------------------------------------


def test_each_of_two_denoisers_has_its_own_anchors_and_the_loop_one_step_count() -> None:
    """Wan 2.2: `transformer` runs steps 0 to 1, `transformer_2` the rest; step 2 is no reason to reuse the other's."""
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


# --- from run to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd15", "wan", "z_image", "ltx2"])
def test_another_batch_size_or_resolution_needs_nothing(name: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    calls = [tiny.call(pipe), tiny.call(pipe, batch=3), tiny.call(pipe)]
    calls[1]["height"] *= 2
    expected = []
    for call in calls:
        with accelerated(pipe, "taylor:every=2"):
            expected.append(run(pipe, call))
    with accelerated(pipe, "taylor:every=2"):
        for call, alone in zip(calls, expected, strict=True):
            assert torch.equal(run(pipe, call), alone)
        assert report(pipe).runs == 3
    assert expected[0].shape != expected[1].shape


def test_under_a_rule_another_number_of_steps_needs_nothing() -> None:
    pipe = shared("flux")
    with accelerated(pipe, "uniform:every=3"):
        for steps, computed in ((6, 2), (4, 2), (7, 3), (1, 1)):
            run(pipe, TINY["flux"].call(pipe), num_inference_steps=steps)
            assert report(pipe).computed == computed
            assert report(pipe).predicted == steps - computed


NAMES_BOTH = [
    ("flux", 4, r"made for 6 steps; this run takes 4 .*num_inference_steps=4\). Pass num_inference_steps=6, or make"),
    ("flux", 9, r"made for 6 steps; this run takes 9 .*Pass num_inference_steps=6, or make a schedule for 9\."),
    ("dit", 3, r"made for 6 steps; this run takes 3 .*Pass num_inference_steps=6"),
    ("sd3_heun", 5, r"made for 11 steps; this run takes 9 .*steps=5\). Pass the number it was made with, or make"),
    ("sd15", 5, r"made for 7 steps; this run takes 6 \(noise scheduler PNDM.*Pass the number it was made with"),
    ("wan22", 5, r"made for 6 steps; this run takes 5 "),
    ("flux_img2img", 5, r"made for 6 steps; this run takes 5 "),
]


@pytest.mark.parametrize(("name", "steps", "says"), NAMES_BOTH)
def test_another_number_of_steps_is_refused_before_the_denoiser_is_called(name: str, steps: int, says: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    run(pipe, tiny.call(pipe))
    total = len(pipe.scheduler.timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)  # wan22 and the late start
        with accelerated(pipe, bound(pipe, hold([i % 2 == 0 for i in range(total)]))):
            fast = run(pipe, tiny.call(pipe))
            with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
                run(pipe, tiny.call(pipe), num_inference_steps=steps)
            assert not calls
            assert "step" not in vars(pipe.scheduler)
            assert torch.equal(run(pipe, tiny.call(pipe)), fast)
    assert ours(pipe) == []


def test_a_swapped_noise_scheduler_is_refused_before_the_denoiser_is_called() -> None:
    pipe, tiny = fresh("sd15_ddim"), TINY["sd15_ddim"]
    first = pipe.scheduler
    with accelerated(pipe, bound(pipe, hold("#.#.#."))):
        fast = run(pipe, tiny.call(pipe))
        with_scheduler(pipe, "euler")
        says = r"noise scheduler DDIMScheduler; the pipeline has EulerDiscreteScheduler. Set pipe.scheduler"
        with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        pipe.scheduler = type(first).from_config(first.config, prediction_type="v_prediction")
        says = r"DDIMScheduler of another configuration \(prediction type epsilon, .*; here v_prediction"
        with leaf_calls(pipe, tiny.denoisers) as more, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        assert not calls
        assert not more
        pipe.scheduler = first
        assert torch.equal(run(pipe, tiny.call(pipe)), fast)


def test_without_strict_a_noise_scheduler_of_another_configuration_is_accepted_and_another_class_is_not() -> None:
    pipe, tiny = fresh("sd15_ddim"), TINY["sd15_ddim"]
    first = pipe.scheduler
    with accelerated(pipe, bound(pipe, hold("#.#.#.")), strict=False):
        pipe.scheduler = type(first).from_config(first.config, prediction_type="v_prediction")
        run(pipe, tiny.call(pipe))
        assert report(pipe).predicted == 3
        with_scheduler(pipe, "euler")
        with pytest.raises(ScheduleMismatch, match="EulerDiscreteScheduler"):
            run(pipe, tiny.call(pipe))


def test_another_denoiser_put_in_place_is_refused_before_it_is_called() -> None:
    pipe, tiny = fresh("flux"), TINY["flux"]
    mine = pipe.transformer
    with accelerated(pipe, "uniform:every=2"):
        fast = run(pipe, tiny.call(pipe))
        pipe.transformer = fresh("flux").transformer
        says = r"'transformer' of this FluxPipeline is another object than when it was accelerated .*restore\(pipe\)"
        with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        assert not calls
        pipe.transformer = mine
        assert torch.equal(run(pipe, tiny.call(pipe)), fast)


# --- other habits ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (torch.sin(hidden_states * 3) + timestep / 1000,)


class ToyPipeline(DiffusionPipeline):
    """A loop of one's own, with one odd habit at a time.

    views  the denoiser is given the noise scheduler's own timesteps, not numbers made of them
    """

    views = True

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def progress_bar(self, iterable: Any = None, total: int | None = None, desc: str = "", leave: bool = True) -> Any:
        return super().progress_bar(iterable, total)  # some pipelines name their bars

    @torch.no_grad()
    def __call__(self, habit: str, steps: int = 6) -> Tensor:
        x = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
        self.scheduler.set_timesteps(steps)
        if habit == "two bars, one inside the other":
            for _ in self.progress_bar(range(2), desc="pictures"):
                self.scheduler.set_timesteps(steps)
                for t in self.progress_bar(self.scheduler.timesteps, leave=False, desc="steps"):
                    x = self.one(x, t)
        elif habit == "one bar, several passes":
            with self.progress_bar(total=2 * steps) as bar:
                for _ in range(2):
                    self.scheduler._step_index = None
                    for t in self.scheduler.timesteps:
                        x = self.one(x, t)
                        bar.update()
        elif habit == "the loop runs over numbers":
            for i in self.progress_bar(range(steps)):
                x = self.one(x, self.scheduler.timesteps[i])
        elif habit == "a bar over something else":
            for _ in self.progress_bar(range(3)):
                x = self.transformer(x, torch.tensor(500.0))[0]
        elif habit == "the last timestep is left out":
            for t in self.progress_bar(self.scheduler.timesteps[:-1]):
                x = self.one(x, t)
        elif habit == "back to the start from step 2":
            with self.progress_bar(total=steps):
                for i in (0, 1, 2, 0, 1, 2):
                    self.scheduler._step_index = i
                    x = self.one(x, self.scheduler.timesteps[i])
        elif habit == "a step in two parts":
            for t in self.progress_bar(self.scheduler.timesteps):
                kept = copy.deepcopy(vars(self.scheduler))
                left = self.one(x[..., :2], t)
                vars(self.scheduler).update(kept)
                x = torch.cat([left, self.one(x[..., 2:] * 1.5, t)], dim=-1)
        elif habit == "noise schedulers of its own":
            own = copy.deepcopy(self.scheduler)
            with self.progress_bar(total=steps) as bar:
                for t in own.timesteps:
                    x = own.step(self.transformer(x, t)[0], t, x)[0]
                    bar.update()
        elif habit == "stages within the loop":
            with self.progress_bar(total=steps) as bar:
                for n in (steps // 2, steps - steps // 2):
                    self.scheduler.set_timesteps(n)
                    for t in self.scheduler.timesteps:
                        x = self.one(x, t)
                        bar.update()
        elif habit == "the noise scheduler steps twice":
            for t in self.progress_bar(self.scheduler.timesteps):
                y = copy.deepcopy(self.scheduler).step(self.transformer(x, t)[0], t, x)[0]
                x = self.one(x, t, called=False) * 0.5 + y * 0.5
        self.maybe_free_model_hooks()
        return x

    def one(self, x: Tensor, t: Tensor, *, called: bool = True) -> Tensor:
        output = self.transformer(x, t if self.views else t * 1)[0] if called else x
        return self.scheduler.step(output, t, x)[0]


def toy() -> Any:
    return quiet(ToyPipeline(Toy(), FlowMatchEulerDiscreteScheduler()))


@pytest.mark.parametrize(
    ("habit", "computed"),
    [
        ("two bars, one inside the other", 6),
        ("the loop runs over numbers", 3),
        ("the last timestep is left out", 3),
        ("the noise scheduler steps twice", 3),
        ("a step in two parts", 6),
        ("noise schedulers of its own", 3),
        ("stages within the loop", 4),
    ],
)
def test_loops_of_other_habits_are_followed(habit: str, computed: int) -> None:
    pipe = toy()
    plain = pipe(habit)
    with accelerated(pipe, "full"):
        assert torch.equal(pipe(habit), plain)
    pipe.transformer.calls = 0
    accelerate(pipe, "uniform:every=2")
    pipe(habit)
    assert pipe.transformer.calls == computed
    assert not any(row.failed_open for row in report(pipe).rows)
    restore(pipe)
    assert ours(pipe) == []


def test_each_part_of_a_step_is_predicted_from_its_own() -> None:
    """Both parts have the same shape: only their order tells them apart."""
    pipe = toy()
    kept: list[Tensor] = []

    def reused(self: Toy, x: Tensor, t: Tensor) -> tuple[Tensor]:
        self.calls += 1
        step, part = divmod(self.calls - 1, 2)
        value = torch.sin(x * 3) + t / 1000 if step % 2 == 0 else kept[part]
        kept[part:] = [value, *kept[part + 1 :]]
        return (value,)

    with accelerated(pipe, "uniform:every=2"):
        fast = pipe("a step in two parts")
    pipe.transformer.calls, pipe.transformer.forward = 0, MethodType(reused, pipe.transformer)
    assert torch.equal(pipe("a step in two parts"), fast)


def test_parts_of_a_step_that_cannot_be_told_are_refused_before_anything_comes_of_them() -> None:
    pipe = toy()
    pipe.views = False
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(UnsupportedModel, match="takes step 0 in several parts"):
            pipe("a step in two parts")
        assert report(pipe).bytes_held == 0
    assert ours(pipe) == []


def test_a_bar_over_something_else_is_no_sampling_loop_even_for_a_schedule_of_other_length() -> None:
    pipe = toy()
    plain = pipe("a bar over something else")
    with accelerated(pipe, bound(pipe, hold("#.#."))):
        with pytest.warns(FailedOpen, match="ToyPipeline was called and no sampling loop of its own was seen"):
            assert torch.equal(pipe("a bar over something else"), plain)
        assert report(pipe).runs == 0
        with pytest.raises(ScheduleMismatch):
            pipe("the loop runs over numbers")


def test_a_loop_that_goes_round_again_never_uses_what_the_first_pass_kept() -> None:
    pipe = toy()
    schedule = bound(pipe, hold("#.#..#"))
    with accelerated(pipe, schedule):
        pipe("one bar, several passes")
        assert report(pipe).bytes_held == 0
    assert pipe.transformer.calls == 3 + 3
    pipe.transformer.calls, pipe.views = 0, False
    with accelerated(pipe, schedule):
        with pytest.warns(FailedOpen, match="step beyond the schedule|an anchor is missing"):
            pipe("one bar, several passes")
        assert report(pipe).bytes_held == 0
    # Pass 2: its first forward is beyond the schedule, step 1 has lost its anchor; steps 2 and 5 are computed.
    assert pipe.transformer.calls == 3 + 4


def test_a_loop_that_goes_back_does_not_use_what_it_kept_before() -> None:
    pipe = toy()
    with accelerated(pipe, bound(pipe, hold("#....#"))):
        pipe("back to the start from step 2")
    assert pipe.transformer.calls == 2
    pipe.transformer.calls, pipe.views = 0, False
    with accelerated(pipe, bound(pipe, hold("#....#"))):
        with pytest.warns(FailedOpen, match="2 predictions were computed in full instead: an anchor is missing"):
            pipe("back to the start from step 2")
    # Where the loop went is known when the noise scheduler has stepped there: the fourth forward was taken for step 3.
    assert pipe.transformer.calls == 1 + 2


def test_going_back_is_told_and_taking_a_step_twice_is_not() -> None:
    timesteps, told = torch.arange(6.0), []
    run = hosting.Run(None, timesteps, 0, 0, again=lambda: told.append(run.index))
    for i in (0, 1, 2, 2, 3):
        run.step_done(timesteps[i])
        assert run.index == i + 1
    assert told == []
    run.step_done(timesteps[1])
    assert (run.index, told) == (2, [4])
    run.step_done(timesteps[4])
    run.step_done("no tensor")
    assert (run.index, told) == (6, [4])


def test_the_start_of_a_loop_is_read_off_the_timesteps_it_iterates_over() -> None:
    timesteps = torch.arange(10.0)
    assert hosting.loop._start_of(timesteps, timesteps) == 0
    assert hosting.loop._start_of(timesteps[4:], timesteps) == 4
    assert hosting.loop._start_of(timesteps[:-1], timesteps) == 0
    assert hosting.loop._start_of(timesteps.flip(0), timesteps) is None  # an inversion, not the noise scheduler's loop
    assert hosting.loop._start_of(range(10), timesteps) == 0
    assert hosting.loop._start_of(range(9), timesteps) is None
    assert hosting.loop._start_of(iter([1]), timesteps) is None


def test_a_step_is_told_by_the_address_of_its_timestep_and_by_nothing_else() -> None:
    timesteps = torch.tensor([9.0, 5.0, 5.0, 1.0])
    views = list(timesteps)
    assert [hosting.run.position(view, timesteps) for view in views] == [0, 1, 2, 3]
    assert hosting.run.position(views[2].expand(3), timesteps) == 2
    assert hosting.run.position(views[2].clone(), timesteps) is None
    assert hosting.run.position(timesteps.double()[1], timesteps) is None
    assert hosting.run.position(5.0, timesteps) is None


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


def test_another_type_between_runs_needs_nothing() -> None:
    pipe = fresh("flux")
    with accelerated(pipe, "taylor:every=2"):
        fast = run(pipe, TINY["flux"].call(pipe))
        pipe.to(torch.bfloat16)
        call = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in TINY["flux"].call(pipe).items()}
        half = run(pipe, call)
        assert report(pipe).predicted == 3
        pipe.to(torch.float32)
    assert fast.shape == half.shape


# --- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_with_pipelines_that_share_a_denoiser_do_not_meet() -> None:
    one = fresh("flux_true_cfg")
    other = quiet(type(one)(**{**one.components, "scheduler": copy.deepcopy(one.scheduler)}))
    call = TINY["flux_true_cfg"].call(one)
    specs = {one: "uniform:every=2", other: "taylor:every=3,sites=block"}
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
    monkeypatch.setattr(hosting.run, "position", lambda timestep, timesteps: None)
    assert_like_the_naive_loop(shared(name), name)  # without addresses, counting is right here too
    done = hosting.Run.step_done
    skip = iter([False, True] + [False] * 20)

    def lose_one(self: Any, timestep: Any) -> None:
        if not next(skip):
            done(self, timestep)

    monkeypatch.setattr(hosting.Run, "step_done", lose_one)
    monkeypatch.setattr(hosting.Run, "bar_moved", lambda self: None)
    with pytest.raises((AssertionError, FailedOpen)):
        assert_like_the_naive_loop(shared(name), name)


def test_a_late_start_taken_for_an_early_one_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting.loop, "_start", lambda scheduler, total: 0)
    with pytest.raises((AssertionError, FailedOpen)):
        test_a_late_start_begins_with_a_computed_step("sdxl_img2img", 0.3)


def test_a_run_seen_by_every_thread_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hosting.loop, arounds):
        monkeypatch.setattr(module, "threading", SimpleNamespace(local=SimpleNamespace))
    with pytest.raises(AssertionError):
        test_two_threads_with_pipelines_that_share_a_denoiser_do_not_meet()
