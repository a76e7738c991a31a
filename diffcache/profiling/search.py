"""Search over masks, the closed-loop fit inside: every candidate is fitted and scored end to end on the final state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from diffcache.profiling.dynamics import answers, measure_dynamics, response_of
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.replay import Replay
from diffcache.schedulers._simulation import ANCHORS, Simulator
from diffcache.schedulers.closed_loop import improve, shifts, thinned, thinning
from diffcache.schedulers.uniform import evenly

REPLANNED = 6  # masks taken from the simulation, at most, before single moves begin
FITS = 40  # without a time limit: on the demo models more of them were worth less than 0.2 dB
NEIGHBOURS = (-2, -1, 1, 2)  # budgets beside the one asked for that a front is made of


class Search:
    """Masks of one loop, fitted to ``replays`` and accepted by their score on ``held`` (on ``replays`` if there are
    none). Nothing is drawn: with a number of fits as its limit, the same replays yield the same search.

    tried  sees the fit of every candidate
    """

    def __init__(
        self,
        replays: Sequence[Replay],
        held: Sequence[Replay] = (),
        *,
        per_branch: bool = True,
        anchors: int = ANCHORS,
        tried: Callable[[Fit], None] = lambda f: None,
    ) -> None:
        self.replays, self.held = replays, held
        self.options = {"per_branch": per_branch, "anchors": anchors}
        self.tried = tried
        self.begins = replays[0].begins
        self.steps = len(replays[0].steps)
        self.seen: set[bytes] = set()
        self.fits = 0
        self._dynamics = measure_dynamics(replays)
        self._answers = np.zeros((2, self.steps))

    def evaluate(self, compute: np.ndarray, near: Fit | None = None) -> Fit:
        """The fit of a mask; what it has in common with ``near`` from the start is not run again."""
        self.seen.add(compute.tobytes())
        self.fits += 1
        found = fit(self.replays, compute, held=self.held, resume=near, **self.options)  # type: ignore[arg-type]
        if self.fits <= 2 * REPLANNED + 1:  # the first ones lie far apart; later ones would say the same again
            self._answers += answers(self.replays, found)
        self.tried(found)
        return found

    def simulator(self) -> Simulator:
        """With the network's response as the fits so far have shown it."""
        response = response_of(*self._answers)
        known = self._dynamics if response is None else dataclasses.replace(self._dynamics, response=response)
        return Simulator(known, self.begins, int(self.options["anchors"]))

    def planned(self, computed: int, *near: np.ndarray) -> list[np.ndarray]:
        """Masks that the simulation ends at, best first: from all steps by leaving out, and from those in ``near``."""
        cost = self.simulator().error
        starts = [thinned(self.steps, computed, cost, self.begins), *near]
        ends = {end.tobytes(): end for end in (improve(start, cost, self.begins) for start in starts)}
        return sorted(ends.values(), key=cost)

    def run(self, computed: int, *, time_limit_s: float | None = None, fits: int = FITS) -> Fit:
        """The best fit found with ``computed`` computed steps. Anytime: stops at the limit with the best so far.

        time_limit_s  seconds; None: ends after so many ``fits`` instead, and 0 keeps the even mask

        Starts from the evenly spread mask and from those that the simulated closed loop ends at; then moves single
        computed steps, most promising first by the simulation, and keeps what really scores higher.
        """
        deadline = time.monotonic() + (np.inf if time_limit_s is None else time_limit_s)
        last = self.fits + fits

        def spent() -> bool:
            return time.monotonic() >= deadline or (time_limit_s is None and self.fits >= last)

        best = self.evaluate(evenly(self.steps, computed, self.begins))
        if computed == self.steps or spent():
            return best
        for _ in range(REPLANNED):  # each real run teaches the simulation how the network answers to errors
            wanted = [mask for mask in self.planned(computed, best.compute) if mask.tobytes() not in self.seen]
            if not wanted or spent():
                break
            best = max([best, *(self.evaluate(mask, best) for mask in wanted)], key=lambda f: f.score)
        simulator = self.simulator()
        while not spent():
            movable = np.setdiff1d(np.flatnonzero(best.compute), self.begins)
            candidates = [c for s in movable for c in shifts(best.compute, int(s))]
            fresh = [c for c in candidates if c.tobytes() not in self.seen]
            for candidate in sorted(fresh, key=simulator.error):
                if spent():
                    return best
                found = self.evaluate(candidate, best)
                if found.score > best.score:
                    best = found
                    break
            else:
                break
        return best

    def nearby(self, best: Fit) -> dict[int, Fit]:
        """Fits at budgets a little smaller and larger, one real run each, and ``best``: computed steps -> fit."""
        computed = int(best.compute.sum())
        front, wanted = {computed: best}, {computed + n for n in NEIGHBOURS}
        cost = self.simulator().error
        for mask in thinning(self.steps, cost, self.begins):
            if (count := int(mask.sum())) in wanted:
                front[count] = self.evaluate(improve(mask, cost, self.begins))
            if count <= min(wanted):
                break
        return dict(sorted(front.items()))
