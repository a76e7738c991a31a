"""Compute the share of a network's output that is its input, from the noise scheduler's noise levels.

The input of a network that predicts noise is x = α x̂ + σ ε, and its output is ε = (x − α x̂) / σ. At small noise the
output is mostly the input, magnified. With λ x subtracted, λ = 1/σ, the network's clean estimate x̂ is left, times
−α/σ. It changes far less from step to step, above all if the input jumps, as it does in a sampler that draws noise at
every step. DPM-Solver++ (arXiv 2211.01095, section 4) combines estimates instead of outputs as well.
"""

from __future__ import annotations

import numpy as np
import torch

from diffcache import host
from diffcache.profiling.recording.record import Trajectory

# Noise schedulers whose networks are given, or asked for, something else at a step than its level and its name say.
OTHERWISE = ("EDM", "Cosine", "Inverse", "SDE")


def noise_levels(trajectory: Trajectory) -> np.ndarray | None:
    """Return the noise levels (``sigmas``) of the loop's steps and of its last state; None if there are none."""
    sigmas = getattr(trajectory.scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != len(trajectory.timesteps) + 1:
        return None
    levels = torch.as_tensor(sigmas).double().cpu().numpy()[trajectory.start : trajectory.end + 1]
    return levels if np.isfinite(levels).all() and (levels >= 0).all() else None


def input_share(trajectory: Trajectory) -> np.ndarray | None:
    """Compute λ: how much the output grows with the input if the clean estimate stays the same.

    Returns:
        float64 [steps of the loop]. None if it is not known, or if it is 0: for networks that predict the sample.
    """
    if any(part in type(trajectory.scheduler).__name__ for part in OTHERWISE):
        return None
    kind = host.prediction_type(trajectory.scheduler)
    if kind is None and type(trajectory.scheduler).__name__.startswith("FlowMatch"):
        kind = "flow_prediction"
    clean, noise = _shares(trajectory, kind == "flow_prediction")
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind in ("epsilon", "flow_prediction"):
            found = 1 / noise
        elif kind == "v_prediction":
            found = clean / noise
        else:
            return None
    return found if np.isfinite(found).all() else None


def _shares(trajectory: Trajectory, flow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the clean sample and of noise in the network's input, float64 [steps of the loop] each.

    They are NaN if they are not known.
    """
    scheduler = trajectory.scheduler
    sigmas = noise_levels(trajectory)
    if sigmas is not None:
        sigmas = sigmas[:-1]
        return (1 - sigmas, sigmas) if flow else (1 / np.hypot(1, sigmas), sigmas / np.hypot(1, sigmas))
    times = trajectory.timesteps[trajectory.start : trajectory.end]
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or times.is_floating_point() or int(times.max()) >= len(table):
        return np.full(len(times), np.nan), np.full(len(times), np.nan)
    kept = table.double().cpu().numpy()[times.cpu().numpy()]
    return np.sqrt(kept), np.sqrt(1 - kept)
