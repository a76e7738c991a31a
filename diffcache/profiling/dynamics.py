"""Measure, on recorded trajectories, what the closed-loop planner needs to know of the sampler and the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.profiling.fit import Fit
from diffcache.profiling.replay import Replay
from diffcache.schedulers.closed_loop import Dynamics


def measure_dynamics(replays: Sequence[Replay]) -> Dynamics:
    """Gram table of the guided outputs and the sampler's gains; the network's response is 0 until measured."""
    steps = len(replays[0].steps)
    gram, elements = np.zeros((steps, steps)), 0
    for replay in replays:
        rows = torch.stack([_flat(replay.guided(i, replay.recorded(i))) for i in range(steps)])
        gram += (rows @ rows.T).cpu().numpy()
        elements += rows.shape[1]
    state_gain, output_gain = np.zeros(steps), np.zeros(steps)
    position = replays[0].start
    for i in range(steps):
        at_zero, output_gain[i] = replays[0].affine(i, position)
        x = _flat(position.state)
        state_gain[i] = float(_flat(at_zero) @ x / (x @ x))
        position = replays[0].move(i, position, replays[0].guided(i, replays[0].recorded(i)))
    return Dynamics(gram / elements, state_gain, output_gain, np.zeros(steps))


def with_response(dynamics: Dynamics, replays: Sequence[Replay], fits: Sequence[Fit]) -> Dynamics:
    """How the network answered to the states' errors in real closed-loop runs, by least squares per computed step and
    linear in between."""
    steps = len(dynamics.response)
    product, energy = np.zeros(steps), np.zeros(steps)
    for fit in fits:
        for i in np.flatnonzero(fit.compute)[1:]:
            before, after = fit.checkpoints[i], fit.checkpoints.get(i + 1)
            if after is None:
                continue
            for replay, position, outputs in zip(replays, before.positions, after.outputs, strict=True):
                count = len(position.state) // replay.copies
                error = _flat((position.state - replay.reference(i - 1))[:count])
                change = _flat(replay.guided(i, outputs[i])) - _flat(replay.guided(i, replay.recorded(i)))
                product[i] += float(change @ error)
                energy[i] += float(error @ error)
    known = np.flatnonzero(energy > 0)
    if not len(known):
        return dynamics
    response = np.interp(np.arange(steps), known, product[known] / energy[known])
    return Dynamics(dynamics.gram, dynamics.state_gain, dynamics.output_gain, response)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.double().flatten()
