"""Search over masks and noise levels, the closed-loop fit inside: every candidate is fitted and scored end to end on
the final state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffcache.levels import CannotFollow
from diffcache.profiling.dynamics import answers, measure_dynamics, with_answer
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.replay import Replay
from diffcache.profiling.warp import Movable, warped
from diffcache.schedulers._simulation import ANCHORS, Simulator
from diffcache.schedulers.closed_loop import improve, shifts, thinned, thinning
from diffcache.schedulers.uniform import evenly

REPLANNED = 6  # masks taken from the simulation, at most, before single moves begin
FITS = 40  # without a time limit: on the demo models more of them were worth less than 0.2 dB
DOUBTS = (0.1, 0.3, 1.0)  # the masks that simulations end at lie apart; which is best differs by model and budget
NUDGE = 0.5  # of a step
NUDGE_PAYS_DB = 0.05
NUDGES = 24  # fits, without a time limit
NEIGHBOURS = (-2, -1, 1, 2)  # budgets beside the one asked for that a front is made of


class Search:
    """Masks of one loop, fitted to ``replays`` and accepted by how they serve those and the ones ``held`` out
    (``Fit.beats``). Nothing is drawn: with a number of fits as its limit, the same replays yield the same search.

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
        self._answers = np.zeros((3, self.steps))

    def evaluate(self, compute: np.ndarray, near: Fit | None = None) -> Fit:
        """The fit of a mask; what it has in common with ``near`` from the start is not run again."""
        self.seen.add(compute.tobytes())
        self.fits += 1
        found = fit(self.replays, compute, held=self.held, resume=near, **self.options)  # type: ignore[arg-type]
        if self.fits <= 2 * REPLANNED + 1:  # the first ones lie far apart; later ones would say the same again
            self._answers += answers(self.replays, found)
        self.tried(found)
        return found

    def simulator(self, doubt: float = 1.0) -> Simulator:
        """With the network's answers as the fits so far have shown them."""
        known = with_answer(self._dynamics, self._answers)
        return Simulator(known, self.begins, int(self.options["anchors"]), doubt)

    def planned(self, computed: int, *near: np.ndarray) -> list[np.ndarray]:
        """Masks that the simulation ends at, doubting a little and much, best first by the latter: from all steps by
        leaving out, and from those in ``near``."""
        ends = {}
        for doubt in DOUBTS:
            cost = self.simulator(doubt).error
            for start in (thinned(self.steps, computed, cost, self.begins), *near):
                end = improve(start, cost, self.begins)
                ends[end.tobytes()] = end
        return sorted(ends.values(), key=self.simulator().error)

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
            for mask in wanted:
                if spent():
                    return best
                found = self.evaluate(mask, best)
                best = found if found.beats(best) else best
            if not wanted:
                break
        simulator = self.simulator()
        while not spent():
            movable = np.setdiff1d(np.flatnonzero(best.compute), self.begins)
            candidates = [c for s in movable for c in shifts(best.compute, int(s))]
            fresh = [c for c in candidates if c.tobytes() not in self.seen]
            for candidate in sorted(fresh, key=simulator.error):
                if spent():
                    return best
                found = self.evaluate(candidate, best)
                if found.beats(best):
                    best = found
                    break
            else:
                break
        return best

    def nudged(self, pipe: Any, best: Fit, *, time_limit_s: float | None = None, fits: int = NUDGES) -> Fit:
        """``best``, or better: its computed steps moved one after another, the last first, half a step to either side,
        and the levels between them in proportion. A gain counts from ``NUDGE_PAYS_DB``: on few held-out samples,
        smaller ones were not found again on others. Ends as ``run`` does. Raises CannotFollow where the loop is bound
        to its own levels."""
        deadline = time.monotonic() + (np.inf if time_limit_s is None else time_limit_s)
        last = self.fits + fits
        everyone = [Movable(pipe, replay) for replay in (*self.replays, *self.held)]
        own = everyone[0].levels
        if any(not np.array_equal(m.levels, own) for m in everyone):
            raise CannotFollow("its levels differ from run to run")
        at = np.flatnonzero(best.compute)
        before, places, best = best, at.astype(float), dataclasses.replace(best, levels=own)
        for k in range(len(at) - 1, -1, -1):
            for side in (-NUDGE, NUDGE) if at[k] not in self.begins else ():
                if time.monotonic() >= deadline or (time_limit_s is None and self.fits >= last):
                    break
                wanted = places.copy()
                wanted[k] += side
                levels = warped(own, best.compute, wanted)
                moved = [m.on(levels) for m in everyone]
                train, held = moved[: len(self.replays)], moved[len(self.replays) :]
                self.fits += 1
                found = fit(train, best.compute, held=held, levels=levels, resume=best, **self.options)  # type: ignore[arg-type]
                self.tried(found)
                if found.beats(best, NUDGE_PAYS_DB):
                    best, places = found, wanted
                    break
        return before if np.array_equal(best.levels, own) else best  # type: ignore[arg-type]

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
