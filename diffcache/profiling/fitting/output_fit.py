"""Fit weights to the outputs of the full run by least squares, for loops that cannot be replayed.

Such loops have guidance that renormalises, or states that are lists of samples, for instance. This fit was measured to
be weaker than the closed-loop fit to the states. The schedule's provenance records which fit was used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from diffcache.profiling.recording.record import Trajectory

ANCHORS = 5
RIDGE = 1e-6
LOG = logging.getLogger("diffcache")


class WeakerFit(RuntimeWarning):
    """The loop cannot be repeated without its pipeline, so there was no search.

    The mask is spread evenly, and the weights are fitted to the outputs instead of the final state.

    Example:
        >>> warnings.simplefilter("error", diffcache.WeakerFit)  # refuse schedules of the weaker fit
        >>> schedule = diffcache.optimize(loop, calls, 10)
    """


def warn_of_weaker_fit(reason: str, scheduler: str) -> None:
    """Log and warn that outputs are fitted instead of the final state, with the reason."""
    mask = "the mask is spread evenly" if scheduler == "search" else f"the mask is that of {scheduler}"
    text = (
        f"no search is made and no fidelity is promised, because the loop cannot be repeated apart from its pipeline: "
        f"{reason} {mask[0].upper()}{mask[1:]}, and its weights are fitted to the network's outputs."
    )
    LOG.warning("weaker-fit: %s", text, extra={"kind": "weaker-fit", "times": 1})
    warnings.warn(text, WeakerFit, stacklevel=2)


def fit_outputs(trajectories: Sequence[Trajectory], compute: np.ndarray) -> np.ndarray:
    """Fit the weights [1, T, K] of the mask ``compute`` (bool [T]), shared by all branches."""
    steps = len(compute)
    first_steps = np.array(trajectories[0].first_steps)
    weights = np.zeros((1, steps, ANCHORS))
    gram = _gram(trajectories, steps)
    for i in np.flatnonzero(~compute):
        begin = first_steps[first_steps <= i].max()  # a denoiser predicts from its own outputs
        anchors = (begin + np.flatnonzero(compute[begin:i]))[::-1][:ANCHORS]
        normal = gram[np.ix_(anchors, anchors)]
        ridge = RIDGE * max(np.trace(normal) / len(anchors), 1e-300) * np.eye(len(anchors))
        # Shrunk towards plain reuse of the newest output, which the ridge alone would shrink towards zero.
        reuse = np.eye(len(anchors))[0]
        weights[0, i, : len(anchors)] = np.linalg.solve(normal + ridge, gram[anchors, i] + ridge @ reuse)
    return weights


def _gram(trajectories: Sequence[Trajectory], steps: int) -> np.ndarray:
    """Return the inner products of outputs at step pairs, summed over samples and branches that both steps have.

    Calls of another size than at the first step (guidance that ends early) are left out.
    """
    gram = np.zeros((steps, steps))
    for trajectory in trajectories:
        calls = max(len(s.calls) for s in trajectory.steps)
        for ordinal in range(calls):
            rows = {
                i: torch.cat([t.double().flatten() for t in step.calls[ordinal].outputs])
                for i, step in enumerate(trajectory.steps)
                if len(step.calls) > ordinal
            }
            size = len(next(iter(rows.values())))
            there = [i for i, row in rows.items() if len(row) == size]
            stacked = torch.stack([rows[i] for i in there])
            gram[np.ix_(there, there)] += (stacked @ stacked.T).cpu().numpy()
    return gram
