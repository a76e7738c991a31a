"""Measure the dynamics of a recorded loop: how the sampler and the network pass errors on."""

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
    """Measure the Gram tables of the guided outputs and the sampler's reach. The network's response is 0 here."""
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
    """Compute Gram tables of one run's guided outputs, float64 [N, T, T], and the ranges of its final states [N]."""
    steps = len(replay.steps)
    guided = [replay.looked_at(replay.guided(i, replay.recorded_residuals(i))).double() for i in range(steps)]
    outputs = torch.stack(guided, 1).flatten(2)
    table = (outputs @ outputs.mT / outputs.shape[2]).cpu().numpy()
    end = replay.looked_at(replay.reference(steps - 1)).double().flatten(1)
    return (table + table.transpose(0, 2, 1)) / 2, (end.amax(1) - end.amin(1)).cpu().numpy()


def with_answer(dynamics: Dynamics, sums: np.ndarray) -> Dynamics:
    """Return ``dynamics`` with the network's response to errors of the state, from real closed-loop runs.

    The response of a sample is found by least squares at computed steps. The median over the samples counts: a sample
    that leaves the full run's trajectory has errors and answers many times as large as all others, and would decide a
    mean alone. The response is linear between computed steps.

    Args:
        dynamics: The dynamics. They are returned unchanged if no run deviated from the full run.
        sums: float64 [3, S, T], the ``answers`` of these runs, of all samples.
    """
    product, energy, square = sums
    known = np.flatnonzero((energy > 0).any(0))
    if not len(known):
        return dynamics
    found = np.zeros((2, len(known)))
    for n, step in enumerate(known):
        moved = energy[:, step] > 0
        parts, squares = (table[moved, step] / energy[moved, step] for table in (product, square))
        part = float(np.median(parts))
        found[:, n] = part, max(float(np.median(squares - 2 * part * parts + part**2)), 0.0)
    response, spread = (np.interp(np.arange(energy.shape[1]), known, row) for row in found)
    return dataclasses.replace(dynamics, response=response, spread=spread)


def answers(replays: Sequence[Replay], fit: Fit) -> np.ndarray:
    """Compute sums that determine the network's response to errors of the state, and its spread.

    Args:
        replays: The replays of the fit. Held-out replays, which come last in a fit, may be left out.
        fit: A fit with its checkpoints.

    Returns:
        float64 [3, S, T], for each sample of the replays: products of the network's answer with the state's error,
        squares of the error, squares of the answer. Sums of several runs of the same samples can be added.
    """
    found = np.zeros((3, sum(replay.samples for replay in replays), len(fit.compute)))
    for i in np.flatnonzero(fit.compute)[1:]:
        before, after = fit.checkpoints[i], fit.checkpoints.get(i + 1)
        if after is None:
            continue
        first = 0
        for replay, position, residuals in zip(replays, before.positions, after.residuals, strict=False):
            error = _flat(replay.looked_at(position.state)) - _flat(replay.looked_at(replay.reference(i - 1)))
            new, old = (replay.guided(i, outputs) for outputs in (residuals[i], replay.recorded_residuals(i)))
            change = _flat(replay.looked_at(new)) - _flat(replay.looked_at(old))
            rows = slice(first, first := first + replay.samples)
            for table, (a, b) in zip(found, ((change, error), (error, error), (change, change)), strict=True):
                table[rows, i] = (a * b).sum(1).cpu().numpy()
    return found


def measure_reach(replay: Replay) -> np.ndarray:
    """Measure how much each step's output, or its residual, adds to every later state.

    The noise scheduler runs with outputs of 0, and with a 1 at one step. A noise scheduler treats all elements alike,
    so a state of one element per sample is enough. Samples are separate because each may draw its own noise, which is
    the same in both runs and cancels.

    Returns:
        float64 [T, T], at [i, j]: the contribution of the output of step j to the state after step i.
    """
    steps = len(replay.steps)
    like = replay.reference(0)
    none = torch.zeros([len(like)] + [1] * (like.ndim - 1), device=like.device)  # in float32 for every dtype
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
    """Return the elements of each sample as float64, [N, elements]."""
    return tensor.double().flatten(1)
