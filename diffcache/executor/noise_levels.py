"""Write the noise levels of a schedule into the noise scheduler before a run, and restore the old ones after it.

The loop reads the timesteps through views that the pipeline already holds, so both tensors of the noise scheduler are
written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import ScheduleMismatch
from diffcache.host.levels import SAME_LEVEL, CannotFollow, array, timesteps_for
from diffcache.patch import Undo, Wrapper, layer


def move_levels(pipe: Any, run: host.LoopRun, schedule: CacheSchedule) -> Undo:
    """Replace the noise levels of a run by those of the schedule, if the schedule has any.

    Args:
        pipe: The pipeline.
        run: The run, before its first step.
        schedule: The schedule.

    Returns:
        A function that restores the noise levels.

    Raises:
        ScheduleMismatch: The noise scheduler or the pipeline cannot use the levels. Nothing has been written then. If
            the pipeline iterates over a copy of the timesteps, the error is raised in the first step that was moved.
    """
    if schedule.sigmas is None:
        return lambda: None
    scheduler, times = run.scheduler, run.timesteps
    try:
        wanted = timesteps_for(pipe, scheduler, times, run.start, schedule.sigmas)
    except CannotFollow as why:
        raise ScheduleMismatch(
            f"the schedule moves the noise levels, which {type(scheduler).__name__} in {host.host_name(pipe)} does not "
            f"support: {why}. Use a schedule without moved levels."
        ) from None
    sigmas: Tensor = scheduler.sigmas
    kept = sigmas.clone(), times.clone()
    off = layer(scheduler, "step", _guard(run, wanted, array(times)), copies=True)
    _write(sigmas, torch.from_numpy(schedule.sigmas.copy()))
    _write(times, torch.from_numpy(wanted))

    def back() -> None:
        off()
        _write(sigmas, kept[0])
        _write(times, kept[1])

    return back


def _guard(run: host.LoopRun, wanted: np.ndarray, before: np.ndarray) -> Wrapper:
    """Return a wrapper of ``scheduler.step`` that refuses loops over timesteps that were copied before they began.

    A view of the tensor that was written needs no check. Other timesteps are compared by value.

    Args:
        run: The run.
        wanted: The timesteps that were written.
        before: The timesteps before that.
    """
    memory = run.timesteps.untyped_storage().data_ptr()
    moved = np.abs(wanted - before) > SAME_LEVEL * np.abs(before).max()

    def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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

    return wrapper


def _write(into: Tensor, values: Tensor) -> None:
    """Copy ``values`` into a tensor that may have been made in inference mode."""
    with torch.inference_mode():  # tensors made in inference mode can only be written in it
        into.copy_(values)
