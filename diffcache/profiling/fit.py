"""The closed-loop fit: coefficients of equation (1) that bring the accelerated run back onto the full run's states.

Walk the accelerated trajectories of all calibration samples side by side. At a computed step, run the denoiser where
the accelerated run really is. At a predicted step, choose the few weights so that the state after
``scheduler.step`` comes nearest, in least squares, to the state the full run had there. Fitting the state instead of
the output makes every prediction also repair the drift that earlier ones left behind; fitting on the accelerated
trajectory instead of the clean one leaves no bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffcache.profiling.replay import Position, Replay

ANCHORS = 3  # a fourth was measured to add nothing
RIDGE = 1e-9  # relative to the regressors' energy; differences of neighbouring outputs are nearly collinear


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where all replays stand before a step, and what they remember: anchor steps newest first, outputs by anchor."""

    positions: tuple[Position, ...]
    anchors: tuple[int, ...]
    outputs: tuple[Mapping[int, Sequence[Tensor]], ...]  # per replay: anchor step -> branch outputs


@dataclass(frozen=True, slots=True)
class Fit:
    """weights float64 [B, T, K]; ``error_db`` per sample: PSNR of the final state against the full run's, with the
    reference's own range as peak; ``checkpoints[i]``: the run before step i."""

    compute: np.ndarray
    weights: np.ndarray
    error_db: np.ndarray
    checkpoints: Mapping[int, Checkpoint]

    @property
    def score(self) -> float:
        """Mean over samples, in dB: higher is better."""
        return float(self.error_db.mean())


def fit(
    replays: Sequence[Replay],
    compute: np.ndarray,
    *,
    per_branch: bool = True,
    anchors: int = ANCHORS,
    resume: Fit | None = None,
) -> Fit:
    """Closed-loop fit of the mask ``compute`` (bool [steps of the loop]).

    per_branch  separate weights for each guidance branch, else one set for all
    resume      an earlier fit whose mask agrees up to some step: its run is taken over up to there
    """
    steps = len(compute)
    branches = replays[0].branches if per_branch else 1
    weights = np.zeros((branches, steps, anchors))
    first = _first_difference(compute, resume)
    checkpoints: dict[int, Checkpoint] = {}
    if resume is not None and first > 0:
        weights[:, :first] = resume.weights[:, :first]
        checkpoints = {i: c for i, c in resume.checkpoints.items() if i <= first}
        here = checkpoints[first]
    else:
        here = Checkpoint(tuple(r.start for r in replays), (), tuple({} for _ in replays))
    for i in range(first, steps):
        checkpoints[i] = here
        if compute[i]:
            here = _computed(replays, i, here, anchors)
        else:
            weights[:, i, : len(here.anchors)] = w = _solve(replays, i, here, branches)
            here = _predicted(replays, i, here, w)
    error_db = np.concatenate([_psnr(p.state, r.reference(steps - 1), r.copies) for p, r in zip(here.positions, replays, strict=True)])
    return Fit(compute.copy(), weights, error_db, checkpoints)


def run(replays: Sequence[Replay], compute: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """PSNR in dB per sample of the final state for given coefficients [B, T, K]: nothing is fitted here."""
    anchors = weights.shape[2]
    here = Checkpoint(tuple(r.start for r in replays), (), tuple({} for _ in replays))
    for i in range(len(compute)):
        if compute[i]:
            here = _computed(replays, i, here, anchors)
        else:
            here = _predicted(replays, i, here, weights[:, i, : len(here.anchors)])
    last = len(compute) - 1
    return np.concatenate([_psnr(p.state, r.reference(last), r.copies) for p, r in zip(here.positions, replays, strict=True)])


def _computed(replays: Sequence[Replay], i: int, here: Checkpoint, most: int) -> Checkpoint:
    kept = (i, *here.anchors)[:most]
    positions, outputs = [], []
    for replay, position, history in zip(replays, here.positions, here.outputs, strict=True):
        fresh = replay.compute(i, position)
        positions.append(replay.move(i, position, replay.guided(i, fresh)))
        outputs.append({a: fresh if a == i else history[a] for a in kept})
    return Checkpoint(tuple(positions), kept, tuple(outputs))


def _predicted(replays: Sequence[Replay], i: int, here: Checkpoint, weights: np.ndarray) -> Checkpoint:
    positions = []
    for replay, position, history in zip(replays, here.positions, here.outputs, strict=True):
        guess = []
        for b in range(replay.branches):
            row = weights[min(b, len(weights) - 1)]
            guess.append(sum((history[a][b] * float(w) for a, w in zip(here.anchors, row, strict=True)), torch.zeros(())))
        positions.append(replay.move(i, position, replay.guided(i, guess)))
    return Checkpoint(tuple(positions), here.anchors, here.outputs)


def _solve(replays: Sequence[Replay], i: int, here: Checkpoint, branches: int) -> np.ndarray:
    """Weights [branches, anchors now] that bring the next state nearest to the reference, over all replays.

    Normal equations, summed over replays; regressors are the newest output and the differences between neighbouring
    anchors (well scaled where the outputs themselves are nearly parallel).
    """
    count = len(here.anchors)
    size = branches * count
    gram, moment = np.zeros((size, size)), np.zeros(size)
    for replay, position, history in zip(replays, here.positions, here.outputs, strict=True):
        at_zero, gain = replay.affine(i, position)
        target = (replay.reference(i).double() - at_zero.double())[: len(at_zero) // replay.copies].flatten()
        columns = []
        for group in range(branches):
            members = [group] if branches > 1 else range(replay.branches)
            by_anchor = [
                sum((history[a][b].double() * replay.guidance[i][b] for b in members), torch.zeros((), dtype=torch.double))
                for a in here.anchors
            ]
            columns.append(by_anchor[0])
            columns += [by_anchor[k] - by_anchor[k + 1] for k in range(count - 1)]
        stacked = torch.stack([c.flatten() for c in columns]) * gain
        gram += (stacked @ stacked.T).cpu().numpy()
        moment += (stacked @ target).cpu().numpy()
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    normal = gram / np.outer(scale, scale) + RIDGE * np.eye(size)
    solution = (np.linalg.solve(normal, moment / scale) / scale).reshape(branches, count)
    # c_0 F_0 + Σ c_k (F_{k-1} - F_k)  ->  weights of the F_k themselves
    weights = np.zeros_like(solution)
    weights[:, 0] = solution[:, 0]
    weights[:, :-1] += solution[:, 1:]
    weights[:, 1:] -= solution[:, 1:]
    return weights


def _first_difference(compute: np.ndarray, resume: Fit | None) -> int:
    if resume is None:
        return 0
    differing = np.flatnonzero(compute != resume.compute)
    return int(differing[0]) if len(differing) else len(compute) - 1


def _psnr(state: Tensor, reference: Tensor, copies: int) -> np.ndarray:
    """Per sample, in dB; the peak is the reference sample's own range."""
    n = len(state) // copies
    a, b = state[:n].double().flatten(1), reference[:n].double().flatten(1)
    mse = (a - b).square().mean(1).clamp(min=1e-20)
    peak = b.amax(1) - b.amin(1)
    return (10 * torch.log10(peak**2 / mse)).cpu().numpy()
