"""Compute every k-th step and reuse the newest output in between (FORA, arXiv 2407.01425, at any site)."""

from __future__ import annotations

import numpy as np

from diffcache.errors import BadOption
from diffcache.schedule import SitePlan
from diffcache.schedulers import Grid


def rule(grid: Grid, *, every: int = 2) -> SitePlan:
    compute = every_kth(grid, every)
    return SitePlan(compute=compute, weights=np.where(compute, 0.0, 1.0)[None, :, None])


def every_kth(grid: Grid, every: int) -> np.ndarray:
    """bool [T]: the loop's first step and every ``every``-th from there; steps before it count as computed."""
    if not isinstance(every, int) or every < 1:
        raise BadOption("every", every, "a whole number, at least 1 (1 computes every step)")
    past_start = np.arange(grid.steps) - grid.start
    return np.asarray((past_start < 0) | (past_start % every == 0))


def evenly(steps: int, computed: int) -> np.ndarray:
    """bool [T] with exactly ``computed`` steps, spread as evenly as whole numbers allow, the first among them."""
    if not 1 <= computed <= steps:
        raise BadOption("computed_steps", computed, f"1 to {steps} (the first step is always computed)")
    compute = np.zeros(steps, bool)
    compute[np.floor(np.arange(computed) * steps / computed).astype(int)] = True
    return compute
