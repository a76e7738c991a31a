"""Noise levels of a loop that are not its noise scheduler's own: their timesteps, and who could not follow them.

A loop reads its noise levels from two tensors of the noise scheduler, ``sigmas`` [T + 1] and ``timesteps`` [T]. Noise
schedulers have no public function from a level to its timestep: the ways that diffusers knows are tried on the grid as
it is, and the one that explains it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.errors import DiffCacheError

SAME_LEVEL = 1e-4  # of the first level, up to which two levels are one
SAME_TIME = 1e-3  # of the largest timestep, up to which a way explains a grid: one training step of a thousand
HISTORY = ("model_outputs", "derivatives", "ets")  # where noise schedulers keep earlier outputs, to extrapolate from


class CannotFollow(DiffCacheError):  # noqa: N818  says what is the matter, as the public errors do
    """The noise scheduler or the pipeline cannot run over levels that are not its own; the message says why."""


def timesteps_for(pipe: Any, scheduler: Any, times: Tensor, start: int, levels: np.ndarray) -> np.ndarray:
    """float64 [T]: the timesteps of the noise ``levels`` [T + 1], rounded as the noise scheduler rounds its own.

    scheduler  with its grid set
    times      its timesteps [T]
    start      the step that the loop begins at

    Raises CannotFollow.
    """
    if obstacle := _obstacle(pipe, scheduler, len(times), start, levels):
        raise CannotFollow(obstacle)
    own = array(scheduler.sigmas)[:-1]
    way = _way(scheduler, own, times)
    if way is None:
        raise CannotFollow("how it makes timesteps from noise levels is not known")
    wanted = _rounded(way(scheduler, levels[:-1]), way(scheduler, own), times)
    if (wanted[1:] == wanted[0]).any() and getattr(scheduler, "begin_index", None) is None:
        why = f"rounded, the timestep {wanted[0]:g} of its first step comes again, and it would begin there"
        raise CannotFollow(why)
    return wanted


def array(tensor: Tensor) -> np.ndarray:
    """float64, on the CPU."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def _obstacle(pipe: Any, scheduler: Any, steps: int, start: int, levels: np.ndarray) -> str | None:
    """Why a run cannot go over these levels; None if it can."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.shape != (steps + 1,):
        return "it has no noise levels, one per step and one to end at"
    if start:
        return f"the loop starts at step {start}, on a state made for a level of its own"
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
    """What else the noise scheduler knows for every step, made from the levels it had."""
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
    """Sound beside video, chunks apart: copies have the levels that were. Nothing but the source tells before it is
    too late."""
    try:
        return "deepcopy(self.scheduler" in inspect.getsource(type(pipe).__call__)
    except (OSError, TypeError):  # no source
        return False


def _way(scheduler: Any, here: np.ndarray, times: Tensor) -> Callable[[Any, np.ndarray], np.ndarray] | None:
    """The way that makes the run's own timesteps of its own levels ``here`` [T]."""
    now = array(times)
    tolerance = SAME_TIME * np.abs(now).max() + (not times.is_floating_point())
    for way in (_scaled, _preconditioned, _quarter_log, _looked_up):
        if np.abs(way(scheduler, here) - now).max() <= tolerance:
            return way
    return None


def _rounded(wanted: np.ndarray, own: np.ndarray, times: Tensor) -> np.ndarray:
    """``wanted`` as the noise scheduler rounds timesteps: some round, some cut off; ``times`` are its own, ``own`` the
    same unrounded, up to what a float32 lost."""
    if times.is_floating_point():
        return wanted
    cuts = np.sum(np.trunc(own + 1e-3) == array(times)) > np.sum(np.round(own) == array(times))
    return np.asarray(np.trunc(wanted + 1e-3) if cuts else np.round(wanted))


# Each [levels] -> [timesteps], NaN where the noise scheduler is not of that kind.


def _scaled(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Flow matching: the level is the time."""
    return np.asarray(sigmas * scheduler.config.get("num_train_timesteps", np.nan))


def _preconditioned(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """EDM and its kin say it themselves."""
    own = getattr(scheduler, "precondition_noise", None)
    return np.full(len(sigmas), np.nan) if own is None else array(own(torch.from_numpy(sigmas.copy())))


def _quarter_log(_scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Times of EDM in noise schedulers that do not say it."""
    return np.asarray(0.25 * np.log(np.maximum(sigmas, 1e-10)))


def _looked_up(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Variance preserving: between the levels of the training steps, on a logarithmic scale."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        return np.full(len(sigmas), np.nan)
    table = array(((1 - alphas) / alphas) ** 0.5)
    return np.asarray(np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table))))
