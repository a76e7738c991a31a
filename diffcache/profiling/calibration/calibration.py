"""Make schedules of the whole denoiser from recorded runs: replay, search, fit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from diffcache import host, planning
from diffcache.documents.budget import Budget, check_seconds
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule, Expected, SitePlan, check_store, decibels, most_db
from diffcache.errors import BadOption, ScheduleMismatch, Unusable
from diffcache.host.levels import CannotFollow
from diffcache.profiling.calibration.search import FITS, NUDGES, Search
from diffcache.profiling.calibration.strategy import DEFAULT, Strategy
from diffcache.profiling.fitting.fit import Fit, fit
from diffcache.profiling.fitting.output_fit import fit_outputs, warn_of_weaker_fit
from diffcache.profiling.fitting.promise import Shares, leading, promised
from diffcache.profiling.measuring.measure import profile_of
from diffcache.profiling.recording.record import Trajectory, record_all
from diffcache.profiling.replay import run_facts
from diffcache.profiling.replay.input_share import input_share
from diffcache.profiling.replay.replay import Replay
from diffcache.profiling.replay.warp import Movable, on_levels
from diffcache.schedulers.uniform import evenly
from diffcache.simulation.simulator import ANCHORS

Target = Literal["state", "output"]
Phase = Literal["search", "budgets nearby", "noise levels", "options", "final coefficients"]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a search.

    Attributes:
        fit: The fit to the fitting samples, scored on the accepting samples as well.
        per_channel: Whether it has a scale per channel.
        shares: The samples, on the noise levels of the fit.
    """

    fit: Fit
    per_channel: bool
    shares: Shares


