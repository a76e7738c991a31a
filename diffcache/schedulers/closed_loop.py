"""Computed steps and weights whose simulated run ends nearest to the full run (this project).

The weights also come from the simulation, and all branches share them. A fit on recorded runs
(``diffcache.profiling.Calibration``) gives each branch separate weights and corrects effects that the simulation omits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import Expected, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Planned
from diffcache.schedulers._sites import dynamics_of
from diffcache.schedulers.uniform import evenly
from diffcache.simulation.simulator import ANCHORS, Simulator

SOURCE = "this project: docs/architecture.md"
NEEDS = "dynamics"
GROUP = "start here"
REACH = 4  # how far a move may shift a computed step


def plan(profile: Profile, computed_steps: float, *, anchors: int = ANCHORS) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables, with dynamics.
        computed_steps: A whole number.
        anchors: The most computed steps that a prediction may use. Each one is an additional output to keep.

    Raises:
        BadOption: For a profile without dynamics, or an option out of range.
    """
    dynamics = dynamics_of(profile)
    if anchors < 1:
        raise BadOption("anchors", anchors, "1 or more")
    simulator = Simulator(dynamics, anchors=anchors)
    starts = [evenly(profile.steps, computed_steps), thinned(profile.steps, int(computed_steps), simulator.error)]
    compute = min((improve(start, simulator.error) for start in starts), key=simulator.error)
    run = simulator.fitted(compute)
    return Planned(
        sites={"model": SitePlan(compute=compute, weights=run.weights[None])},
        expected=Expected.over(simulator.psnr_db(run), "simulated"),
    )


def thinned(
    steps: int, computed: int, cost: Callable[[np.ndarray], float], fixed: Collection[int] = (0,)
) -> np.ndarray:
    """Return the mask of ``thinning`` with ``computed`` computed steps, bool [T].

    It is a start for ``improve`` that differs much from the even mask, and often leads to a better minimum. On the
    class-conditional demo model, guided, 25 of 50 steps, held-out samples ended at 62 dB instead of 46 dB.

    Args:
        steps: The number of steps T.
        computed: The number of computed steps.
        cost: Returns the cost of a mask.
        fixed: Steps that stay computed.
    """
    return next(mask for mask in thinning(steps, cost, fixed) if mask.sum() == computed)


def thinning(steps: int, cost: Callable[[np.ndarray], float], fixed: Collection[int] = (0,)) -> Iterator[np.ndarray]:
    """Yield masks bool [T] of all steps, all but one, … down to those in ``fixed``.

    Each leaves out the step that costs least.

    Args:
        steps: The number of steps T.
        cost: Returns the cost of a mask.
        fixed: Steps that stay computed.
    """
    compute = np.ones(steps, bool)
    yield compute
    while (free := np.setdiff1d(np.flatnonzero(compute), list(fixed))).size:
        without = []
        for step in free:
            candidate = compute.copy()
            candidate[step] = False
            without.append(candidate)
        compute = min(without, key=cost)
        yield compute


def improve(compute: np.ndarray, cost: Callable[[np.ndarray], float], fixed: Collection[int] = (0,)) -> np.ndarray:
    """Improve a mask by single moves of computed steps, until none lowers the cost (hill climbing).

    Args:
        compute: bool [T], the mask to begin with.
        cost: Returns the cost of a mask.
        fixed: Steps that do not move.

    Returns:
        bool [T].
    """
    best, moved = cost(compute), True
    while moved:
        moved = False
        for step in np.setdiff1d(np.flatnonzero(compute), list(fixed)):
            costs = [(cost(candidate), candidate) for candidate in shifts(compute, int(step))]
            if costs and min(costs, key=lambda c: c[0])[0] < best:
                best, compute = min(costs, key=lambda c: c[0])
                moved = True
    return compute


def shifts(compute: np.ndarray, step: int) -> list[np.ndarray]:
    """Return the masks in which the computed step ``step`` is moved by at most REACH steps."""
    found = []
    for to in range(max(0, step - REACH), min(len(compute), step + REACH + 1)):
        if not compute[to]:
            candidate = compute.copy()
            candidate[step], candidate[to] = False, True
            found.append(candidate)
    return found
