"""A schedule's own noise levels, written into the noise scheduler before a run's first step, and taken back after it.

A loop reads its noise levels from two tensors of the noise scheduler, ``sigmas`` [T + 1] and ``timesteps`` [T], the
second through views that the pipeline already holds. So both are written in place. Noise schedulers have no public
function from a level to its timestep: the ways that diffusers knows are tried on the run's own grid, and the one that
explains it is used. Whatever is not understood is refused with nothing written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.errors import ScheduleMismatch
from diffcache.patch import Around, Undo, layer
from diffcache.schedule import CacheSchedule

SAME_LEVEL = 1e-4  # of the first level, up to which two levels are one
SAME_TIME = 1e-3  # of the largest timestep, up to which a way explains a grid: one training step of a thousand
HISTORY = ("model_outputs", "derivatives", "ets")  # where noise schedulers keep earlier outputs, to extrapolate from


def move(pipe: Any, run: host.Run, schedule: CacheSchedule) -> Undo:
    """Put ``schedule.sigmas`` in the place of the run's noise levels, and return what puts those back.

    Does nothing where the schedule leaves the levels alone. Raises ScheduleMismatch, with nothing written, where the
    noise scheduler or the pipeline could not follow; and at the first moved step, if the pipeline turns out to iterate
    over a copy of the timesteps.
    """
    if schedule.sigmas is None:
        return lambda: None
    scheduler, times = run.scheduler, run.timesteps
    if obstacle := _obstacle(pipe, run, schedule.sigmas):
        raise _refusal(pipe, scheduler, obstacle)
    sigmas: Tensor = scheduler.sigmas
    way = _way(scheduler, _array(sigmas)[:-1], times)
    if way is None:
        raise _refusal(pipe, scheduler, "how it makes timesteps from noise levels is not known")
    wanted = _rounded(way(scheduler, schedule.sigmas[:-1]), way(scheduler, _array(sigmas)[:-1]), times)
    if (wanted[1:] == wanted[0]).any() and getattr(scheduler, "begin_index", None) is None:
        why = f"rounded, the timestep {wanted[0]:g} of its first step comes again, and it would begin there"
        raise _refusal(pipe, scheduler, why)
    kept = sigmas.clone(), times.clone()
    off = layer(scheduler, "step", _guard(run, wanted, _array(times)), copies=True)
    _write(sigmas, torch.from_numpy(schedule.sigmas.copy()))
    _write(times, torch.from_numpy(wanted))

    def back() -> None:
        off()
        _write(sigmas, kept[0])
        _write(times, kept[1])

    return back


def _obstacle(pipe: Any, run: host.Run, levels: np.ndarray) -> str | None:
    """Why the run cannot go over these levels; None if it can."""
    scheduler, steps = run.scheduler, run.steps
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.shape != (steps + 1,):
        return "it has no noise levels, one per step and one to end at"
    if run.start:
        return f"the loop starts at step {run.start}, on a state made for a level of its own"
    if getattr(scheduler, "order", 1) != 1:
        return "it visits levels more than once"
    if others := _per_step(scheduler, steps):
        return f"it also keeps {', '.join(others)} for every step"
    if _copies_scheduler(pipe):
        return "the pipeline steps with copies of its noise scheduler, made before the loop"
    here = _array(sigmas)
    for name, at in (("starts", 0), ("ends", -1)):
        if abs(levels[at] - here[at]) > SAME_LEVEL * here[0]:
            return f"this run {name} at the level {here[at]:.6g}, the schedule's at {levels[at]:.6g}"
    if any(hasattr(scheduler, name) for name in HISTORY) and (np.diff(levels[:-1]) == 0).any():
        return "it divides by the distance between two levels, and the schedule's repeat"
    return None


def _refusal(pipe: Any, scheduler: Any, why: str) -> ScheduleMismatch:
    return ScheduleMismatch(
        f"the schedule runs over noise levels of its own, and {type(scheduler).__name__} in {type(pipe).__name__} "
        f"cannot: {why}. Use a schedule without moved levels."
    )


# ------------------------------------------------------------------ from levels to timesteps


def _way(scheduler: Any, here: np.ndarray, times: Tensor) -> Callable[[Any, np.ndarray], np.ndarray] | None:
    """The way that makes the run's own timesteps of its own levels ``here`` [T]."""
    now = _array(times)
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
    cuts = np.sum(np.trunc(own + 1e-3) == _array(times)) > np.sum(np.round(own) == _array(times))
    return np.asarray(np.trunc(wanted + 1e-3) if cuts else np.round(wanted))


# Each [levels] -> [timesteps], NaN where the noise scheduler is not of that kind.


def _scaled(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Flow matching: the level is the time."""
    return np.asarray(sigmas * scheduler.config.get("num_train_timesteps", np.nan))


def _preconditioned(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """EDM and its kin say it themselves."""
    own = getattr(scheduler, "precondition_noise", None)
    return np.full(len(sigmas), np.nan) if own is None else _array(own(torch.from_numpy(sigmas.copy())))


def _quarter_log(_scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Times of EDM in noise schedulers that do not say it."""
    return np.asarray(0.25 * np.log(np.maximum(sigmas, 1e-10)))


def _looked_up(scheduler: Any, sigmas: np.ndarray) -> np.ndarray:
    """Variance preserving: between the levels of the training steps, on a logarithmic scale."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        return np.full(len(sigmas), np.nan)
    table = _array(((1 - alphas) / alphas) ** 0.5)
    return np.asarray(np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table))))


# ------------------------------------------------------------------ what else may hold levels


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


def _guard(run: host.Run, wanted: np.ndarray, before: np.ndarray) -> Around:
    """Around ``scheduler.step``: refuses the first step of a loop over timesteps that were copied before it began. A
    view of the tensor that was written is right by itself; anything else is compared by value."""
    memory = run.timesteps.untyped_storage().data_ptr()
    moved = np.abs(wanted - before) > SAME_LEVEL * np.abs(before).max()

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given, here = args[1] if len(args) > 1 else kwargs.get("timestep"), run.index
        view = isinstance(given, Tensor) and given.untyped_storage().data_ptr() == memory
        if given is not None and not view and here < len(wanted) and moved[here]:
            time = float(given.flatten()[0] if isinstance(given, Tensor) else given)
            if abs(time - wanted[here]) > abs(time - before[here]):
                raise ScheduleMismatch(
                    f"the schedule moved step {here} to timestep {wanted[here]:g}; the pipeline runs it at {time:g}: "
                    "it iterates over a copy of the timesteps, made before its loop. Use a schedule without moved "
                    "noise levels."
                )
        return inner(*args, **kwargs)

    return around


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())


def _write(into: Tensor, values: Tensor) -> None:
    with torch.inference_mode():  # tensors born in inference mode can be written nowhere else, others here too
        into.copy_(values)
