"""Polynomial extrapolation through the newest computed steps (the forecast of TaylorSeer, arXiv 2503.06923).

The polynomial of degree ``order`` runs through ``order + 1`` anchors exactly, in the noise scheduler's own time, so
irregular grids are right too; until that many anchors exist, it has the degree they allow.
"""

from __future__ import annotations

import numpy as np

from diffcache.errors import BadOption
from diffcache.schedule import SitePlan
from diffcache.schedulers import Grid
from diffcache.schedulers.uniform import every_kth


def rule(grid: Grid, *, every: int = 4, order: int = 1) -> SitePlan:
    if not isinstance(order, int) or not 0 <= order <= 4:
        raise BadOption("order", order, "0 to 4")
    compute = every_kth(grid, every)
    return SitePlan(compute=compute, weights=extrapolation(grid, compute, order))


def extrapolation(grid: Grid, compute: np.ndarray, order: int) -> np.ndarray:
    """Lagrange weights [1, T, K] for every step that ``compute`` (bool [T]) leaves out.

    Second-order noise schedulers visit a time twice: of anchors at one time only the newest serves, so K is twice
    the number of anchors used.
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
