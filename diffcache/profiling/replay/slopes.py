"""How much of a network's output is its input, told from the noise scheduler's own noise levels.

A network that predicts noise is given x = α x̂ + σ ε and returns ε = (x − α x̂) / σ: at small noise, mostly the input
again, magnified. With x/σ taken off, what is left is the network's clean estimate x̂, times −α/σ. It moves far less,
above all where the input jumps between two steps, as it does when a sampler draws fresh noise. Combining estimates
instead of outputs is what DPM-Solver++ (arXiv 2211.01095, section 4) does between its steps.
"""

from __future__ import annotations

import numpy as np
import torch

from diffcache import host
from diffcache.profiling.recording.record import Trajectory

# Noise schedulers whose networks are given, or asked for, something else at a step than its level and its name say.
OTHERWISE = ("EDM", "Cosine", "Inverse", "SDE")


def noise_levels(trajectory: Trajectory) -> np.ndarray | None:
    """The noise levels (``sigmas``) of the loop's steps and the one it ends at, where the noise scheduler has them."""
    sigmas = getattr(trajectory.scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != len(trajectory.timesteps) + 1:
        return None
    levels = torch.as_tensor(sigmas).double().cpu().numpy()[trajectory.start :]
    return levels if np.isfinite(levels).all() and (levels >= 0).all() else None


def slopes(trajectory: Trajectory) -> np.ndarray | None:
    """float64 [steps of the loop]: by how much the output grows with the input while the clean estimate stays. None
    where that is not known, or is nothing (networks that predict the sample)."""
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
    """Of the clean sample and of noise in the network's input at each step, float64; nan where they are not known."""
    scheduler, begin = trajectory.scheduler, trajectory.start
    sigmas = noise_levels(trajectory)
    if sigmas is not None:
        sigmas = sigmas[:-1]
        return (1 - sigmas, sigmas) if flow else (1 / np.hypot(1, sigmas), sigmas / np.hypot(1, sigmas))
    times = trajectory.timesteps[begin:]
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or times.is_floating_point() or int(times.max()) >= len(table):
        return np.full(len(times), np.nan), np.full(len(times), np.nan)
    kept = table.double().cpu().numpy()[times.cpu().numpy()]
    return np.sqrt(kept), np.sqrt(1 - kept)
