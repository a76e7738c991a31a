"""Computed steps and weights whose simulated run ends nearest to the full run (this project).

Its weights come from the simulation too; all branches share them. A fit on recorded runs
(``diffcache.profiling.Calibration``) weighs branches apart and corrects what the simulation left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import Expected, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Planned
from diffcache.schedulers.uniform import evenly
from diffcache.simulation.simulator import ANCHORS, Simulator

SOURCE = "this project: docs/architecture.md"
NEEDS = "dynamics"
GROUP = "start here"
REACH = 4  # how far a move may shift a computed step


def plan(profile: Profile, computed_steps: float, *, anchors: int = ANCHORS) -> Planned:
    """``anchors``: most computed steps that a prediction may use, each one more output to keep.

    Raises BadOption for a profile without dynamics.
    """
    if profile.dynamics is None:
        reason = profile.provenance.get("no_dynamics", "none were measured")
        raise BadOption("profile", f"one without dynamics ({reason})", "one with dynamics")
    if anchors < 1:
        raise BadOption("anchors", anchors, "1 or more")
    simulator = Simulator(profile.dynamics, anchors=anchors)
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
    """The mask of ``thinning`` with ``computed`` computed steps.

    A start for ``improve`` that lies far from the even mask, and often in a better valley: on the class-conditional
    demo model, guided, 25 of 50 steps, held-out samples ended at 62 dB instead of 46.
    """
    return next(mask for mask in thinning(steps, cost, fixed) if mask.sum() == computed)


def thinning(steps: int, cost: Callable[[np.ndarray], float], fixed: Collection[int] = (0,)) -> Iterator[np.ndarray]:
    """Masks of all steps, all but one, … down to those in ``fixed``: each leaves out the step that costs least."""
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
    """Hill climbing by single moves from ``compute``, until none lowers ``cost``; steps in ``fixed`` stay."""
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
    """The masks that differ from ``compute`` in that one computed step, moved by at most REACH."""
    found = []
    for to in range(max(0, step - REACH), min(len(compute), step + REACH + 1)):
        if not compute[to]:
            candidate = compute.copy()
            candidate[step], candidate[to] = False, True
            found.append(candidate)
    return found
