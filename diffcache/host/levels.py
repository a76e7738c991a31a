"""Compute timesteps for noise levels that are not the noise scheduler's own, and check that a loop can run over them.

A loop reads its noise levels from two tensors of the noise scheduler, ``sigmas`` [T + 1] and ``timesteps`` [T]. Noise
schedulers have no public function from a level to its timestep. The functions that diffusers uses are tried on the
noise scheduler's grid, and the one that reproduces its timesteps is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.errors import DiffCacheError

SAME_LEVEL = 1e-4  # two levels are equal if they differ by at most this share of the first level
SAME_TIME = 1e-3  # allowed error of reproduced timesteps, relative to the largest: one training step of a thousand
HISTORY = ("model_outputs", "derivatives", "ets")  # attributes with earlier outputs, of schedulers that extrapolate


class CannotFollow(DiffCacheError):  # noqa: N818 - named after the problem, like the public errors
    """The noise scheduler or the pipeline cannot run over other noise levels. The message states why."""


def timesteps_for(pipe: Any, scheduler: Any, times: Tensor, start: int, levels: np.ndarray) -> np.ndarray:
    """Return the timesteps of noise levels, rounded as the noise scheduler rounds its own.

    Args:
        pipe: The pipeline.
        scheduler: The noise scheduler, with its grid set.
        times: Its timesteps [T].
        start: The step that the loop begins at.
        levels: float64 [T + 1], the noise levels.

    Returns:
        float64 [T].

    Raises:
        CannotFollow: The loop cannot run over these levels.
    """
    if obstacle := _obstacle(pipe, scheduler, len(times), start, levels):
        raise CannotFollow(obstacle)
    own = array(scheduler.sigmas)[:-1]
    way = _way(scheduler, own, times)
    if way is None:
        raise CannotFollow("its rule for timesteps of noise levels is not known")
    wanted = _rounded(way(scheduler, levels[:-1]), way(scheduler, own), times)
    if (wanted[1:] == wanted[0]).any() and getattr(scheduler, "begin_index", None) is None:
        why = f"rounded, the timestep {wanted[0]:g} of its first step comes again, and it would begin there"
        raise CannotFollow(why)
    return wanted


def noise_shares(scheduler: Any, timesteps: Tensor) -> np.ndarray | None:
    """Return the share of noise in the state at every step, b / (a + b) of a state a · clean + b · noise.

    Levels of at most 1 of a noise scheduler without a table of training steps are those of flow matching: a = 1 − b.

    Args:
        scheduler: The noise scheduler, with its grid set.
        timesteps: Its timesteps [T].

    Returns:
        float64 [T], or None if the noise scheduler has neither levels nor a table.
    """
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    config = getattr(scheduler, "config", None)
    flows = getattr(config, "prediction_type", "") == "flow_prediction" or getattr(config, "use_flow_sigmas", False)
    steps = len(timesteps)
    if isinstance(table, Tensor) and not flows:
        kept = np.interp(array(timesteps), np.arange(len(table)), array(table))
        clean, noise = np.sqrt(kept), np.sqrt(1 - kept)
        return np.asarray(noise / (clean + noise))
    if not isinstance(sigmas, Tensor) or len(sigmas) < steps:
        return None
    levels = array(sigmas)[:steps]
    return levels if levels.max() <= 1 + SAME_LEVEL else levels / (1 + levels)


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a float64 array."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def _obstacle(pipe: Any, scheduler: Any, steps: int, start: int, levels: np.ndarray) -> str | None:
    """Return the reason why a run cannot go over these levels, or None if it can."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.shape != (steps + 1,):
        return "it does not have one noise level per step and a final one"
    if start:
        return f"the loop starts at step {start}, from a state that was made for the unmoved level"
    if getattr(scheduler, "order", 1) != 1:
        return "it visits levels more than once"
    if others := _per_step(scheduler, steps):
        return f"it also keeps {', '.join(others)} for every step"
    if _copies_scheduler(pipe):
        return "the pipeline steps with copies of its noise scheduler, made before the loop"
    here = array(sigmas)
    for name, at in (("starts", 0), ("ends", -1)):
        if abs(levels[at] - here[at]) > SAME_LEVEL * here[0]:
            return f"this run {name} at the level {here[at]:.6g}, the schedule's at {levels[at]:.6g}"
    if any(hasattr(scheduler, name) for name in HISTORY) and (np.diff(levels[:-1]) == 0).any():
        return "it divides by the distance between two levels, and the schedule's repeat"
    return None


