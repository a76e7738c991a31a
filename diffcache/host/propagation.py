"""Compute how a noise scheduler carries the outputs of the network into the state, without running the network."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = 1e-3  # small enough that noise schedulers which clip or threshold their estimates leave it unchanged


@torch.no_grad()
def propagation(scheduler: Any, timesteps: Tensor, start: int = 0) -> np.ndarray | None:
    """Return what the output of each step adds to the later states.

    A copy of the noise scheduler steps a state that has one element for each step of the loop. Step j adds to element
    j alone, so one pass finds all of them.

    Args:
        scheduler: The noise scheduler, at the beginning of a loop. It remains unchanged.
        timesteps: The timesteps [T] of the loop.
        start: The iteration at which the loop begins.

    Returns:
        float64 [T, T], at [i, j]: the change of the state after step i per unit of change of the output of step j. None
        if the noise scheduler cannot be stepped outside its pipeline.
    """
    steps = len(timesteps)
    try:
        found = _stepped(scheduler, timesteps, start, SMALL * torch.eye(steps)) - _stepped(
            scheduler, timesteps, start, torch.zeros(steps, steps)
        )
    except Exception:  # third-party code: a step that takes other arguments, for example
        return None
    return found / SMALL if np.isfinite(found).all() else None


def _stepped(scheduler: Any, timesteps: Tensor, start: int, outputs: Tensor) -> np.ndarray:
    """Return the states after all steps, float64 [T, T], of a loop whose network returns ``outputs`` [T, T]."""
    stepped = copy.deepcopy(scheduler)
    known = inspect.signature(stepped.step).parameters
    device = timesteps.device
    more = {"generator": torch.Generator().manual_seed(0)} if "generator" in known and device.type == "cpu" else {}
    states = np.zeros((len(timesteps), len(timesteps)))
    state = torch.zeros(1, len(timesteps), 1, 1, device=device)
    for i in range(start, len(timesteps)):
        if hasattr(stepped, "scale_model_input"):  # some noise schedulers find their place in the loop there
            stepped.scale_model_input(state, timesteps[i])
        output = outputs[i].to(device).reshape(state.shape)
        state = stepped.step(output, timesteps[i], state, return_dict=False, **more)[0]
        states[i] = state.double().flatten().cpu().numpy()
    return states
