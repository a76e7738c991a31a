"""Resample a schedule to another number of steps than it was fitted for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from diffcache.documents.schedule import CacheSchedule, SitePlan
from diffcache.documents.schedule_set import demand_one
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Grid
from diffcache.schedulers.taylorseer import extrapolation


class Resampled(UserWarning):
    """A schedule runs on another time grid than its coefficients were fitted on."""


def resampled(schedule: CacheSchedule, timesteps: Sequence[float] | np.ndarray) -> CacheSchedule:
    """Resample a schedule to another grid.

    Computed steps move to the nearest times, and coefficients between them are interpolated over time. Moved noise
    levels are dropped. This is not a fit: it warns with :class:`Resampled`, and the result has no expected fidelity.

    Args:
        schedule: The schedule.
        timesteps: [T'], falling: ``pipe.scheduler.timesteps`` after ``pipe.scheduler.set_timesteps(n)``.

    Raises:
        BadOption: The schedule has no timesteps or decides in the run, or the grid does not fall.

    Example:
        >>> pipe.scheduler.set_timesteps(40)
        >>> schedule = diffcache.resampled(schedule, pipe.scheduler.timesteps)
    """
    demand_one("schedule", schedule)
    try:
        new = np.asarray(timesteps, np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise BadOption("timesteps", f"{timesteps!r:.80}", "numbers that fall from step to step") from None
    if schedule.timesteps is None:
        raise Unusable("schedule", "it has no timesteps", "Pass a schedule with timesteps, such as a fitted one")
    if any(denoiser.online is not None for denoiser in schedule.denoisers.values()):
        raise Unusable(
            "schedule",
            "a criterion chooses its computed steps during the run",
            "Pass a schedule without a criterion",
        )
    if any(plan.inputs is not None and plan.inputs.any() for _, _, plan in schedule.plans()):
        # Weights of inputs depend on the noise levels of the anchors. They can neither be interpolated nor copied.
        raise Unusable("schedule", "it has weights for inputs", "Pass a schedule that predicts from outputs only")
    for name, grid in (("timesteps", new), ("schedule", schedule.timesteps)):
        if not len(grid) or not np.isfinite(grid).all() or (np.diff(grid) >= 0).any():
            raise BadOption(name, grid.tolist()[:4], "a grid that falls from step to step")
    warnings.warn(
        f"a schedule fitted for {schedule.steps} steps is resampled to {len(new)}: its coefficients are interpolated, "
        "not fitted, and it has no expected fidelity. If quality matters, make a schedule for these steps.",
        Resampled,
        stacklevel=2,
    )
    nearest = np.abs(schedule.timesteps[None, :] - new[:, None]).argmin(axis=1)
    denoisers = {
        name: dataclasses.replace(
            denoiser,
            sites={site: _moved(plan, schedule.timesteps, new) for site, plan in denoiser.sites.items()},
            called=None if denoiser.called is None else denoiser.called[nearest],
        )
        for name, denoiser in schedule.denoisers.items()
    }
    return dataclasses.replace(
        schedule,
        steps=len(new),
        timesteps=new,
        sigmas=None,
        denoisers=denoisers,
        expected=None,
        provenance={**schedule.provenance, "resampled": f"from {schedule.steps} steps"},
    )


def _moved(plan: SitePlan, old: np.ndarray, new: np.ndarray) -> SitePlan:
    """Return the plan of a site on another grid."""
    before, after = _pairs(plan.compute, old, new)
    compute = np.zeros(len(new), bool)
    compute[after] = True
    branches, _, most = plan.weights.shape
    forward = extrapolation(Grid(new), compute, order=1)[:, :, :2]
    weights = np.zeros((branches, len(new), max(most, 2)))
    source = np.zeros(len(new), int)  # for each new step, the old step that its kappa, scale and bias are copied from
    for a, b, begin, end in zip(before, [*before[1:], len(old)], after, [*after[1:], len(new)], strict=True):
        known = np.arange(a, b)  # the anchor, where the newest output is exact, and the steps predicted after it
        nodes = np.where((known == a)[:, None], np.eye(most)[0], plan.weights[:, known])  # [B, nodes, K]
        times = _as_old(new[begin:end], new[begin], _end(new, end), old[a], _end(old, b))
        for j, time in zip(range(begin + 1, end), times[1:], strict=True):
            source[j] = known[1:][np.abs(old[known[1:]] - time).argmin()] if len(known) > 1 else a
            if len(known) == 1:  # all old steps here were computed, so there are no weights to interpolate
                weights[:, j, :2] = forward[0, j]
                continue
            for branch, k in np.ndindex(branches, most):
                weights[branch, j, k] = np.interp(-time, -old[known], nodes[branch, :, k])
    exists = np.arange(weights.shape[2]) < np.cumsum(compute)[:, None]
    weights = np.where(exists & ~compute[:, None], weights, 0)

    def taken(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:, source]

    kappa, scale, bias = map(taken, (plan.kappa, plan.scale, plan.bias))
    return dataclasses.replace(plan, compute=compute, weights=weights, kappa=kappa, scale=scale, bias=bias)


def _pairs(compute: np.ndarray, old: np.ndarray, new: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the old computed steps and the new steps that are nearest in time.

    If two old steps have the same nearest step, the later one takes the next step, or is left out at the end of the
    grid.
    """
    before, after = [0], [0]
    for a in map(int, np.flatnonzero(compute)[1:]):
        nearest = max(int(np.abs(new - old[a]).argmin()), after[-1] + 1)
        if nearest < len(new):
            before.append(a)
            after.append(nearest)
    return before, after


def _as_old(times: np.ndarray, begin: float, end: float, old_begin: float, old_end: float) -> np.ndarray:
    """Map times between two new computed steps linearly to times between the two old ones."""
    return old_begin + (times - begin) * (old_end - old_begin) / (end - begin)


def _end(grid: np.ndarray, i: int) -> float:
    """Return the time of step ``i``; for the step after the last one, an extrapolated time."""
    if i < len(grid):
        return float(grid[i])
    return float(2 * grid[-1] - grid[-2]) if len(grid) > 1 else float(grid[-1]) - 1.0
