"""The tiny pipelines are what `pipelines.py` says they are; every other test leans on this."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from pipelines import SCHEDULERS, TINY, Call, blocks, fresh, run, shared, watch, with_scheduler
from torch import Tensor, nn

every = pytest.mark.parametrize("name", TINY)
BRANCHES = {"none": 1, "separate": 2, "batched": 1}


@functools.cache
def reference(name: str) -> tuple[Tensor, list[Call]]:
    """Return the default run of an unchanged pipeline, and the calls of its denoisers."""
    pipe, tiny = shared(name), TINY[name]
    with watch(pipe, tiny.denoisers) as calls:
        output = run(pipe, tiny.call(pipe))
    return output, calls


def by_branch(name: str) -> list[list[Call]]:
    """The calls of the default run, one list per branch."""
    calls, branches = reference(name)[1], BRANCHES[TINY[name].guidance]
    return [calls[branch::branches] for branch in range(branches)]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / other.norm())


def effect_of_block(name: str, pipe: Any, block: nn.Module, baseline: Tensor) -> float:
    """How far the result of a short run moves when every parameter of this block is zero."""
    kept = [parameter.clone() for parameter in block.parameters()]
    try:
        for parameter in block.parameters():
            parameter.zero_()
        return distance(short_run(name, pipe), baseline)
    finally:
        for parameter, values in zip(block.parameters(), kept, strict=True):
            parameter.copy_(values)


def short_run(name: str, pipe: Any) -> Tensor:
    """Three steps: enough for the second of two denoisers to be called."""
    return run(pipe, TINY[name].call(pipe), num_inference_steps=3)


@every
def test_a_run_is_finite_and_does_not_explode(name: str) -> None:
    output, _ = reference(name)
    assert output.dtype == torch.float32
    assert bool(output.isfinite().all())
    assert 0.1 < float(output.std()) < 10


@every
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    pipe = shared(name)
    assert torch.equal(run(pipe, TINY[name].call(pipe)), reference(name)[0])


@pytest.mark.parametrize("name", ["flux", "sd3_controlnet"])  # the second draws from the global generator
def test_a_run_neither_depends_on_the_global_generator_nor_moves_it(name: str) -> None:
    pipe, expected = shared(name), reference(name)[0]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert torch.equal(run(pipe, TINY[name].call(pipe)), expected)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_a_second_build_gives_the_same_bits(name: str) -> None:
    pipe = fresh(name)
    assert pipe is not shared(name)
    assert torch.equal(run(pipe, TINY[name].call(pipe)), reference(name)[0])


@every
def test_another_seed_gives_another_result(name: str) -> None:
    pipe = shared(name)
    assert distance(run(pipe, TINY[name].call(pipe), seed=1), reference(name)[0]) > 0.05


@every
def test_everything_is_float32_on_the_cpu_in_evaluation_mode(name: str) -> None:
    for component in shared(name).components.values():
        if isinstance(component, nn.Module):
            assert not any(module.training for module in component.modules())
            assert {(p.device.type, p.dtype) for p in component.parameters()} <= {("cpu", torch.float32)}


@every
def test_no_parameter_of_a_denoiser_or_controlnet_is_constant(name: str) -> None:
    pipe = shared(name)
    for component in (*TINY[name].denoisers, "controlnet"):
        module = getattr(pipe, component, None)
        for key, parameter in module.named_parameters() if module is not None else ():
            assert parameter.numel() == 1 or float(parameter.std()) > 1e-3, key


@every
def test_denoisers_are_called_once_per_step_and_branch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, tiny = shared(name), TINY[name]
    kind = type(pipe.scheduler)
    step, stepped = kind.step, []

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepped.append(self is pipe.scheduler)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", count)
    with watch(pipe, tiny.denoisers) as calls:
        run(pipe, tiny.call(pipe))
    assert sum(stepped) == tiny.steps
    assert len(calls) == tiny.steps * BRANCHES[tiny.guidance]
    assert {call.component for call in calls} == set(tiny.denoisers)


@every
def test_guidance_is_on_and_of_the_declared_kind(name: str) -> None:
    tiny = TINY[name]
    branches = by_branch(name)
    assert {call.batch for calls in branches for call in calls} == {2 if tiny.guidance == "batched" else 1}
    if tiny.guidance == "batched":
        pairs = [(call.output[0], call.output[1]) for call in branches[0]]
    elif tiny.guidance == "separate":
        pairs = [(one.output, other.output) for one, other in zip(*branches, strict=True)]
        for one, other in zip(*branches, strict=True):
            assert one.component == other.component
            assert torch.equal(one.timestep, other.timestep)
    else:
        return
    # The two branches see different prompts and say different things.
    assert min(distance(one, other) for one, other in pairs) > 0.01


@every
def test_the_denoiser_says_something_new_at_every_timestep(name: str) -> None:
    for calls in by_branch(name):
        for before, after in itertools.pairwise(calls):
            # A scheduler that evaluates twice asks again at the same timestep, of nearly the same sample.
            if before.component == after.component and not torch.equal(before.timestep, after.timestep):
                assert distance(after.output, before.output) > 0.01


@every
def test_every_block_has_a_say_in_the_result(name: str) -> None:
    pipe = shared(name)
    baseline = short_run(name, pipe)
    for component in TINY[name].denoisers:
        found = blocks(getattr(pipe, component))
        assert len(found) > 1
        for key, block in found.items():
            assert effect_of_block(name, pipe, block, baseline) > 1e-3, f"{component}.{key}"
    assert torch.equal(short_run(name, pipe), baseline)


def test_a_block_behind_a_closed_gate_would_be_noticed() -> None:
    pipe = fresh("dit")
    block = pipe.transformer.transformer_blocks[1]
    for parameter in block.norm1.linear.parameters():
        parameter.zero_()
    assert effect_of_block("dit", pipe, block, short_run("dit", pipe)) == 0


@every
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    call = tiny.call(pipe, batch=2)
    pair = run(pipe, call, seed=[0, 1])
    assert distance(pair[1], pair[0]) > 0.05
    assert torch.equal(run(pipe, call, seed=[0, 2])[0], pair[0])
    if name != "sd3_controlnet":  # its control image is encoded with noise from the global generator, of another shape
        torch.testing.assert_close(pair[0], reference(name)[0][0], rtol=1e-3, atol=1e-3)


@every
def test_results_can_be_decoded(name: str) -> None:
    pipe = shared(name)
    decoded = run(pipe, TINY[name].call(pipe), num_inference_steps=3, output_type="pt")
    assert bool(decoded.isfinite().all())
    assert float(decoded.std()) > 0.05


@pytest.mark.parametrize(("name", "scheduler"), [(name, one) for name, many in SCHEDULERS.items() for one in many])
def test_another_noise_scheduler_runs_and_repeats(name: str, scheduler: str) -> None:
    tiny, pipe = TINY[name], with_scheduler(fresh(name), scheduler)
    with watch(pipe, tiny.denoisers) as calls:
        output = run(pipe, tiny.call(pipe))
    assert bool(output.isfinite().all())
    assert 0.1 < float(output.std()) < 10
    assert torch.equal(run(pipe, tiny.call(pipe)), output)
    left = pipe.scheduler.timesteps[getattr(pipe.scheduler, "begin_index", None) or 0 :]
    if name != "sdxl_img2img":  # a scheduler without a begin index does not say where the pipeline started
        assert len(calls) == len(left) * BRANCHES[tiny.guidance]


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_arguments_can_be_replaced(name: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    with watch(pipe, tiny.denoisers) as calls:
        run(pipe, tiny.call(pipe), num_inference_steps=4)
    assert len(calls) == tiny.steps - 2
    run(pipe, tiny.call(pipe))
    assert len(calls) == tiny.steps - 2  # nothing listens after the block
