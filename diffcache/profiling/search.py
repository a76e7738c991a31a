"""Search over masks, the closed-loop fit inside: every candidate is fitted and scored end to end on the final state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from diffcache.profiling.dynamics import measure_dynamics, with_response
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.replay import Replay
from diffcache.schedulers._simulation import Simulator
from diffcache.schedulers.closed_loop import improve, shifts
from diffcache.schedulers.uniform import evenly

REPLANNED = 3  # masks taken from the simulation before single moves begin


def search(
    replays: Sequence[Replay],
    computed: int,
    *,
    time_limit_s: float,
    per_branch: bool = True,
    tried: Callable[[Fit], None] = lambda f: None,
) -> Fit:
    """The best fit found with ``computed`` computed steps. Anytime: stops at the limit with the best so far.

    Starts from the evenly spread mask and from those that the simulated closed loop prefers; then moves single
    computed steps, most promising first by the simulation, and keeps what really scores higher. ``tried`` sees every
    candidate's fit. Moves are ordered, never drawn: the same time yields the same search.
    """
    deadline = time.monotonic() + time_limit_s
    steps, begins = len(replays[0].steps), replays[0].begins

    def evaluate(compute: np.ndarray, near: Fit | None = None) -> Fit:
        found = fit(replays, compute, per_branch=per_branch, resume=near)
        tried(found)
        return found

    even = evaluate(evenly(steps, computed, begins))
    if computed == steps or time_limit_s <= 0:
        return even
    dynamics, tries, seen = measure_dynamics(replays), [even], {even.compute.tobytes()}
    best = even
    for _ in range(REPLANNED):  # each real run teaches the simulation how the network answers to errors
        dynamics = with_response(dynamics, replays, tries)
        wanted = improve(best.compute, Simulator(dynamics, begins).error, begins)
        if wanted.tobytes() in seen:
            break
        seen.add(wanted.tobytes())
        tries.append(evaluate(wanted, best))
        best = max(best, tries[-1], key=lambda f: f.score)
        if time.monotonic() >= deadline:
            break
    simulator = Simulator(with_response(dynamics, replays, tries), begins)

    while time.monotonic() < deadline:
        movable = np.setdiff1d(np.flatnonzero(best.compute), begins)
        candidates = [c for s in movable for c in shifts(best.compute, int(s))]
        fresh = [c for c in candidates if c.tobytes() not in seen]
        if not fresh:
            break
        for candidate in sorted(fresh, key=simulator.error):
            if time.monotonic() >= deadline:
                break
            seen.add(candidate.tobytes())
            found = evaluate(candidate, best)
            if found.score > best.score:
                best = found
                break
        else:
            break
    return best
