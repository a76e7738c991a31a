"""Run a recorded loop on other noise levels.

The denoiser gets the time in an argument that pipeline code computes from the timestep. The recording shows which
argument it is, and the function. The full run has no state at a level between two of its levels. The straight line
between the two states replaces it: for Euler's method this is exact, for other methods it is near.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffcache.host.levels import CannotFollow, array, timesteps_for
from diffcache.profiling.recording.record import Forward
from diffcache.profiling.replay.replay import Replay

SAME = (
    1e-4  # relative, up to which an argument is the timestep, scaled; one rounding of its number type, if that is more
)

F = TypeVar("F", bound=Forward)
Line = tuple[float, float]  # (a, b): a · timestep + b


def warped(levels: np.ndarray, compute: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Move noise levels so that the computed steps lie at other positions on the grid.

    Args:
        levels: float64 [T + 1], the noise levels of the grid.
        compute: bool [T], the computed steps.
        places: float64, a new position for each computed step, in steps of the grid, rising from 0.

    Returns:
        float64 [T + 1]. Levels between computed steps move in proportion. The last level stays.
    """
    steps = len(compute)
    index = np.interp(np.arange(steps + 1), np.append(np.flatnonzero(compute), steps), np.append(places, steps))
    return np.asarray(np.interp(index, np.arange(steps + 1), levels))


class Movable:
    """A replay that can run on other noise levels than the recorded ones.

    Attributes:
        levels: float64 [T + 1], the recorded noise levels.

    Raises:
        CannotFollow: The loop cannot run on other levels.
    """

    def __init__(self, pipe: Any, replay: Replay) -> None:
        self.pipe, self.replay = pipe, replay
        self._scheduler, self._times = replay.trajectory.scheduler, replay.trajectory.timesteps
        if not isinstance(getattr(self._scheduler, "sigmas", None), Tensor):
            raise CannotFollow("it does not have one noise level per step and a final one")
        self.levels = array(self._scheduler.sigmas)
        timesteps_for(pipe, self._scheduler, self._times, replay.trajectory.start, self.levels)
        if len(self.levels) != len(replay.steps) + 1 or (np.diff(self.levels) >= 0).any():
            raise CannotFollow("its noise levels do not fall from step to step")
        first = replay.steps[0]
        self._told = [self._lines([step.calls[k] for step in replay.steps]) for k in range(len(first.calls))]
        self._fed = [self._lines([step.feeds[k] for step in replay.steps]) for k in range(len(first.feeds))]

    def on(self, levels: np.ndarray) -> Replay:
        """Return the replay on other ``levels`` [T + 1]. References are interpolated between the full run's states."""
        trajectory = self.replay.trajectory
        times = timesteps_for(self.pipe, self._scheduler, self._times, trajectory.start, levels)
        scheduler = copy.copy(self._scheduler)
        scheduler.sigmas = _as(levels, self._scheduler.sigmas)
        scheduler.timesteps = _as(times, self._times)
        steps = []
        for i, step in enumerate(self.replay.steps):
            time = float(scheduler.timesteps[i])
            moved = {
                "timestep": _like(step.timestep, time),
                "calls": [_at(time, call, lines) for call, lines in zip(step.calls, self._told, strict=True)],
                "feeds": [_at(time, feed, lines) for feed, lines in zip(step.feeds, self._fed, strict=True)],
                "result": self._state(levels[i + 1]),
            }
            steps.append(dataclasses.replace(step, **moved))
        return self.replay.with_steps(dataclasses.replace(trajectory, scheduler=scheduler, steps=steps))

    def _state(self, level: float) -> Tensor:
        """Return the full run's state at a level, interpolated between the states at the two nearest levels."""
        place = float(np.interp(-level, -self.levels, np.arange(len(self.levels))))
        before = min(int(place), len(self.levels) - 2)
        first, second = (self.replay.reference(i) if i >= 0 else self.replay.start.state for i in (before - 1, before))
        return first if place == before else torch.lerp(first, second, place - before)

    def _lines(self, forwards: Sequence[Forward]) -> dict[int, Line]:
        """Find the arguments of these forwards, one per step, that are linear in the timestep.

        Returns:
            Index among all leaves of the arguments -> the line.

        Raises:
            CannotFollow: There is none, or a number changes with the steps in another way.
        """
        times = np.array([float(step.timestep) for step in self.replay.steps])
        found: dict[int, Line] = {}
        for index, leaves in enumerate(zip(*map(_leaves, forwards), strict=True)):
            if leaves[0] is leaves[-1] or leaves[0] is forwards[0].input:
                continue
            numbers = np.array([_number(leaf) for leaf in leaves])
            if np.isnan(numbers).any() or np.ptp(numbers) == 0:
                continue
            slope, offset = np.polyfit(times, numbers, 1)
            rounding = max(SAME, _rounding(leaves[0])) * np.abs(numbers).max()
            if np.abs(slope * times + offset - numbers).max() > rounding:
                raise CannotFollow("an argument of the denoiser changes with the step number and not with the timestep")
            found[index] = float(slope), float(offset)
        if not found:
            raise CannotFollow("the argument that passes the timestep to the denoiser is not known")
        return found


def on_levels(everyone: Sequence[Movable], levels: np.ndarray) -> list[Replay]:
    """Return the replays on other ``levels`` [T + 1]. Parts of one recorded batch stay parts of one batch."""
    moved: dict[int, Replay] = {}
    found = []
    for movable in everyone:
        of = id(movable.replay.trajectory)
        if of not in moved:
            moved[of] = movable.on(levels)
        found.append(moved[of] if movable.replay.rows is None else moved[of].part(movable.replay.rows))
    return found


def _leaves(forward: Forward) -> Sequence[Any]:
    """Return all arguments of a forward, with containers flattened."""
    return pytree.tree_leaves((forward.args, dict(forward.kwargs)))


def _number(leaf: Any) -> float:
    """Return the value of a leaf that is a number, or a tensor whose elements are all equal; else NaN."""
    if isinstance(leaf, Tensor):
        first = leaf.flatten()[:1]
        return float(first) if len(first) and not leaf.is_complex() and bool((leaf == first).all()) else np.nan
    return float(leaf) if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) else np.nan


def _rounding(leaf: Any) -> float:
    """Return the relative rounding error of a leaf's number type; 0 for numbers that are no float tensors."""
    return torch.finfo(leaf.dtype).eps if isinstance(leaf, Tensor) and leaf.is_floating_point() else 0.0


def _at(time: float, forward: F, lines: Mapping[int, Line]) -> F:
    """Return the forward with the arguments in ``lines`` set for another timestep."""
    leaves, spec = pytree.tree_flatten((forward.args, dict(forward.kwargs)))
    for index, (slope, offset) in lines.items():
        leaves[index] = _like(leaves[index], slope * time + offset)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return dataclasses.replace(forward, args=args, kwargs=kwargs)


def _as(values: np.ndarray, like: Tensor) -> Tensor:
    """Return ``values`` as a tensor with the dtype and device of ``like``."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _like(old: Any, value: float) -> Any:
    """Return ``value`` in the form of ``old``: a number of its type, or a tensor of its shape."""
    if isinstance(old, Tensor):
        return torch.full_like(old, value if old.is_floating_point() else round(value))
    return type(old)(value)