class Calibration:
    """Full runs of a pipeline, recorded once. Schedules for any number of budgets are made from them.

    Args:
        pipe: The pipeline.
        trajectories: The recorded runs.
        held_out: Runs that no coefficient is fitted to. One half of their samples accepts candidates, the other half
            judges the result. Without any, the samples are split (``promise.Shares``) during the search, and all of
            them fit the final coefficients.
        strategy: The numbers that the search decides by.

    Attributes:
        target: "state" if the loop can be replayed (closed-loop fit), else "output".
        why_output: Why the loop cannot be replayed, or "".
        shares: The samples, split.
    """

    def __init__(
        self,
        pipe: Any,
        trajectories: Sequence[Trajectory],
        held_out: Sequence[Trajectory] = (),
        *,
        strategy: Strategy = DEFAULT,
    ) -> None:
        self.pipe = pipe
        self.trajectories = trajectories
        self.strategy = strategy
        self.start, self.end = trajectories[0].start, trajectories[0].end
        self.steps = len(trajectories[0].timesteps)
        everyone, self.why_output = run_facts.replay_all([*trajectories, *held_out])
        self.replays, self.held = everyone[: len(trajectories)], everyone[len(trajectories) :]
        self.target: Target = "state" if self.replays else "output"
        self.shares = Shares.of(self.replays, self.held) if self.replays else Shares([], [], [])
        self._seekers: dict[tuple[Any, ...], Search] = {}
        self._results: dict[tuple[Any, ...], list[Result]] = {}
        self.guidance = run_facts.guidance([*trajectories, *held_out], everyone)

    @classmethod
    def record(
        cls,
        pipe: Any,
        calls: Sequence[Mapping[str, Any]],
        done: Callable[[], None] = lambda: None,
        *,
        held_out: Sequence[Mapping[str, Any]] = (),
    ) -> Calibration:
        """Run ``pipe(**call)`` in full for each call. Each call may hold a batch.

        Generators in the calls are left where they were found: the same calls, run again, repeat the recorded runs.
        """
        pipe = host.adopted(pipe)
        host.denoisers(pipe)
        host.check_calls(pipe, calls)
        if held_out:
            host.check_calls(pipe, held_out, "held_out")
        host.check_same_steps(pipe, [*calls, *held_out])
        found = record_all(pipe, [*calls, *held_out], done)
        return cls(pipe, found[: len(calls)], found[len(calls) :])

    def profile(self) -> Profile:
        """Return the profile of the recorded runs. Half of the steps of each loop are repeated to measure responses."""
        return profile_of(self.pipe, self.trajectories, self.replays, self.why_output)

    def schedule(
        self,
        budget: Budget | float,
        *,
        scheduler: str = "search",
        time_limit_s: float | None = None,
        fits: int = FITS,
        per_branch: bool = True,
        store: str | None = None,
        tried: Callable[[Fit], None] = lambda f: None,
        began: Callable[[Phase], None] = lambda phase: None,
    ) -> CacheSchedule:
        """Return the best schedule found within ``budget`` (a bare number: computed steps).

        Budgets of one calibration share what their searches found: a larger one is never worse than a smaller one that
        came before it.

        Args:
            budget: Computed steps, speed-up or fidelity.
            scheduler: "search", or a scheduler that supplies the mask (``diffcache plan --list``). The fit is the same.
            time_limit_s: Seconds that this call may take. Fits of the evenly spread and of the simulated mask, and the
                fits that the promise and the final coefficients need, are made in any case. None: the search ends
                after ``fits``, which yields the same schedule every time.
            fits: Number of fits that the search over masks may make.
            per_branch: Fit separate coefficients for each guidance branch.
            store: Format in which outputs will be kept; None: as they are.
            tried: Called with every fit of the search.
            began: Called with each phase that begins.
        """
        start_s = time.monotonic()
        budget = Budget.of(budget)
        budget.check(self.end - self.start, whole=scheduler == "search")
        if scheduler != "search":
            planning.check_scheduler(scheduler)
        if store is not None:
            check_store(store)
        check_seconds("time_limit_s", time_limit_s)
        if not host.is_count(fits, 0):
            raise BadOption("fits", fits, "a whole number, 0 or more")
        if self.target == "output":
            return self._by_outputs(budget, scheduler)
        options = {"per_branch": per_branch and self.guidance is not None, "anchors": self._anchors(budget)}
        shares = self.shares
        exact = store in (None, "bf16", "int8")  # residuals are small differences of what is kept
        if exact and (most := self._anchors(budget, with_inputs=True)):
            shares = self._with_best_combination(shares, options | {"anchors": most})
            options["anchors"] = options["anchors"] if shares.fitting[0].input_share is None else most
        seeker = self._seeker(shares, options, tried)
        made = seeker.fits
        ends = math.inf if time_limit_s is None else start_s + time_limit_s
        notes = {
            "scheduler": "search" if scheduler == "search" else f"mask of {scheduler}",
            "fit": "closed loop",
            "fit_target": "state",
            "budget": str(budget),
        }

        masks_until = start_s + (1 - self.strategy.nudged_share) * (ends - start_s)
        front: dict[int, Fit] = {}
        began("search")
        if scheduler == "search":
            computed = self._steps(budget, seeker, ends)
            best = seeker.run(computed, until=masks_until, fits=fits)
            ended = seeker.ended
            began("budgets nearby")
            front = seeker.nearby(best, until=ends)
            best = seeker.no_worse_than_smaller(computed, best)
            began("noise levels")
            with contextlib.suppress(CannotFollow):
                best = seeker.nudged(self.pipe, best, until=ends, fits=math.ceil(NUDGES / FITS * fits))
            notes |= {
                "fits": str(seeker.fits - made),
                "time_limit_s": "none" if time_limit_s is None else f"{time_limit_s:g}",
                "search": {
                    "converged": "converged",
                    "number of fits": f"ended after {fits} fits",
                    "time limit": "cut short by the time limit",
                }[ended],
            }
        else:
            best = seeker.evaluate(self._mask(budget, scheduler))
        began("options")
        seen, channels, shares = self._best_options(best, shares, options, late=lambda: seeker.late(ends))
        result = self._no_worse(Result(seen, channels, shares), options) if front else Result(seen, channels, shares)
        found = result.fit
        began("final coefficients")
        expected, final = self._last_fits(found.compute, found.levels, result.per_channel, result.shares, options)
        if found.levels is not None:
            notes["levels"] = "moved"
        if found.input_share is not None:
            notes["combined"] = "clean estimates"
        if front:
            front[int(found.compute.sum())] = found
            notes["front"] = ", ".join(f"{n} steps {decibels(f.score)}" for n, f in sorted(front.items()))
        return self._document(final.plan, notes, expected, final.levels)

    def _no_worse(self, result: Result, options: Mapping[str, Any]) -> Result:
        """Return ``result``, or a result of an earlier budget that has no more computed steps and a higher score."""
        kept = dataclasses.replace(result, fit=dataclasses.replace(result.fit, checkpoints={}))
        earlier = self._results.setdefault(_key(result.shares, options), [])
        earlier.append(kept)
        able = [one for one in earlier if one.fit.compute.sum() <= result.fit.compute.sum()]
        return max(able, key=lambda one: (one.fit.score, one is kept))

    def _last_fits(
        self,
        compute: np.ndarray,
        levels: np.ndarray | None,
        per_channel: bool,
        shares: Shares,
        options: Mapping[str, Any],
    ) -> tuple[Expected, Fit]:
        """Return the fidelity to expect of a mask on these noise levels, and the fit with the final coefficients."""
        even = evenly(len(compute), int(compute.sum()), self.replays[0].first_steps)

        def refit(fitted: Sequence[Replay], held: Sequence[Replay] = ()) -> Fit:
            return fit(fitted, compute, held=held, levels=levels, per_channel=per_channel, **options)

        def reference(fitted: Sequence[Replay], held: Sequence[Replay]) -> Fit:
            return fit(fitted, even, held=held, levels=levels, **options)

        if self.held:
            final = refit(shares.fitting, [*shares.accepting, *shares.judging])
            return promised(shares, final, reference), final
        plan = refit([*shares.fitting, *shares.accepting], shares.judging)
        expected = promised(shares, plan, reference)
        return expected, refit(shares.everyone) if shares.judging else plan

    def _seeker(self, shares: Shares, options: Mapping[str, Any], tried: Callable[[Fit], None]) -> Search:
        """Return the search with these options, which remembers what earlier budgets found."""
        key = _key(shares, options)
        if key not in self._seekers:
            few, few_held = self._few(shares)
            self._seekers[key] = Search(few, few_held, nudge_gain_db=self.strategy.nudge_gain_db, **options)
        self._seekers[key].tried, self._seekers[key].reserve = tried, self.strategy.last_fits
        return self._seekers[key]

    def _few(self, shares: Shares) -> tuple[list[Replay], list[Replay]]:
        """Return the samples that the search fits, and those that it accepts candidates by in addition."""
        fitting = leading(shares.fitting, self.strategy.searched_samples)
        return fitting, leading(shares.accepting, self.strategy.held_samples)

    def fitted(self, compute: np.ndarray, *, per_branch: bool = True, per_channel: bool = False) -> CacheSchedule:
        """Fit one given mask in closed loop.

        Args:
            compute: bool, one entry per step of the loop.
            per_branch: Fit separate coefficients for each guidance branch.
            per_channel: Fit a scale per channel.

        Raises:
            ScheduleMismatch: The loop cannot be replayed.
        """
        if self.target != "state":
            raise ScheduleMismatch(f"the loop cannot be replayed: {self.why_output}")
        options = {"per_branch": per_branch and self.guidance is not None, "anchors": ANCHORS}
        shares = self._with_best_combination(self.shares, options, compute)
        expected, found = self._last_fits(compute, None, per_channel, shares, options)
        notes = {"scheduler": "a mask of one's own", "fit": "closed loop", "fit_target": "state"}
        notes |= {} if found.input_share is None else {"combined": "clean estimates"}
        return self._document(found.plan, notes, expected)

    def _with_best_combination(
        self, shares: Shares, options: Mapping[str, Any], tried: np.ndarray | None = None
    ) -> Shares:
        """Return the samples with an input share if combining clean estimates is better than combining outputs.

        It is better where a sampler draws noise.

        Args:
            shares: The samples.
            options: Options of the fit.
            tried: The mask that both are compared on. None: an even one.
        """
        everyone = [*shares.fitting, *shares.accepting, *shares.judging]
        known = [_input_share(replay) for replay in everyone]
        own = known[0]
        if own is None or any(other is None or not np.array_equal(own, other) for other in known):
            return shares
        estimates = shares.apply(lambda replays: [replay.with_input_share(own) for replay in replays])
        first_steps = everyone[0].first_steps
        if tried is None:
            tried = evenly(len(own), max(len(own) // self.strategy.estimates_tried_on, len(first_steps)), first_steps)
        plain, other = (
            fit(
                leading(some.fitting, self.strategy.searched_samples),
                tried,
                held=leading(some.accepting, self.strategy.held_samples),
                **options,
            )
            for some in (shares, estimates)
        )
        return estimates if other.beats(plain, self.strategy.estimates_gain_db) else shares

    def _best_options(
        self, best: Fit, shares: Shares, options: Mapping[str, Any], late: Callable[[], bool]
    ) -> tuple[Fit, bool, Shares]:
        """Choose moved noise levels and a scale per channel, each only if the accepting samples gain from it.

        Returns:
            The fit to all fitting samples, whether it has a scale per channel, and the samples on its noise levels.
        """

        def fitted(some: Shares, **more: Any) -> Fit:
            return fit(some.fitting, best.compute, held=some.accepting, **options, **more)

        found = fitted(shares)
        if not shares.accepting or best.compute.all():
            return found, False, shares
        if best.levels is not None and not late():
            levels = best.levels
            moved = shares.apply(lambda replays: on_levels([Movable(self.pipe, r) for r in replays], levels))
            other = fitted(moved, levels=levels)
            if other.beats(found, self.strategy.levels_gain_db):
                found, shares = other, moved
        if late():
            return found, False, shares
        scaled = fitted(shares, levels=found.levels, per_channel=True)
        better = min(scaled.held_score - found.held_score, scaled.score - found.score) > self.strategy.scale_gain_db
        return scaled if better else found, better, shares

    def _anchors(self, budget: Budget, *, with_inputs: bool = False) -> int:
        """Return how many outputs may be kept at once, each with its input if ``with_inputs``."""
        if budget.memory_bytes is None:
            return ANCHORS
        calls = self.trajectories[0].steps[0].calls
        kept = [t for call in calls for t in (*call.outputs, *([call.input] if with_inputs else []))]
        held: int = sum(t.numel() * t.element_size() for t in kept)
        if budget.memory_bytes < held and not with_inputs:
            raise BadOption("memory_bytes", budget.memory_bytes, f"{held} or more: one step's outputs, of this batch")
        return min(ANCHORS, budget.memory_bytes // held)

    def _steps(self, budget: Budget, seeker: Search, until: float) -> int:
        """Return how many steps the loop may compute. At ``until``, the fewest that were seen to be enough."""
        if budget.computed_steps is not None:
            return _whole(budget.computed_steps)
        if budget.speedup is not None:
            return int(planning.steps_for_speedup(self.profile(), budget.speedup))
        assert budget.min_psnr_db is not None
        least, low, high = None, len(seeker.first_steps), seeker.steps
        found = seeker.evaluate(np.ones(high, bool))
        while low <= high and not seeker.late(until):  # by one real run each, of the mask that the simulation prefers
            middle = (low + high) // 2
            if middle < seeker.steps:
                found = seeker.evaluate(seeker.simulated(middle))
            if found.score >= budget.min_psnr_db:
                least, high = middle, middle - 1
            else:
                low = middle + 1
        if least is None and low <= high:
            return seeker.steps  # there was no time to find out
        if least is None:
            raise BadOption(
                "min_psnr_db", budget.min_psnr_db, f"up to {most_db(found.score)}, with every step computed"
            )
        return least

    def _mask(self, budget: Budget, scheduler: str) -> np.ndarray:
        """Return the mask of another scheduler, bool [steps of the loop]."""
        profile = self.profile()
        plans = [(site, plan) for _, site, plan in planning.plan(profile, scheduler, budget).plans()]
        if [site for site, _ in plans] != ["model"]:
            sites = ", ".join(site for site, _ in plans)[:80]
            raise BadOption("scheduler", scheduler, f"one that plans for 'model' (this one: {sites})")
        return plans[0][1].compute[self.start : self.end]

    def _by_outputs(self, budget: Budget, scheduler: str) -> CacheSchedule:
        """Return a schedule that is fitted to the outputs, for a loop that cannot be replayed."""
        warn_of_weaker_fit(self.why_output, scheduler)
        first_steps, steps = self.trajectories[0].first_steps, self.end - self.start
        if scheduler != "search":
            compute = self._mask(budget, scheduler)
        elif budget.computed_steps is not None:
            compute = evenly(steps, _whole(budget.computed_steps), first_steps)
        elif budget.speedup is not None:
            compute = evenly(steps, planning.steps_for_speedup(self.profile(), budget.speedup), first_steps)
        else:
            raise Unusable("min_psnr_db", self.why_output, "Pass a budget in computed_steps")
        notes = {
            "scheduler": "even mask" if scheduler == "search" else f"mask of {scheduler}",
            "fit": "least squares",
            "fit_target": "output",
            "fit_target_reason": self.why_output,
            "budget": str(budget),
        }
        return self._document(SitePlan(compute=compute, weights=fit_outputs(self.trajectories, compute)), notes)

    def _document(
        self,
        plan: SitePlan,
        notes: Mapping[str, str],
        expected: Expected | None = None,
        levels: np.ndarray | None = None,
    ) -> CacheSchedule:
        samples = run_facts.samples(self.trajectories, self.replays)
        context = run_facts.context(self.pipe, self.trajectories, samples, self.guidance)
        denoisers = run_facts.denoisers(self.pipe, self.trajectories[0])
        plans = {name: {"model": self._plan(module, plan)} for name, module in denoisers.items()}
        return context.schedule(plans, sigmas=levels, expected=expected, notes=notes)

    def _plan(self, module: nn.Module, plan: SitePlan) -> SitePlan:
        """Return the part of a plan of the whole loop that concerns ``module``."""
        own = run_facts.steps_called(self.trajectories[0], module)[self.start : self.end]
        mine = plan.compute & own
        mine[0] = True
        # At the steps of another denoiser, which this one never sees, it reuses: that refers to nothing new.
        reused = np.where(mine[:, None], 0.0, np.eye(plan.weights.shape[2])[0])

        fitted = SitePlan(
            compute=mine,
            weights=np.where(own[:, None], plan.weights, reused),
            kappa=None if plan.kappa is None else np.where(own, plan.kappa, 0.0),
            inputs=None if plan.inputs is None else np.where(own[:, None], plan.inputs, 0.0),
            scale=plan.scale,
        )
        return fitted.on_grid(self.start, self.steps - self.end)


def _input_share(replay: Replay) -> np.ndarray | None:
    """Return the input share of the network's own outputs; None if it is not known.

    The noise scheduler's prediction is a weighted sum of these outputs, so its share is divided by the sum of weights.
    """
    found, shares = input_share(replay.trajectory), np.array([sum(weights) for weights in replay.guidance])
    return found / shares if found is not None and replay.paired and (np.abs(shares) > 1e-3).all() else None


def _key(shares: Shares, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what fits must agree in to be compared."""
    return (*sorted(options.items()), shares.fitting[0].input_share is None)


def _whole(computed_steps: float) -> int:
    """Return a whole number of steps. Raise BadOption for another number."""
    if computed_steps != int(computed_steps):
        raise BadOption(
            "computed_steps", computed_steps, "a whole number, because each step computes the whole denoiser"
        )
    return int(computed_steps)
