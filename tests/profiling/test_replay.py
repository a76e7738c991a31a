"""Replays: entered anywhere, they do what the real loop does; loops that do not fit say why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from calibrated import calibration, calls, final_states, recorded
from pipelines import TINY, fresh, shared
from torch import Tensor

import diffcache
from diffcache.documents import BranchLayout, SitePlan
from diffcache.profiling import Calibration
from diffcache.profiling.fitting import fit
from diffcache.profiling.recording.record import record
from diffcache.profiling.replay import NotReplayable, Replay
from diffcache.profiling.replay.replay import _fork
from diffcache.schedulers.uniform import evenly

OUTPUT_ONLY = {
    "flux_inpaint": "changes the state between two steps",
    "z_image": "returns several tensors",
    "ltx2": "returns several tensors",
    "cogvideox_dpm": "carries tensors from one noise-scheduler step to the next",
}

# Every form of guidance, every kind of noise scheduler: one step, second order, multistep, with memory written in place
# (PNDM's first steps), with added noise, with clipping; a late start, condition channels and tokens, a ControlNet,
# states that carry samples twice, two denoisers, guidance that gives vectors another length.
REPLAYED = [
    ("flux", ""),
    ("flux_img2img", ""),
    ("flux_control", ""),
    ("flux_kontext", ""),
    ("flux_controlnet", ""),
    ("chroma", ""),
    ("qwen_image", ""),
    ("lumina2", ""),
    ("sd3", "euler"),
    ("sd3", "heun"),
    ("sd3", "dpmpp_2m"),
    ("sd3", "unipc"),
    ("dit", ""),
    ("wan22", ""),
    ("ddim", ""),
    ("ddpm", ""),
    ("pixart_sigma", "pndm"),
    ("sd15", "pndm"),
    ("sd15", "ddim"),
    ("sd15", "heun"),
    ("sd15", "euler_ancestral"),
    ("sdxl_img2img", "euler"),
    ("stable_audio", ""),
]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def guess(calibrated: Calibration, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask and coefficients that were not fitted; they differ by branch, step and anchor."""
    replays = calibrated.replays
    draw = np.random.default_rng(seed)
    steps, branches = len(replays[0].steps), replays[0].branches
    compute = evenly(steps, steps // 2, replays[0].first_steps)
    since = np.maximum.accumulate(np.where(np.isin(np.arange(steps), replays[0].first_steps), np.arange(steps), 0))
    kept = np.array([compute[begin:i].sum() for i, begin in enumerate(since)])
    weights = draw.normal(0, 0.2, (branches, steps, 3))
    weights[:, :, 0] += 1
    weights *= (np.arange(3) < kept[:, None]) & ~compute[:, None]
    return compute, weights


@pytest.mark.parametrize(("name", "noise_scheduler"), REPLAYED)
def test_a_replay_ends_where_the_accelerated_pipeline_ends(name: str, noise_scheduler: str) -> None:
    calibrated = calibration(name, noise_scheduler)
    assert calibrated.target == "state", calibrated.why_output
    compute, weights = guess(calibrated)
    replayed = fit.replayed_states(calibrated.replays, compute, weights)
    other = fit.replayed_states(calibrated.replays, compute, *guess(calibrated, seed=1)[1:])
    pipe = calibrated.pipe
    with diffcache.accelerated(pipe, calibrated._document(SitePlan(compute=compute, weights=weights), {})):
        real = final_states(pipe, calls(name, pipe))
        rows = diffcache.report(pipe).rows
    per_step = 2 if TINY[name].guidance == "separate" else 1
    assert sum(r.computed for r in rows) == compute.sum() * per_step
    assert not any(r.failed_open for r in rows)
    for ours, theirs, others in zip(replayed, real, other, strict=True):
        for sample, truth in zip(ours, theirs, strict=True):
            assert distance(sample, truth) < 3e-6
        assert distance(others, theirs) > 1e-4  # other coefficients end elsewhere: the comparison can fail


@pytest.mark.parametrize("name", OUTPUT_ONLY)
def test_a_loop_that_cannot_be_replayed_says_why(name: str) -> None:
    calibrated = calibration(name)
    assert calibrated.target == "output"
    assert not calibrated.replays
    assert OUTPUT_ONLY[name] in calibrated.why_output


def test_a_network_that_empties_a_list_of_arguments_is_replayed() -> None:
    """HunyuanDiT takes the samples of its ControlNet off the end of the list that it is given."""
    assert recorded("hunyuan_dit_controlnet").target == "state"


def test_a_batch_that_holds_both_branches_at_some_steps_only_is_not_replayed() -> None:
    calibrated = recorded("ace_step_guided_at_first")
    assert calibrated.target == "output"
    assert "number of branches in a forward changes" in calibrated.why_output


def test_all_others_can_be_replayed() -> None:
    assert {name for name in TINY if calibration(name).target == "output"} == OUTPUT_ONLY.keys()


@pytest.mark.parametrize("name", ["flux", "sd15_heun", "stable_audio", "wan"])
def test_the_full_run_replayed_is_the_full_run(name: str) -> None:
    for one in calibration(name).replays:
        position = one.start
        for i in range(len(one.steps)):
            assert distance(position.state, one.steps[i].state) < 1e-6  # type: ignore[arg-type]
            position = one.move(i, position, one.guided(i, one.compute(i, position)))
        assert distance(position.state, one.reference(len(one.steps) - 1)) < 1e-6


@pytest.mark.parametrize(("name", "noise_scheduler"), [("pixart_sigma", "pndm"), ("sd15", "euler_ancestral")])
def test_a_position_stays_valid_after_any_continuation(name: str, noise_scheduler: str) -> None:
    one = calibration(name, noise_scheduler).replays[0]
    position = one.start
    for i in range(len(one.steps)):
        output = one.guided(i, one.recorded(i))
        once = one.move(i, position, output).state
        away = one.move(i, position, -output).state
        assert torch.equal(one.move(i, position, output).state, once)
        assert torch.equal(away, once) == (float(one.affine(i, position)[1]) == 0)  # some steps of PNDM only take note
        position = one.move(i, position, output)


NOISE_SCHEDULERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    (diffusers.EulerDiscreteScheduler, {}),
    (diffusers.EulerAncestralDiscreteScheduler, {}),
    (diffusers.HeunDiscreteScheduler, {}),
    (diffusers.DDIMScheduler, {}),
    (diffusers.DDPMScheduler, {}),
    (diffusers.CogVideoXDDIMScheduler, {}),
    (diffusers.PNDMScheduler, {}),  # begins with Runge-Kutta steps, which add up in place
    (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    (diffusers.DPMSolverMultistepScheduler, {}),
    (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    (diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
    (diffusers.EDMDPMSolverMultistepScheduler, {}),
]


def walk(fork: Callable[[Any], Any], build: Callable[..., Any], options: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """What a noise scheduler holds before and after a fork of it stepped, at every step."""
    current = build(**options)
    current.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 3, 4, 4, generator=generator)
    for timestep in current.timesteps:
        output = torch.randn(1, 3, 4, 4, generator=generator)
        before = held(current)
        twin = fork(current)
        state = twin.step(output, timestep, state, return_dict=False)[0]
        yield before, held(current)
        current = twin


def held(scheduler: Any) -> dict[str, Any]:
    def value(v: Any) -> Any:
        return v.tolist() if isinstance(v, Tensor) else [value(x) for x in v] if isinstance(v, list) else v

    return {name: copy.copy(value(v)) for name, v in vars(scheduler).items() if not isinstance(v, np.ndarray)}


@pytest.mark.parametrize(("build", "options"), NOISE_SCHEDULERS)
def test_stepping_a_fork_leaves_the_original_alone(build: Callable[..., Any], options: dict[str, Any]) -> None:
    for before, after in walk(_fork, build, options):
        assert before == after


@pytest.mark.parametrize(("build", "options"), [NOISE_SCHEDULERS[8], NOISE_SCHEDULERS[10]])
def test_a_shallow_copy_would_not_do(build: Callable[..., Any], options: dict[str, Any]) -> None:
    assert any(before != after for before, after in walk(copy.copy, build, options))


def test_a_fork_does_not_inherit_a_step_that_moves_the_original() -> None:
    original = diffusers.FlowMatchEulerDiscreteScheduler()
    original.set_timesteps(4)
    original.step = original.step  # as a deep copy of a patched noise scheduler has it
    twin = _fork(original)
    twin.step(torch.zeros(1, 2), twin.timesteps[0], torch.zeros(1, 2))
    assert original.step_index is None
    assert twin.step_index == 1


@pytest.mark.parametrize(
    ("name", "weights"),
    [("flux", [1]), ("flux_true_cfg", [3, -2]), ("chroma", [4, -3]), ("sd3", [-3, 4]), ("dit", [4, -3])],
)
def test_guidance_is_recognised(name: str, weights: list[float]) -> None:
    for one in calibration(name).replays:
        assert np.array(one.guidance) == pytest.approx(np.tile(weights, (TINY[name].steps, 1)), abs=2e-4)


@pytest.mark.parametrize(("name", "weights"), [("qwen_image", [4, -3]), ("lumina2", [-4, 3])])
def test_guidance_that_stretches_vectors_is_recognised(name: str, weights: list[float]) -> None:
    for one in calibration(name).replays:
        assert one.rescaled_branch == 0  # the conditional branch comes first
        assert np.array(one.guidance) == pytest.approx(np.tile(weights, (TINY[name].steps, 1)), abs=1e-3)
        for i in range(len(one.steps)):
            cond, uncond = one.recorded(i)
            mixed = weights[0] * cond + weights[1] * uncond
            assert distance(mixed * one.rescaling(i), one._handed(i)) < 1e-4
            assert distance(mixed, one._handed(i)) > 0.01
    assert calibration("chroma").replays[0].rescaled_branch is None


def test_guidance_is_recognised_from_several_steps_if_one_is_ambiguous() -> None:
    one = record(shared("chroma"), TINY["chroma"].call(shared("chroma")))
    for call in one.steps[2].calls:  # as at first steps of many models: both branches answer the same
        call.outputs = (one.steps[2].calls[0].output,)
    one.steps[2].model_output = one.steps[2].calls[0].output
    bare = Replay.__new__(Replay)  # the rest of such a recording would not fit together
    bare.steps, bare.batch_copies, bare.layout = one.steps, 1, BranchLayout()
    assert np.array(bare._guidance()) == pytest.approx(np.tile([4, -3], (len(one.steps), 1)), abs=2e-4)


@pytest.mark.parametrize("alike", ["noise", "noise and prompt"])
def test_samples_that_begin_alike_are_not_taken_for_branches(alike: str) -> None:
    pipe = shared("flux")
    call = TINY["flux"].call(pipe, batch=2)
    if alike == "noise and prompt":
        call["prompt_embeds"] = call["prompt_embeds"][:1].repeat(2, 1, 1)
        call["pooled_prompt_embeds"] = call["pooled_prompt_embeds"][:1].repeat(2, 1)
    one = Replay(record(pipe, call | {"generator": [torch.Generator().manual_seed(0) for _ in range(2)]}))
    assert one.batch_copies == one.branches == one.layout.per_forward == 1


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3"])
def test_half_precision_is_replayed_too(name: str) -> None:
    pipe = fresh(name)
    pipe.transformer.to(torch.bfloat16)
    made = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in TINY[name].call(pipe).items()
    }
    calibrated = Calibration.record(pipe, [made | {"generator": torch.Generator().manual_seed(0)}])
    assert calibrated.target == "state", calibrated.why_output
    compute, weights = guess(calibrated)
    (replayed,) = fit.replayed_states(calibrated.replays, compute, weights)
    with diffcache.accelerated(pipe, calibrated._document(SitePlan(compute=compute, weights=weights), {})):
        (real,) = final_states(pipe, [made | {"generator": torch.Generator().manual_seed(0)}])
    reference = calibrated.replays[0].reference(len(compute) - 1)
    assert replayed.dtype == real.dtype
    assert distance(replayed, real) < 0.2 * distance(real, reference)


@pytest.mark.parametrize(("name", "noise_scheduler"), [*REPLAYED, ("cogvideox", "ddim")])
def test_the_next_state_is_affine_in_the_guided_output(name: str, noise_scheduler: str) -> None:
    one = calibration(name, noise_scheduler).replays[0]
    position = one.start
    for i in range(len(one.steps)):
        at_zero, gain = one.affine(i, position)
        output = one.guided(i, one.recorded(i))
        away = (
            output if i in one.nonlinear_steps else output + torch.randn_like(output)
        )  # where it clips: near the full run's
        moved = one.move(i, position, away).state
        there = at_zero + one._with_copies(away).double() * (gain if gain.ndim == 0 else one._with_copies(gain))
        assert distance(there, moved) < 1e-4
        position = one.move(i, position, output)
    assert bool(one.nonlinear_steps) == (name in ("ddim", "ddpm") or (name, noise_scheduler) == ("cogvideox", "ddim"))


def test_where_the_noise_scheduler_clips_the_gain_differs_by_element() -> None:
    one = calibration("ddim").replays[0]
    step = min(one.nonlinear_steps)
    position = one.start
    for i in range(step):
        position = one.move(i, position, one.guided(i, one.recorded(i)))
    output = one.guided(step, one.recorded(step))
    at_zero, gain = one.affine(step, position)
    assert gain.shape == output.shape
    assert gain.std() > 0
    nudged = output + 0.01 * output.abs().mean() * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    there, moved = at_zero + gain * nudged.double(), one.move(step, position, nudged).state
    still = one.move(step, position, output).state
    assert (there - moved).norm() < 0.1 * (moved - still).norm()


def test_a_controlnet_sees_the_replayed_state(monkeypatch: pytest.MonkeyPatch) -> None:
    one = calibration("flux_controlnet").replays[0]
    moved = one.move(0, one.start, 0.5 * one.guided(0, one.recorded(0)))
    (right,) = one.compute(1, moved)
    monkeypatch.setattr(one, "_feeds", [[] for _ in one.steps])
    (wrong,) = one.compute(1, moved)
    assert distance(wrong, right) > 1e-3


def test_a_feeder_that_does_not_see_the_state_is_taken_as_recorded() -> None:
    pipe = shared("flux_controlnet")
    trajectory = record(pipe, TINY["flux_controlnet"].call(pipe))
    for step in trajectory.steps:
        for feed in step.feeds:
            feed.kwargs = {**feed.kwargs, feed.main: "something else"}
    assert not any(Replay(trajectory)._feeds)


def test_a_recording_that_does_not_explain_itself_is_not_replayed() -> None:
    """Each identification, spoiled at one step."""
    pipe = shared("chroma")
    call = TINY["chroma"].call(pipe)

    def spoiled(spoil: Callable[[Any], None]) -> str:
        trajectory = record(pipe, call | {"generator": torch.Generator().manual_seed(0)})
        spoil(trajectory.steps[3])
        with pytest.raises(NotReplayable) as caught:
            Replay(trajectory)
        return str(caught.value)

    def set_input(step: Any) -> None:
        step.calls[1].kwargs = step.calls[1].kwargs | {step.calls[1].main: step.state * 1.01}

    def set_output(step: Any) -> None:
        step.model_output = step.model_output.abs()

    def set_result(step: Any) -> None:
        step.result = step.result * 1.01

    def set_state(step: Any) -> None:
        step.state = step.state * 1.01

    def drop_call(step: Any) -> None:
        step.calls.pop()

    def add_memory(step: Any) -> None:
        step.extra = {"memory": step.state}

    assert "input is not the state" in spoiled(set_input)
    assert "not a linear combination" in spoiled(set_output)
    assert "gives another result" in spoiled(set_result)
    assert "changes the state between two steps" in spoiled(set_state)
    assert "changes from step to step" in spoiled(drop_call)
    assert "carries tensors" in spoiled(add_memory)
