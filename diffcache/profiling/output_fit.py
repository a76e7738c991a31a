"""The fallback fit: least squares to the outputs themselves, on the full run's trajectory.

For pipelines whose loop cannot be replayed (guidance that renormalises, fresh noise at every step, lists of samples).
Measured to be weaker than the closed-loop fit to the states; the schedule's provenance says which one was used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffcache.profiling.record import Trajectory

ANCHORS = 3
RIDGE = 1e-6


def fit_outputs(trajectories: Sequence[Trajectory], compute: np.ndarray) -> np.ndarray:
    """Weights [1, T, K] for the mask ``compute`` (bool [T]), shared by all branches."""
    steps = len(compute)
    weights = np.zeros((1, steps, ANCHORS))
    gram = _gram(trajectories, steps)
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[:i])[::-1][:ANCHORS]
        normal = gram[np.ix_(anchors, anchors)]
        ridge = RIDGE * np.trace(normal) / len(anchors) * np.eye(len(anchors))
        # Shrunk towards plain reuse of the newest output, which the ridge alone would shrink towards zero.
        reuse = np.eye(len(anchors))[0]
        weights[0, i, : len(anchors)] = np.linalg.solve(normal + ridge, gram[anchors, i] + ridge @ reuse)
    return weights


def _gram(trajectories: Sequence[Trajectory], steps: int) -> np.ndarray:
    """Inner products of outputs at step pairs, summed over samples and branches; calls missing at either step skipped."""
    gram = np.zeros((steps, steps))
    for trajectory in trajectories:
        calls = max(len(s.calls) for s in trajectory.steps)
        for ordinal in range(calls):
            there = [i for i, s in enumerate(trajectory.steps) if len(s.calls) > ordinal]
            rows = torch.stack([trajectory.steps[i].calls[ordinal].output.double().flatten() for i in there])
            gram[np.ix_(there, there)] += (rows @ rows.T).cpu().numpy()
    return gram
