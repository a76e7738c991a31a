"""Accelerated modular pipelines, and guiders, which say anew at every step which branches there are."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.guiders import AutoGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from pipelines.modular import GUIDED, MODULAR, cfg, ltx2_guidance, run, shared
from probes import bound, copied, hold, leaf_calls, names, offered

from diffcache import accelerated, host, optimize, report
from diffcache.errors import ScheduleMismatch
from diffcache.executor import FailedOpen
from diffcache.host import inspection

PLACES = ("model", "stack", "block", "sublayer")
EVERYWHERE = [(name, place) for name in MODULAR for place in (PLACES[:2] if name.startswith("sdxl") else PLACES)]


def counted(pipe: Any, name: str) -> tuple[torch.Tensor, int]:
    """The latents, and how many parts without parts ran for them."""
    with leaf_calls(pipe, MODULAR[name].tiny.denoisers) as calls:
        latents = run(pipe, MODULAR[name].call(pipe))
    return latents, sum(calls.values())


def failed_open(pipe: Any) -> dict[int, int]:
    """Branch -> how many of its predictions were computed instead, at one site."""
    return {row.branch: sum(row.failed_open.values()) for row in report(pipe).rows if row.failed_open}


@pytest.mark.parametrize(("name", "place"), EVERYWHERE)
def test_a_modular_pipeline_skips_and_is_as_before_afterwards(name: str, place: str) -> None:
    pipe = shared(name)
    (untouched, whole), found = counted(pipe, name), names(pipe)
    assert place in offered(pipe)
    with accelerated(pipe, f"full:sites={place}"):
        assert torch.equal(run(pipe, MODULAR[name].call(pipe)), untouched)
    with accelerated(pipe, f"uniform:every=2,sites={place}"):
        fast, calls = counted(pipe, name)
        assert not torch.equal(fast, untouched)
        assert bool(fast.isfinite().all())
        assert calls == whole / 2 if place == "model" else calls < whole
        assert not failed_open(pipe)
        assert report(pipe).bytes_held == 0
        assert torch.equal(run(pipe, MODULAR[name].call(pipe)), fast)
    assert names(pipe) == found
    assert torch.equal(run(pipe, MODULAR[name].call(pipe)), untouched)


# --- guiders ---------------------------------------------------------------------------------------------------------

late = pytest.mark.filterwarnings("ignore:.*an anchor is missing")  # a branch that begins at a step to be predicted


def guided(kind: str) -> tuple[Any, dict[str, Any]]:
    """A new pipeline with this guider, and a call of it."""
    modular = MODULAR[GUIDED[kind].pipeline]
    pipe = modular.build(GUIDED[kind].make(modular.layers))
    return pipe, modular.call(pipe)


@contextmanager
def reuse_by_hand(denoiser: Any, steps: Sequence[str]) -> Iterator[list[int]]:
    """Every second step, each branch returns what it returned last when it was computed, if it ever was.

    Who knows what the guider asks for at every step needs neither it nor the noise scheduler. Yields the numbers of
    the forwards that were computed.
    """
    order = [(step, branch) for step, branches in enumerate(steps) for branch in branches]
    inner, kept, made, computed = denoiser.forward, {}, 0, []

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        (step, branch), made = order[made], made + 1
        if step % 2 and branch in kept:
            return copied(kept[branch])
        computed.append(made)
        value = inner(*args, **kwargs)
        if step % 2 == 0:
            kept[branch] = copied(value)
        return value

    denoiser.__dict__["forward"] = forward
    try:
        yield computed
    finally:
        del denoiser.__dict__["forward"]
    assert made == len(order)


@late
@pytest.mark.parametrize("kind", GUIDED)
def test_every_branch_of_a_guider_has_separate_anchors(kind: str) -> None:
    pipe, call = guided(kind)
    with reuse_by_hand(getattr(pipe, MODULAR[GUIDED[kind].pipeline].tiny.denoisers[0]), GUIDED[kind].steps) as computed:
        expected = run(pipe, call)
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(run(pipe, call), expected)
        counts = report(pipe).rows
        assert sum(row.predicted for row in counts) == sum(map(len, GUIDED[kind].steps)) - len(computed)
        assert torch.equal(run(pipe, call), expected)


@late
@pytest.mark.parametrize("kind", GUIDED)
def test_a_guided_pipeline_is_as_before_when_all_is_computed_and_afterwards(kind: str) -> None:
    pipe, call = guided(kind)
    name = GUIDED[kind].pipeline
    untouched, whole = counted(pipe, name)
    found = names(pipe)
    for place in offered(pipe):
        with accelerated(pipe, f"full:sites={place}"):
            full, calls = counted(pipe, name)
            assert torch.equal(full, untouched), place
            assert calls == whole
        with accelerated(pipe, f"uniform:every=2,sites={place}"):
            fast, calls = counted(pipe, name)
            assert calls < whole
            assert not torch.equal(fast, untouched)
            assert torch.equal(run(pipe, call), fast), place
            assert report(pipe).bytes_held == 0
    assert names(pipe) == found
    assert torch.equal(run(pipe, call), untouched)


@pytest.mark.filterwarnings("ignore:.*(an anchor is missing|did not run before it)")
@pytest.mark.parametrize(
    ("rule", "left_out", "failed"),
    [
        ("uniform:every=2,sites=stack", 0, {}),
        ("uniform:every=2,sites=stack", 2, {1: 3}),  # what the stack returned was never seen
        ("firstblockcache:threshold=0", 0, {1: 5}),  # the block that decides is left out
        ("firstblockcache:threshold=0", 2, {}),
    ],
)
def test_a_stack_whose_first_or_last_block_a_guider_leaves_out(
    rule: str, left_out: int, failed: dict[int, int]
) -> None:
    config = LayerSkipConfig([left_out], fqn="blocks")
    pipe = MODULAR["wan"].build(AutoGuidance(4.0, auto_guidance_config=config))
    call = MODULAR["wan"].call(pipe)
    untouched, found = run(pipe, call), names(pipe)
    with accelerated(pipe, "full:sites=stack"):
        assert torch.equal(run(pipe, call), untouched)
    with accelerated(pipe, rule):
        fast = run(pipe, call)
        assert torch.equal(fast, untouched) == ("firstblockcache" in rule)
        assert failed_open(pipe) == failed
        assert torch.equal(run(pipe, call), fast)
    assert names(pipe) == found


@late
def test_a_guider_may_change_between_runs_and_keeps_nothing_of_ours() -> None:
    pipe = MODULAR["wan"].build(cfg())
    call = MODULAR["wan"].call(pipe)
    skipping = GUIDED["skip layer comes first"]
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, call)
        assert {row.branch for row in report(pipe).rows} == {0, 1}
        guider = skipping.make("auto")
        pipe.update_components(guider=guider)
        found = set(vars(guider))
        changed = run(pipe, call)
        assert {row.branch for row in report(pipe).rows} == {0, 1, 2}
        assert not found ^ set(vars(guider))
    with reuse_by_hand(pipe.transformer, skipping.steps):
        assert torch.equal(run(pipe, call), changed)


def test_two_guiders_of_one_pipeline_share_the_forwards_of_a_branch() -> None:
    pipe = MODULAR["ltx2"].build(ltx2_guidance(stop=0.5))
    pipe.update_components(audio_guider=ltx2_guidance(guidance_scale=1.0, stg_scale=1.0))
    call = MODULAR["ltx2"].call(pipe)
    with reuse_by_hand(pipe.transformer, ("cus",) * 3 + ("cs",) * 3):
        expected = run(pipe, call)
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(run(pipe, call), expected)
        assert {row.branch: row.predicted for row in report(pipe).rows} == {0: 3, 1: 1, 2: 3}


@late
def test_pipelines_that_share_a_guider_are_distinguished() -> None:
    guider = GUIDED["skip layer comes first"].make("auto")
    pipe, other = MODULAR["wan"].build(guider), MODULAR["wan"].build(guider)
    call = MODULAR["wan"].call(pipe)
    untouched = run(other, call)
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, call)
        fast = report(pipe).rows
        assert torch.equal(run(other, call), untouched)
        assert report(pipe).rows == fast
        assert report(pipe).runs == 1
    assert not any(name in vars(guider) for name in inspection.GUIDER_METHODS)


def test_a_run_that_breaks_off_leaves_the_guider_as_it_was() -> None:
    pipe = MODULAR["qwen_image"].build(cfg())
    call = MODULAR["qwen_image"].call(pipe)
    untouched = run(pipe, call)
    hook = pipe.transformer.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(ZeroDivisionError):
            run(pipe, call)
        hook.remove()
        assert not any(name in vars(pipe.guider) for name in inspection.GUIDER_METHODS)
        assert not torch.equal(run(pipe, call), untouched)
        assert report(pipe).bytes_held == 0
    assert torch.equal(run(pipe, call), untouched)


def test_a_schedule_fitted_under_a_guider_knows_its_branches_and_its_scale() -> None:
    pipe = MODULAR["qwen_image"].build(cfg())
    call = MODULAR["qwen_image"].call(pipe)
    calls = [call | {"generator": torch.Generator().manual_seed(k), "output": "latents"} for k in range(2)]
    schedule = optimize(pipe, calls, 3, time_limit_s=1)
    assert schedule.provenance["fit_target"] == "state"
    assert schedule.guidance is not None
    assert (schedule.guidance.mode, schedule.guidance.branches) == ("separate", 2)
    assert schedule.guidance.scales["guidance_scale"] == 4.0
    untouched = run(pipe, call)
    with accelerated(pipe, schedule):
        fast = run(pipe, call)
        assert [(row.branch, row.predicted) for row in report(pipe).rows] == [(0, 3), (1, 3)]
    with accelerated(pipe, "uniform:every=2"):
        assert (fast - untouched).norm() < (run(pipe, call) - untouched).norm()
    pipe.update_components(guider=cfg(enabled=False))
    with accelerated(pipe, schedule, strict=False), pytest.raises(ScheduleMismatch, match="this run makes 1"):
        run(pipe, call)
    with accelerated(pipe, schedule), pytest.raises(ScheduleMismatch, match="guidance_enabled=1; this run uses 0"):
        run(pipe, call)
    pipe.update_components(guider=cfg(enabled=True))
    pipe.guider.guidance_scale = 2.0
    with accelerated(pipe, schedule), pytest.raises(ScheduleMismatch, match="guidance_scale=4; this run uses 2"):
        run(pipe, call)


@late
@pytest.mark.parametrize("kind", ["classifier-free, late", "perturbed attention stays"])
def test_a_schedule_fitted_while_branches_come_and_go_computes_what_it_has_no_anchors_for(kind: str) -> None:
    pipe, call = guided(kind)
    calls = [call | {"generator": torch.Generator().manual_seed(k), "output": "latents"} for k in range(2)]
    schedule = optimize(pipe, calls, 3, time_limit_s=1)
    assert schedule.provenance["fit_target"] == "output"
    with accelerated(pipe, schedule):
        fast = run(pipe, call)
        forwards = sum(map(len, GUIDED[kind].steps))
        rows = report(pipe).rows
        assert sum(row.computed + row.predicted + sum(row.failed_open.values()) for row in rows) == forwards
        assert 0 < sum(row.predicted for row in rows) < forwards / 2
        assert torch.equal(run(pipe, call), fast)


# --- loops -----------------------------------------------------------------------------------------------------------


def test_modular_pipelines_that_share_their_blocks_are_distinguished() -> None:
    blocks = FluxCoreDenoiseStep()
    pipe, other = MODULAR["flux"].build(blocks=blocks), MODULAR["flux"].build(blocks=blocks)
    loop = blocks.sub_blocks["denoise"]
    pipe._blocks = other._blocks = blocks
    assert loop in host.looping_blocks(pipe)
    call = MODULAR["flux"].call(pipe)
    untouched = run(other, call)
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(run(other, call), untouched)
        assert report(pipe).runs == 0
        assert not torch.equal(run(pipe, call), untouched)
        assert report(pipe).runs == 1
    assert "progress_bar" not in vars(loop)
    assert "loop_step" not in vars(loop)


def test_a_modular_pipeline_without_a_guider_is_calibrated() -> None:
    pipe = MODULAR["flux"].build()
    call = MODULAR["flux"].call(pipe)
    calls = [call | {"generator": torch.Generator().manual_seed(k), "output": "latents"} for k in range(3)]
    schedule = optimize(pipe, calls, 3, time_limit_s=2)
    assert schedule.provenance["fit_target"] == "state"
    assert schedule.computed_steps == 3
    untouched = run(pipe, call)
    with accelerated(pipe, schedule):
        fast = run(pipe, call)
    with accelerated(pipe, "uniform:every=2"):
        assert (fast - untouched).norm() < (run(pipe, call) - untouched).norm()


@pytest.mark.parametrize("name", ["flux", "qwen_image", "ltx", "sd3"])
def test_moved_noise_levels_are_those_that_the_loop_runs_over(name: str) -> None:
    pipe = MODULAR[name].build()
    call = MODULAR[name].call(pipe)
    untouched = run(pipe, call)
    found = pipe.scheduler.sigmas.clone()
    moved = found.double().numpy().copy()
    moved[2] = moved[2:4].mean()
    with accelerated(pipe, replace(bound(pipe, hold("######")), sigmas=moved)):
        there = run(pipe, call)
    assert torch.equal(pipe.scheduler.sigmas, found)
    inner = pipe.scheduler.set_timesteps

    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        pipe.scheduler.sigmas.copy_(torch.from_numpy(moved))
        pipe.scheduler.timesteps.copy_(torch.from_numpy(1000 * moved[:-1]))

    pipe.scheduler.set_timesteps = set_timesteps
    assert torch.equal(run(pipe, call), there)
    assert not torch.equal(there, untouched)


class Chunk(ModularPipelineBlocks):
    """Three steps and no progress bar, as the blocks have it that go through a film chunk by chunk."""

    expected_components = (  # type: ignore[assignment]
        ComponentSpec("transformer", WanTransformer3DModel),
        ComponentSpec("scheduler", UniPCMultistepScheduler),
    )

    def __call__(self, components: Any, state: Any, k: int) -> Any:
        components.scheduler.set_timesteps(3)
        for t in components.scheduler.timesteps:
            out = components.transformer(state.latents, t[None], state.prompt_embeds, return_dict=False)[0]
            state.latents = components.scheduler.step(out, t, state.latents, return_dict=False)[0]
        return components, state


class Chunks(LoopSequentialPipelineBlocks):
    block_classes: ClassVar = [Chunk]
    block_names: ClassVar = ["chunk"]
    loop_inputs: ClassVar = [InputParam("latents"), InputParam("prompt_embeds")]
    loop_intermediate_outputs: ClassVar = [OutputParam("latents")]

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        with self.progress_bar(total=6):
            for k in range(2):
                components, block_state = self.loop_step(components, block_state, k=k)
        self.set_block_state(state, block_state)
        return components, state


def test_chunks_whose_loop_is_out_of_sight_are_left_alone_and_said() -> None:
    pipe = MODULAR["wan"].build(blocks=SequentialPipelineBlocks.from_blocks_dict({"chunks": Chunks()}))
    call = {k: v for k, v in MODULAR["wan"].call(pipe).items() if k in ("latents", "prompt_embeds")}
    chunks = functools.partial(pipe, **call, output="latents")
    untouched = chunks()
    with accelerated(pipe, "uniform:every=2"):
        with pytest.warns(FailedOpen, match="its sampling loop was not seen"):
            assert torch.equal(chunks(), untouched)
        assert report(pipe).runs == 0


def test_a_modular_pipeline_with_a_progress_bar_skips() -> None:
    pipe = MODULAR["flux"].build()
    pipe.progress_bar = lambda *args, **kwargs: None
    pipe.maybe_free_model_hooks = lambda: None
    call = MODULAR["flux"].call(pipe)
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, call)
        assert report(pipe).skipped == pytest.approx(0.5, abs=0.2)