def _per_step(scheduler: Any, steps: int) -> list[str]:
    """Return the names of the noise scheduler's other attributes with one entry per step, computed from its levels."""
    training = scheduler.config.get("num_train_timesteps")
    return [
        name
        for name, value in vars(scheduler).items()
        if name not in ("sigmas", "timesteps")
        and isinstance(value, (Tensor, np.ndarray))
        and value.ndim > 0
        and len(value) in (steps, steps + 1)
        and len(value) != training
    ]


def _copies_scheduler(pipe: Any) -> bool:
    """Return whether the pipeline steps copies of its noise scheduler, as its source code shows.

    Pipelines with sound and video, or with chunks, make such copies before the loop. The copies keep the old levels.
    """
    try:
        return "deepcopy(self.scheduler" in inspect.getsource(type(pipe).__call__)
    except (OSError, TypeError):  # no source
        return False


def _way(scheduler: Any, here: np.ndarray, times: Tensor) -> Callable[[Any, np.ndarray], np.ndarray] | None:
    """Return the function that maps the run's levels to its timesteps, or None if none of the known ones does.

    Args:
        scheduler: The noise scheduler.
        here: float64 [T], its levels.
        times: [T], its timesteps.
    """
    now = array(times)
    tolerance = SAME_TIME * np.abs(now).max() + (not times.is_floating_point())
    for way in (_scaled, _preconditioned, _quarter_log, _looked_up):
        if np.abs(way(scheduler, here) - now).max() <= tolerance:
            return way
    return None


def _rounded(wanted: np.ndarray, own: np.ndarray, times: Tensor) -> np.ndarray:
    """Round timesteps as the noise scheduler does: to nearest, or towards zero.

    Args:
        wanted: float64 [T], the timesteps to round.
        own: float64 [T], the noise scheduler's timesteps before rounding, up to float32 precision.
        times: [T], the noise scheduler's timesteps. Nothing is rounded if they are floating-point.
    """
    if times.is_floating_point():
        return wanted
    cuts = np.sum(np.trunc(own + 1e-3) == array(times)) > np.sum(np.round(own) == array(times))
    return np.asarray(np.trunc(wanted + 1e-3) if cuts else np.round(wanted))


# Each function maps levels [T] to timesteps [T]; NaN if the noise scheduler is of another kind.


def _scaled(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Return timesteps of flow matching: levels times the number of training steps."""
    return np.asarray(sigmas * scheduler.config.get("num_train_timesteps", np.nan))


def _preconditioned(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Return timesteps of EDM (arXiv 2206.00364), computed by the noise scheduler's ``precondition_noise``."""
    own = getattr(scheduler, "precondition_noise", None)
    return np.full(len(sigmas), np.nan) if own is None else array(own(torch.from_numpy(sigmas.copy())))


def _quarter_log(_scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Return timesteps of EDM for noise schedulers without ``precondition_noise``: ln(level) / 4."""
    return np.asarray(0.25 * np.log(np.maximum(sigmas, 1e-10)))


def _looked_up(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Return timesteps of variance-preserving diffusion.

    They are interpolated over ln(level) between the levels of the training steps.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        return np.full(len(sigmas), np.nan)
    table = array(((1 - alphas) / alphas) ** 0.5)
    return np.asarray(np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table))))
