"""Compute every k-th step and reuse the newest output in between.

FORA (arXiv 2407.01425) does the same at every attention and feed-forward: ``fora``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, Planned

SOURCE = "FORA, arXiv 2407.01425, at any site"
NEEDS = ""
GROUP = "start here"


def rule(grid: Grid, *, every: int = 2) -> SitePlan:
    """Compute the loop's first step and every ``every``-th step after it."""
    return reuse(every_kth(grid, every))


def plan(profile: Profile, computed_steps: float) -> Planned:
    """Spread ``computed_steps`` computed steps evenly over the loop.

    Raises:
        BadOption: If the budget is not a whole number from 1 to the number of steps.
    """
    return Planned(sites={"model": reuse(evenly(profile.steps, computed_steps))})


def reuse(compute: np.ndarray) -> SitePlan:
    """Return the plan that reuses the newest output at every step where ``compute`` (bool [T]) is False."""
    return SitePlan(compute=compute, weights=np.where(compute, 0.0, 1.0)[None, :, None])


def every_kth(grid: Grid, every: int) -> np.ndarray:
    """Return bool [T]: the loop's first step and every ``every``-th step after it. Steps before the first are True.

    Raises:
        BadOption: If ``every`` is not a whole number, 1 or more.
    """
    if not isinstance(every, int) or every < 1:
        raise BadOption("every", every, "a whole number, at least 1 (1 computes every step)")
    past_start = np.arange(grid.steps) - grid.start
    return np.asarray((past_start < 0) | (past_start % every == 0))


def evenly(steps: int, computed: float, among: Iterable[int] = ()) -> np.ndarray:
    """Return bool [T] with exactly ``computed`` steps, spread as evenly as whole numbers allow.

    The first step is one of them.

    If a step of ``among`` is not one of them, the nearest one is moved there.

    Args:
        steps: The number of steps T.
        computed: The number of computed steps, a whole number.
        among: Steps that must be computed.

    Raises:
        BadOption: If ``computed`` is out of range.
    """
    musts = sorted({0, *among})
    if not isinstance(computed, int) or not len(musts) <= computed <= steps:
        first = "the first step is" if len(musts) == 1 else f"steps {', '.join(map(str, musts))} are"
        raise BadOption("computed_steps", computed, f"{len(musts)} to {steps} ({first} always computed)")
    compute = np.zeros(steps, bool)
    compute[np.arange(computed) * steps // computed] = True
    for must in musts:
        if not compute[must]:
            free = np.setdiff1d(np.flatnonzero(compute), musts)
            compute[free[np.abs(free - must).argmin()]], compute[must] = False, True
    return compute
