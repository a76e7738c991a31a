"""Predict with the backward difference and reuse in turns, inside a window of the loop (ZEUS).

After a computed step a, with p the computed step before it, the first predicted step gets 2 F_a − F_p, the second one
F_a, the third one 2 F_a − F_p, and so on. No prediction uses another prediction. The difference is not scaled by the
distance of the steps, as in the authors' code. The steps before and after the window are computed.

``rule`` is the schedule of the authors' code without its Lagrange phase. That phase predicts the clean sample from
earlier clean samples, which are not outputs of the network. ``interp_all``, their ablation with predictions from
predictions, is also left out.

``plan`` is a reading, because the published schedules have no budget. It keeps the published window and spreads the
computed steps evenly inside it. If runs in the window would take more than ``longest`` steps, the computed steps before
and after it become fewer, in proportion, until they do not.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Grid, Planned
from diffcache.schedulers._sites import count, whole_steps

SOURCE = "ZEUS, arXiv 2604.01552, Ting-Justin-Jiang/ZEUS @ceff240"
NEEDS = ""
ALIASES: Aliases = {}
LEAST_WARMUP = 3  # steps; the authors' code begins no earlier


def rule(grid: Grid, *, every: int = 3, warmup: float = 0.2, final: float = 0.1, most: int = 4) -> SitePlan:
    """Compute every ``every``-th step of the window, and all steps before and after it.

    Args:
        grid: The loop.
        every: The distance of computed steps in the window (``denominator`` of the authors' code, and ``modular`` from
            0 to ``denominator`` − 2). 1 computes every step.
        warmup: The share of the steps before the window.
        final: The share of the steps after the window.
        most: Steps in a row that may be predicted (``max_interval`` of the authors' code).

    Raises:
        BadOption: For an option out of range.
    """
    count("every", every, least=1)
    count("most", most, least=1)
    before, after = _window(grid.steps - grid.start, warmup, final)
    steps = grid.steps - grid.start
    compute = np.ones(grid.steps, bool)
    row = 0
    for i in range(max(before, LEAST_WARMUP) + 1, min(steps - after + 1, steps)):
        skipped = i % every != 0 and row < most
        row = row + 1 if skipped else 0
        compute[grid.start + i] = not skipped
    return in_turns(compute, grid.start)


def plan(
    profile: Profile, computed_steps: float, *, warmup: float = 0.2, final: float = 0.1, longest: int = 6
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables. Only the number of steps is used.
        computed_steps: A whole number.
        warmup: The share of the steps before the window.
        final: The share of the steps after the window.
        longest: The longest run, in steps, for which the window keeps its size; 6 is the longest of the authors.

    Raises:
        BadOption: For an option out of range, or a budget that is not a whole number from 1 to the steps.
    """
    computed = whole_steps(computed_steps, profile.steps)
    before, after = _window(profile.steps, warmup, final)
    compute = windowed(profile.steps, computed, before, after, count("longest", longest, least=1))
    return Planned(sites={"model": in_turns(compute)})


def in_turns(compute: np.ndarray, start: int = 0) -> SitePlan:
    """Return the plan that predicts with the difference and reuses in turns where ``compute`` is False.

    Args:
        compute: bool [T], the computed steps.
        start: The iteration at which the loop begins. Steps before it have no output.
    """
    weights = np.zeros((1, len(compute), 2))
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[start:i])[::-1] + start
        odd = (i - anchors[0]) % 2 == 1
        weights[0, i] = (2, -1) if odd and len(anchors) > 1 else (1, 0)
    return SitePlan(compute=compute, weights=weights)


def windowed(steps: int, computed: int, before: int, after: int, longest: int) -> np.ndarray:
    """Return the computed steps, bool [T]: all outside of the window, and an even spread inside it.

    Args:
        steps: The number of steps T.
        computed: The number of computed steps, 1 to T.
        before: The number of steps before the window. At least one step is computed there.
        after: The number of steps after the window.
        longest: The longest run, in steps, for which the window keeps its size.
    """
    head = max(before, 1)
    for first in range(head, 0, -1):
        tail = after * first // head
        runs = computed - first - tail + 1  # the first run begins at the last step before the window
        length = steps - tail - first + 1
        if first == 1:
            tail, runs, length = 0, computed, steps
        if 1 <= runs <= length <= runs * longest:
            break
    compute = np.zeros(steps, bool)
    compute[:first] = compute[steps - tail :] = True
    compute[first - 1 + np.arange(runs) * length // runs] = True
    return compute


def _window(steps: int, warmup: float, final: float) -> tuple[int, int]:
    """Return the number of steps before and after the window.

    Raises:
        BadOption: For a share out of range.
    """
    for name, share in (("warmup", warmup), ("final", final)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise BadOption(name, share, "a share of the steps, 0 or more and below 1")
    if warmup + final >= 1:
        raise BadOption("final", final, f"less than {1 - warmup:g}, so that a window is left after warmup={warmup:g}")
    return round(warmup * steps), round(final * steps)
