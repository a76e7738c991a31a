"""Search over masks and noise levels. Every candidate is fitted in closed loop and scored on the final state."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from diffcache.host.levels import CannotFollow
from diffcache.profiling.calibration.strategy import DEFAULT
from diffcache.profiling.fitting.dynamics import answers, measure_dynamics, with_answer
from diffcache.profiling.fitting.fit import Fit, fit
from diffcache.profiling.replay.replay import Replay
from diffcache.profiling.replay.warp import Movable, on_levels, warped
from diffcache.schedulers.closed_loop import improve, shifts, thinned, thinning
from diffcache.schedulers.uniform import evenly
from diffcache.simulation.simulator import ANCHORS, Simulator

REPLANNED = 6  # rounds of masks taken from the simulation, at most, before single moves begin
FITS = 40  # without a time limit: on the demo models more of them were worth less than 0.2 dB
DOUBTS = (0.1, 0.3, 1.0)  # the masks that simulations end at lie apart; which is best differs by model and budget
NUDGE = 0.5  # in steps
NUDGES = 24  # fits, without a time limit
NEIGHBOURS = (-2, -1, 1, 2)  # budgets around the one asked for that a front is made of

Ended = Literal["converged", "number of fits", "time limit"]


class Search:
    """A search over masks of one loop, fitted to ``replays``.

    The better of two fits is the one with the higher ``Fit.score``, over fitted and held-out samples. Nothing is
    random: with a number of fits as its limit, the same replays yield the same search. One search can be used for
    several budgets: ``best_within`` considers every fit so far, so that a larger budget is never worse than a smaller
    one.

    Attributes:
        tried: Called with the fit of every candidate.
        nudge_gain_db: Least gain of moving one computed step to another noise level.
        fits: Number of fits so far.
        ended: Why the last run ended.
        reserve: Number of fits that follow the search. A time limit reserves time for them.
    """

    def __init__(
        self,
        replays: Sequence[Replay],
        held: Sequence[Replay] = (),
        *,
        per_branch: bool = True,
        anchors: int = ANCHORS,
        tried: Callable[[Fit], None] = lambda f: None,
        nudge_gain_db: float = DEFAULT.nudge_gain_db,
    ) -> None:
        self.replays, self.held = replays, held
        self.options = {"per_branch": per_branch, "anchors": anchors}
        self.tried, self.nudge_gain_db = tried, nudge_gain_db
        self.first_steps = replays[0].first_steps
        self.steps = len(replays[0].steps)
        self.seen: set[bytes] = set()
        self.fits = 0
        self.fit_s = 0.0
        self.reserve = 0
        self.ended: Ended = "converged"
        self._best: dict[int, Fit] = {}  # computed steps -> best fit, without checkpoints: they hold a run each
        self._dynamics = measure_dynamics(replays)
        self._answers = np.zeros((3, 1, self.steps))

    def evaluate(self, compute: np.ndarray, near: Fit | None = None) -> Fit:
        """Return the fit of a mask. The first steps that it has in common with ``near`` are not run again."""
        self.seen.add(compute.tobytes())
        found = self._fitted(lambda: fit(self.replays, compute, held=self.held, resume=near, **self.options))  # type: ignore[arg-type]
        if self.fits <= 2 * REPLANNED + 1:  # the first ones lie far apart; later ones would say the same again
            self._answers += answers(self.replays, found).sum(1, keepdims=True)
        computed = int(compute.sum())
        if computed not in self._best or found.score > self._best[computed].score:
            self._best[computed] = dataclasses.replace(found, checkpoints={})
        return found

    def _fitted(self, make: Callable[[], Fit]) -> Fit:
        """Call ``make``, count and time it, and return its result."""
        began = time.monotonic()
        found = make()
        self.fits += 1
        self.fit_s = max(0.8 * self.fit_s, time.monotonic() - began)
        self.tried(found)
        return found

    def best_within(self, computed: int) -> Fit | None:
        """Return the best fit so far with at most ``computed`` computed steps, without checkpoints; None if there is
        none. Of equal scores, the fewest steps."""
        able = [self._best[n] for n in sorted(self._best) if n <= computed]
        return max(able, key=lambda found: found.score, default=None)

    def simulator(self, doubt: float = 1.0) -> Simulator:
        """Return a simulator with the network's answers as the fits so far have shown them."""
        known = with_answer(self._dynamics, self._answers)
        return Simulator(known, self.first_steps, int(self.options["anchors"]), doubt)

    def simulated(self, computed: int, doubt: float = 1.0) -> np.ndarray:
        """Return the mask that the simulation prefers, from all steps by leaving out."""
        cost = self.simulator(doubt).error
        return improve(thinned(self.steps, computed, cost, self.first_steps), cost, self.first_steps)

    def extended(self, compute: np.ndarray, computed: int) -> np.ndarray:
        """Return ``compute`` with steps added up to ``computed``, one by one, each the one that helps the simulation
        most."""
        cost = self.simulator().error
        while compute.sum() < computed:
            candidates = np.repeat(compute[None], int((~compute).sum()), 0)
            candidates[np.arange(len(candidates)), np.flatnonzero(~compute)] = True
            compute = min(candidates, key=cost)
        return compute

    def planned(self, computed: int, *near: np.ndarray, until: float = math.inf) -> list[np.ndarray]:
        """Return the masks that local searches in the simulation find, with several values of its doubt.

        The searches begin with the mask from leaving out steps, and with the masks in ``near``. The best mask by the
        largest doubt comes first. At ``until``, return the masks found so far.
        """
        ends = {}
        for doubt in DOUBTS:
            cost = self.simulator(doubt).error
            for start in (thinned(self.steps, computed, cost, self.first_steps), *near):
                if self.late(until):
                    break
                end = improve(start, cost, self.first_steps)
                ends[end.tobytes()] = end
        return sorted(ends.values(), key=self.simulator().error)

    def run(self, computed: int, *, until: float = math.inf, fits: int = FITS) -> Fit:
        """Return the best fit found with at most ``computed`` computed steps.

        The evenly spread mask, the simulated one and the best mask of a smaller budget, with steps added, are always
        fitted. Then come the masks that the simulation ends at after each real run, then moves of single computed
        steps, most promising first by the simulation; what really scores higher is kept.

        Args:
            computed: Number of steps that the loop may compute.
            until: ``time.monotonic()`` at which to return the best so far. No fit begins that would end later.
            fits: Number of fits after which to return the best so far.
        """
        last = self.fits + fits

        def spent() -> bool:
            self.ended = "time limit" if self.late(until) else "number of fits" if self.fits >= last else "converged"
            return self.ended != "converged"

        best = self.evaluate(evenly(self.steps, computed, self.first_steps))
        self.ended = "converged"
        if computed == self.steps:
            return best
        best = self._tried(self.simulated(computed), best)
        smaller = self.best_within(computed - 1)
        if smaller is not None:
            best = self._tried(self.extended(smaller.compute, computed), best)
        best = self._climbed(computed, best, spent, until)
        return self.no_worse_than_smaller(computed, best)

    def _tried(self, mask: np.ndarray, best: Fit) -> Fit:
        """Return the better of ``best`` and the fit of ``mask``, where that is new."""
        if mask.tobytes() in self.seen:
            return best
        found = self.evaluate(mask, best)
        return found if found.score > best.score else best

    def _climbed(self, computed: int, best: Fit, spent: Callable[[], bool], until: float) -> Fit:
        """Return the best fit after fitting simulated masks, then single moves, until ``spent``."""
        for _ in range(REPLANNED):  # each real run teaches the simulation how the network answers to errors
            if spent():
                return best
            wanted = [
                mask for mask in self.planned(computed, best.compute, until=until) if mask.tobytes() not in self.seen
            ]
            for mask in wanted:
                if spent():
                    return best
                best = self._tried(mask, best)
            if not wanted:
                break
        simulator = self.simulator()
        while not spent():
            movable = np.setdiff1d(np.flatnonzero(best.compute), self.first_steps)
            candidates = [c for s in movable for c in shifts(best.compute, int(s))]
            fresh = [c for c in candidates if c.tobytes() not in self.seen]
            before = best
            for candidate in sorted(fresh, key=simulator.error):
                if spent():
                    return best
                best = self._tried(candidate, best)
                if best is not before:
                    break
            else:
                break
        return best

    def no_worse_than_smaller(self, computed: int, best: Fit) -> Fit:
        """Return ``best``. If fewer computed steps score higher, return their mask with steps added, or unchanged."""
        smaller = self.best_within(computed)
        if smaller is None or smaller.score <= best.score:
            return best
        more = self.evaluate(self.extended(smaller.compute, computed))
        if more.score >= smaller.score:
            return more
        return self.evaluate(smaller.compute)  # the same fit again, with its checkpoints

    def late(self, until: float) -> bool:
        """Return whether a fit that begins now would end after ``until``, or leave no time for later fits."""
        return time.monotonic() + (1 + self.reserve) * self.fit_s > until

    def nudged(self, pipe: Any, best: Fit, *, until: float = math.inf, fits: int = NUDGES) -> Fit:
        """Return ``best``, or a better fit on other noise levels: its computed steps are moved one after another, the
        last first, half a step to either side, and the levels between them in proportion.

        A gain counts from ``Strategy.nudge_gain_db``. The search ends as ``run`` does.

        Raises:
            CannotFollow: The loop cannot run on other levels.
        """
        last = self.fits + fits
        everyone = [Movable(pipe, replay) for replay in (*self.replays, *self.held)]
        own = everyone[0].levels
        if any(not np.array_equal(m.levels, own) for m in everyone):
            raise CannotFollow("its levels differ from run to run")
        at = np.flatnonzero(best.compute)
        before, places, best = best, at.astype(float), dataclasses.replace(best, levels=own)
        for k in range(len(at) - 1, -1, -1):
            for side in (-NUDGE, NUDGE) if at[k] not in self.first_steps else ():
                if self.late(until) or self.fits >= last:
                    break
                wanted = places.copy()
                wanted[k] += side
                levels = warped(own, best.compute, wanted)
                found = self._on_levels(everyone, best, levels)
                if found.beats(best, self.nudge_gain_db):
                    best, places = found, wanted
                    break
        return before if np.array_equal(best.levels, own) else best  # type: ignore[arg-type]

    def _on_levels(self, everyone: Sequence[Movable], best: Fit, levels: np.ndarray) -> Fit:
        """Return the fit of the best mask on other noise levels."""
        moved = on_levels(everyone, levels)
        train, held = moved[: len(self.replays)], moved[len(self.replays) :]
        return self._fitted(
            lambda: fit(train, best.compute, held=held, levels=levels, resume=best, **self.options)  # type: ignore[arg-type]
        )

    def nearby(self, best: Fit, *, until: float = math.inf) -> dict[int, Fit]:
        """Return fits at budgets a little smaller and larger, and ``best``: computed steps -> fit.

        Each is one real run of the simulated mask. A larger budget that comes out worse than a smaller one gets another
        run: of the smaller one's mask with steps added.
        """
        computed = int(best.compute.sum())
        wanted = [computed + n for n in NEIGHBOURS if len(self.first_steps) <= computed + n <= self.steps]
        cost = self.simulator().error
        masks = {int(m.sum()): m for m in thinning(self.steps, cost, self.first_steps) if m.sum() in wanted}
        for count in wanted:
            if self.late(until):
                break
            self.evaluate(improve(masks[count], cost, self.first_steps))
            smaller = self.best_within(count - 1)
            if smaller is not None and smaller.score > self._best[count].score and not self.late(until):
                self.evaluate(self.extended(smaller.compute, count))
        return {n: self._best[n] for n in sorted(self._best) if n == computed or n in wanted}
