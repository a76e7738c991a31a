"""Measure, on recorded trajectories, what the closed-loop planner needs to know of the sampler and the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.profile import Dynamics
from diffcache.profiling.fitting.fit import Fit
from diffcache.profiling.replay.replay import Position, Replay


def measure_dynamics(replays: Sequence[Replay]) -> Dynamics:
    """Gram tables of the guided outputs and the sampler's reach; the network's answer is 0 until measured."""
    tables, ranges = zip(*map(grams_and_peaks, replays), strict=True)
    silent = np.zeros(len(replays[0].steps))
    return Dynamics(
        grams=np.concatenate(tables),
        peaks=np.concatenate(ranges),
        reach=measure_reach(replays[0]),
        response=silent,
        spread=silent,
    )


def grams_and_peaks(replay: Replay) -> tuple[np.ndarray, np.ndarray]:
    """Of one run: Gram tables of the guided outputs float64 [N, T, T], and the final states' ranges [N]."""
    steps = len(replay.steps)
    guided = [replay.looked_at(replay.guided(i, replay.recorded_rests(i))).double() for i in range(steps)]
    outputs = torch.stack(guided, 1).flatten(2)
    table = (outputs @ outputs.mT / outputs.shape[2]).cpu().numpy()
    end = replay.looked_at(replay.reference(steps - 1)).double().flatten(1)
    return (table + table.transpose(0, 2, 1)) / 2, (end.amax(1) - end.amin(1)).cpu().numpy()


def with_answer(dynamics: Dynamics, sums: np.ndarray) -> Dynamics:
    """How the network answered to the states' errors in real closed-loop runs, ``answers`` added up: by least squares
    per computed step and linear in between. As it was if no run ever strayed."""
    product, energy, square = sums
    known = np.flatnonzero(energy > 0)
    if not len(known):
        return dynamics
    part = product[known] / energy[known]
    rest = np.maximum(square[known] / energy[known] - part**2, 0)
    response, spread = (np.interp(np.arange(len(energy)), known, found) for found in (part, rest))
    return dataclasses.replace(dynamics, response=response, spread=spread)


def answers(replays: Sequence[Replay], fit: Fit) -> np.ndarray:
    """Sums that tell the response and its spread, float64 [3, T]: of products of the network's answer with the state's
    error, of squares of the error, of squares of the answer. Sums of several runs may be added up; replays held out,
    which stand last in a fit, may be left out."""
    product, energy, square = np.zeros((3, len(fit.compute)))
    for i in np.flatnonzero(fit.compute)[1:]:
        before, after = fit.checkpoints[i], fit.checkpoints.get(i + 1)
        if after is None:
            continue
        for replay, position, rests in zip(replays, before.positions, after.rests, strict=False):
            error = _flat(replay.looked_at(position.state)) - _flat(replay.looked_at(replay.reference(i - 1)))
            new, old = (replay.guided(i, outputs) for outputs in (rests[i], replay.recorded_rests(i)))
            change = _flat(replay.looked_at(new)) - _flat(replay.looked_at(old))
            product[i] += float(change @ error)
            energy[i] += float(error @ error)
            square[i] += float(change @ change)
    return np.stack([product, energy, square])


def measure_reach(replay: Replay) -> np.ndarray:
    """What each step's output, or its rest, adds to every later state, found by handing the noise scheduler a one among
    zeros.

    A noise scheduler treats all elements alike, so a state of one element per sample tells all. Samples stay apart
    because each may bring its own noise, which is the same with and without the one, and cancels.
    """
    steps = len(replay.steps)
    like = replay.reference(0)
    none = torch.zeros([len(like)] + [1] * (like.ndim - 1), device=like.device)  # in float32, whatever the loop's dtype
    quiet = [Position(none, replay.start.scheduler)]
    for i, step in enumerate(replay.steps):
        quiet.append(quiet[-1].moved(step, replay.whole(i, none, quiet[-1])))
    reach = np.zeros((steps, steps))
    for j in range(steps):
        position = quiet[j]
        for i in range(j, steps):
            rest = torch.ones_like(none) if i == j else none
            position = position.moved(replay.steps[i], replay.whole(i, rest, position))
            reach[i, j] = float((position.state.double() - quiet[i + 1].state.double()).mean())
    return reach


def _flat(tensor: Tensor) -> Tensor:
    return tensor.double().flatten()
