"""What the output of each step adds to later states, found by stepping a copy of the noise scheduler."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffcache.host import propagation

pytestmark = pytest.mark.fast
STEPS = 9


def begun(scheduler: Any) -> Any:
    scheduler.set_timesteps(STEPS)
    return scheduler


def end_of(scheduler: Any, outputs: torch.Tensor) -> float:
    """Return the last state of a loop of one number that starts at 0, by the noise scheduler itself."""
    stepped, state = copy.deepcopy(scheduler), torch.zeros(1, 1, 1, 1)
    for output, t in zip(outputs, stepped.timesteps, strict=True):
        scaled = stepped.scale_model_input(state, t) if hasattr(stepped, "scale_model_input") else state
        del scaled  # called because some noise schedulers find their place in the loop there
        state = stepped.step(output.reshape(1, 1, 1, 1), t, state, return_dict=False)[0]
    return float(state)


def test_of_euler_steps_of_flow_matching_it_is_the_differences_of_noise_levels() -> None:
    scheduler = begun(diffusers.FlowMatchEulerDiscreteScheduler())
    found = propagation(scheduler, scheduler.timesteps)
    assert found is not None
    wanted = np.tril(np.broadcast_to(np.diff(scheduler.sigmas.numpy()), (STEPS, STEPS)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.DDIMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.PNDMScheduler,
    ],
)
def test_it_predicts_the_end_of_a_loop_with_any_outputs(kind: Any) -> None:
    scheduler = begun(kind(clip_sample=False) if kind is diffusers.DDIMScheduler else kind())
    steps = len(scheduler.timesteps)
    outputs = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    found = propagation(scheduler, scheduler.timesteps)
    assert found is not None
    end = end_of(scheduler, outputs)
    assert float(found[-1] @ outputs.double().numpy()) == pytest.approx(
        end, rel=1e-3, abs=1e-3 * np.abs(found[-1]).max()
    )
    assert (
        abs(float(found[-1] @ outputs.flip(0).double().numpy()) - end) > 1e-2 * np.abs(found[-1]).max()
    )  # outputs count


def test_noise_that_a_step_draws_cancels() -> None:
    scheduler = begun(diffusers.EulerAncestralDiscreteScheduler())
    first, second = (propagation(scheduler, scheduler.timesteps) for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first, second)
    assert (np.abs(first[-1]) < 1e3).all()  # noise of unit size over outputs of SMALL would be larger


def test_the_global_generator_is_as_before() -> None:
    scheduler = begun(diffusers.EulerAncestralDiscreteScheduler())
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    propagation(scheduler, scheduler.timesteps)
    assert torch.equal(torch.randn(3), wanted)


def test_the_noise_scheduler_is_as_before() -> None:
    scheduler = begun(diffusers.UniPCMultistepScheduler())
    propagation(scheduler, scheduler.timesteps)
    assert scheduler.step_index is None
    assert not any(output is not None for output in scheduler.model_outputs)


def test_steps_before_the_start_add_nothing() -> None:
    scheduler = begun(diffusers.DDIMScheduler())
    found = propagation(scheduler, scheduler.timesteps, start=4)
    assert found is not None
    assert not found[:4].any()
    assert not found[:, :4].any()
    assert found[-1, 4:].all()


def test_a_noise_scheduler_with_another_step_is_not_known() -> None:
    scheduler = begun(diffusers.CogVideoXDPMScheduler())
    assert propagation(scheduler, scheduler.timesteps) is None
