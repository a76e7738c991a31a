"""Extrapolate with a polynomial through the newest computed steps (TaylorSeer).

The polynomial of degree ``order`` runs through ``order + 1`` anchors exactly, over the noise scheduler's timesteps, so
it is also correct on irregular grids. Until that many anchors exist, it has the degree that they allow.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Grid, Planned
from diffcache.schedulers.uniform import evenly, every_kth

SOURCE = "TaylorSeer, arXiv 2503.06923; exact divided differences on irregular grids"
NEEDS = ""
ALIASES: Aliases = {"taylor": {}}


def rule(grid: Grid, *, every: int = 4, order: int = 1) -> SitePlan:
    """Compute the loop's first step and every ``every``-th step after it.

    Extrapolate the others with degree ``order``.
    """
    return extrapolated(grid, every_kth(grid, every), order)


def plan(profile: Profile, computed_steps: float, *, order: int = 1) -> Planned:
    """Spread ``computed_steps`` computed steps evenly over the loop, and extrapolate the others with degree ``order``.

    Raises:
        BadOption: If the budget or ``order`` is out of range.
    """
    compute = evenly(profile.steps, computed_steps)
    return Planned(sites={"model": extrapolated(Grid(profile.timesteps), compute, order)})


def extrapolated(grid: Grid, compute: np.ndarray, order: int) -> SitePlan:
    """Return the plan that extrapolates where ``compute`` (bool [T]) is False.

    Raise BadOption unless ``order`` is 0 to 4.
    """
    if not isinstance(order, int) or not 0 <= order <= 4:
        raise BadOption("order", order, "0 to 4")
    return SitePlan(compute=compute, weights=extrapolation(grid, compute, order))


def extrapolation(grid: Grid, compute: np.ndarray, order: int) -> np.ndarray:
    """Return the Lagrange weights of every step where ``compute`` is False.

    Second-order noise schedulers visit a time twice. Of two anchors at one time only the newest is used, so K is twice
    the number of anchors used.

    Args:
        grid: The loop.
        compute: bool [T], the computed steps.
        order: The degree of the polynomial.

    Returns:
        float64 [1, T, K].
    """
    weights = np.zeros((1, grid.steps, 2 * (order + 1)))
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[:i])
        times = grid.timesteps[anchors[anchors >= grid.start][::-1][: 2 * (order + 1)]]
        _, first = np.unique(-times, return_index=True)
        used = np.sort(first)[: order + 1]
        for k in used:
            others = times[used[used != k]]
            weights[0, i, k] = np.prod((grid.timesteps[i] - others) / (times[k] - others))
    return weights
