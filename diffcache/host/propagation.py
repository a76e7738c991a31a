"""Compute how a noise scheduler carries the outputs of the network into the state, without running the network."""

from __future__ import annotations

import copy
import logging
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
        # Steps may draw noise from the global generators. The run after this must draw what it would have drawn.
        with torch.random.fork_rng(devices=[timesteps.device] if timesteps.device.type == "cuda" else []):
            found = _stepped(scheduler, timesteps, start, SMALL * torch.eye(steps))
            if np.triu(found, 1).any():  # later outputs add nothing to earlier states, so the steps draw noise
                found -= _stepped(scheduler, timesteps, start, torch.zeros(steps, steps))
    except Exception as error:  # third-party code: a step that takes other arguments, for example
        name = type(scheduler).__name__
        logging.getLogger("diffcache").info("%s cannot be stepped outside its pipeline: %s", name, error)
        return None
    return found / SMALL if np.isfinite(found).all() else None


def _stepped(scheduler: Any, timesteps: Tensor, start: int, outputs: Tensor) -> np.ndarray:
    """Return the states after all steps, float64 [T, T], of a loop whose network returns ``outputs`` [T, T]."""
    torch.manual_seed(0)
    stepped, device = copy.deepcopy(scheduler), timesteps.device
    state = torch.zeros(1, len(timesteps), 1, 1, device=device)
    states = [state] * start
    for i in range(start, len(timesteps)):
        if hasattr(stepped, "scale_model_input"):  # some noise schedulers find their place in the loop there
            stepped.scale_model_input(state, timesteps[i])
        output = outputs[i].to(device).reshape(state.shape)
        state = stepped.step(output, timesteps[i], state, return_dict=False)[0]
        states.append(state)
    return torch.stack([state.flatten() for state in states]).double().cpu().numpy()  # the device is read once
