"""From recorded runs to schedules of the whole denoiser: replay, search, fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from diffcache import host, planning
from diffcache.budget import Budget
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.levels import CannotFollow
from diffcache.profile import Profile
from diffcache.profiling import circumstances
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.measure import profile_of
from diffcache.profiling.output_fit import fit_outputs
from diffcache.profiling.record import Trajectory, record_all
from diffcache.profiling.replay import Replay
from diffcache.profiling.search import Search
from diffcache.profiling.slopes import slopes
from diffcache.profiling.warp import Movable
from diffcache.schedule import CacheSchedule, DenoiserPlan, Expected, SitePlan
from diffcache.schedulers._simulation import ANCHORS
from diffcache.schedulers.uniform import evenly

Target = Literal["state", "output"]
SEARCHED_SAMPLES = 16  # a mask needs fewer samples than its coefficients do; the final fit sees all of them
HELD_SAMPLES = 8  # on which the search accepts
HELD_SHARE = 4  # one call in so many is held out where none are named
PAYS_DB = 0.1  # what coefficients per channel must gain on held-out samples to be kept
LEVELS_PAY_DB = 0.3  # what moved noise levels must gain there: they tie a schedule closer to its noise scheduler
SLOPES_PAY_DB = 3.0  # what estimates instead of outputs must gain: where they matter at all, it is 10 and more
SLOPES_TRIED_ON = 5  # one step in so many computed
NUDGED_SHARE = 0.25  # of the time for the search


class Calibration:
    """Full runs of a pipeline, recorded once; schedules for any number of budgets are made from them.

    target    "state" if the loop can be replayed (closed-loop fit), else "output", and ``why_output`` says why not
    held_out  runs that masks are accepted by; without any, the last quarter of the runs while the mask is sought, and
              every run then has a say in the coefficients
    """

    def __init__(self, pipe: Any, trajectories: Sequence[Trajectory], held_out: Sequence[Trajectory] = ()) -> None:
        self.pipe = pipe
        self.trajectories = trajectories
        self.start = trajectories[0].start
        self.steps = len(trajectories[0].timesteps)
        everyone, self.why_output = circumstances.replay_all([*trajectories, *held_out])
        self.replays, self.held = everyone[: len(trajectories)], everyone[len(trajectories) :]
        self.target: Target = "state" if self.replays else "output"
        self.guidance = circumstances.guidance([*trajectories, *held_out], everyone)

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
        if not calls:
            raise BadOption("calls", list(calls), "at least one dictionary of arguments for pipe(**call)")
        pipe = host.adopted(pipe)
        found = record_all(pipe, [*calls, *held_out], done)
        return cls(pipe, found[: len(calls)], found[len(calls) :])

    def profile(self) -> Profile:
        """What the recorded runs tell a scheduler. Repeats half of each loop, to see how the network answers errors."""
        return profile_of(self.pipe, self.trajectories, self.replays, self.why_output)

    def schedule(
        self,
        budget: Budget | float,
        *,
        scheduler: str = "search",
        time_limit_s: float | None = None,
        per_branch: bool = True,
        store: str | None = None,
        tried: Callable[[Fit], None] = lambda f: None,
    ) -> CacheSchedule:
        """The best schedule found within ``budget`` (a bare number: computed steps).

        scheduler     "search", or one whose mask is taken as it is (``diffcache plan --list``); the fit is the same
        time_limit_s  seconds for the search; None: a fixed number of fits, which yields the same schedule every time;
                      0 keeps the even mask
        store         format in which outputs will be kept; None: as they are
        tried         sees every fit of the search
        """
        budget = Budget.of(budget)
        if self.target == "output":
            return self._by_outputs(budget, scheduler)
        train, held = self._apart()
        options = {"per_branch": per_branch and self.guidance is not None, "anchors": self._anchors(budget)}
        exact = store in (None, "bf16", "int8")  # rests are small differences of what is kept
        if exact and (most := self._anchors(budget, with_inputs=True)):
            train, held = self._sloped(train, held, options | {"anchors": most})
            options["anchors"] = options["anchors"] if train[0].slopes is None else most
        few, few_held = leading(train, SEARCHED_SAMPLES), leading(held, HELD_SAMPLES)
        seeker = Search(few, few_held, **options, tried=tried)  # type: ignore[arg-type]
        notes = {
            "scheduler": "search" if scheduler == "search" else f"mask of {scheduler}",
            "fit": "closed loop",
            "fit_target": "state",
            "budget": str(budget),
        }
        front: dict[int, Fit] = {}
        if scheduler == "search":
            masks_s = None if time_limit_s is None else (1 - NUDGED_SHARE) * time_limit_s
            levels_s = None if time_limit_s is None else NUDGED_SHARE * time_limit_s
            best = seeker.run(self._steps(budget, seeker), time_limit_s=masks_s)
            if time_limit_s != 0:
                front = seeker.nearby(best)
                with contextlib.suppress(CannotFollow):
                    best = seeker.nudged(self.pipe, best, time_limit_s=levels_s)
        else:
            best = seeker.evaluate(self._mask(budget, scheduler))
        seen, channels, (train, held) = self._best_options(best, train, held, options)
        if seen.levels is not None:
            notes["levels"] = "moved"
        if seen.slopes is not None:
            notes["combined"] = "clean estimates"
        everyone = train if self.held else [*train, *held]
        final = seen
        if len(everyone) > len(train):
            final = fit(everyone, best.compute, levels=seen.levels, per_channel=channels, **options)  # type: ignore[arg-type]
        if front:
            front[int(best.compute.sum())] = seen
            notes["front"] = ", ".join(f"{n} steps {f.held_score:.1f} dB" for n, f in front.items())
        expected = Expected.over(seen.held_db, "held-out") if held else Expected.over(seen.error_db, "calibration")
        return self._document(final.plan, notes, expected, final.levels)

    def fitted(self, compute: np.ndarray, *, per_branch: bool = True, per_channel: bool = False) -> CacheSchedule:
        """The closed-loop fit of one given mask (bool, one entry per step of the loop)."""
        if self.target != "state":
            raise ScheduleMismatch(f"the loop cannot be replayed: {self.why_output}")
        apart = per_branch and self.guidance is not None
        train, held = self._sloped(self.replays, self.held, {"per_branch": apart}, compute)
        found = fit(train, compute, held=held, per_branch=apart, per_channel=per_channel)
        notes = {"scheduler": "a mask of one's own", "fit": "closed loop", "fit_target": "state"}
        notes |= {} if found.slopes is None else {"combined": "clean estimates"}
        expected = Expected.over(found.held_db if held else found.error_db, "held-out" if held else "calibration")
        return self._document(found.plan, notes, expected)

    def _apart(self) -> tuple[Sequence[Replay], Sequence[Replay]]:
        """Replays to fit, and others to accept by."""
        if self.held or len(self.replays) < 2:
            return self.replays, self.held
        cut = len(self.replays) - max(1, len(self.replays) // HELD_SHARE)
        return self.replays[:cut], self.replays[cut:]

    def _sloped(
        self,
        train: Sequence[Replay],
        held: Sequence[Replay],
        options: Mapping[str, Any],
        tried: np.ndarray | None = None,
    ) -> tuple[Sequence[Replay], Sequence[Replay]]:
        """The replays with the network's clean estimates in place of its outputs, if those are better to combine: where
        a sampler draws noise. ``tried``: the mask that tells; None: an even one."""
        known = [_slopes(replay) for replay in (*train, *held)]
        own = known[0]
        if own is None or any(other is None or not np.array_equal(own, other) for other in known):
            return train, held
        estimates = [replay.sloped(own) for replay in train], [replay.sloped(own) for replay in held]
        begins = train[0].begins
        if tried is None:
            tried = evenly(len(own), max(len(own) // SLOPES_TRIED_ON, len(begins)), begins)
        plain, other = (
            fit(leading(some, SEARCHED_SAMPLES), tried, held=leading(others, HELD_SAMPLES), **options)
            for some, others in ((train, held), estimates)
        )
        return estimates if other.beats(plain, SLOPES_PAY_DB) else (train, held)

    def _best_options(
        self, best: Fit, train: Sequence[Replay], held: Sequence[Replay], options: Mapping[str, Any]
    ) -> tuple[Fit, bool, tuple[Sequence[Replay], Sequence[Replay]]]:
        """The fit to all of ``train``, whether it has a scale per channel, and the replays on its levels. Levels of its
        own and that scale are only kept if held-out samples gain by them."""
        found, there = fit(train, best.compute, held=held, **options), (train, held)
        if not held or best.compute.all():
            return found, False, there
        if best.levels is not None:
            moved = [[Movable(self.pipe, replay).on(best.levels) for replay in part] for part in there]
            other = fit(moved[0], best.compute, held=moved[1], levels=best.levels, **options)
            if other.beats(found, LEVELS_PAY_DB):
                found, there = other, (moved[0], moved[1])
        scaled = fit(there[0], best.compute, held=there[1], levels=found.levels, per_channel=True, **options)
        better = scaled.held_score > found.held_score + PAYS_DB
        return scaled if better else found, better, there

    def _anchors(self, budget: Budget, *, with_inputs: bool = False) -> int:
        """How many outputs may be kept at once, each perhaps with its input."""
        if budget.memory_bytes is None:
            return ANCHORS
        calls = self.trajectories[0].steps[0].calls
        kept = [t for call in calls for t in (*call.outputs, *([call.input] if with_inputs else []))]
        held: int = sum(t.numel() * t.element_size() for t in kept)
        if budget.memory_bytes < held and not with_inputs:
            raise BadOption("memory_bytes", budget.memory_bytes, f"{held} or more: one step's outputs, of this batch")
        return min(ANCHORS, budget.memory_bytes // held)

    def _steps(self, budget: Budget, seeker: Search) -> int:
        """How many steps the loop may compute."""
        if budget.computed_steps is not None:
            return _whole(budget.computed_steps)
        if budget.speedup is not None:
            return int(planning.steps_for_speedup(self.profile(), budget.speedup))
        assert budget.max_error_db is not None
        least, low, high = None, len(seeker.begins), seeker.steps
        while low <= high:  # by one real run each, of the mask that the simulation prefers
            middle = (low + high) // 2
            found = seeker.evaluate(seeker.planned(middle)[0])
            if found.held_score >= budget.max_error_db:
                least, high = middle, middle - 1
            else:
                low = middle + 1
        if least is None:
            raise BadOption(
                "max_error_db", budget.max_error_db, f"up to {found.held_score:.1f}, with every step computed"
            )
        return least

    def _mask(self, budget: Budget, scheduler: str) -> np.ndarray:
        """bool [steps of the loop], of another scheduler."""
        profile = self.profile()
        plans = [(site, plan) for _, site, plan in planning.plan(profile, scheduler, budget).plans()]
        if [site for site, _ in plans] != ["model"]:
            sites = ", ".join(site for site, _ in plans)[:80]
            raise BadOption("scheduler", scheduler, f"one that plans for 'model' (this one: {sites})")
        return plans[0][1].compute[self.start :]

    def _by_outputs(self, budget: Budget, scheduler: str) -> CacheSchedule:
        begins, steps = self.trajectories[0].begins, self.steps - self.start
        if scheduler != "search":
            compute = self._mask(budget, scheduler)
        elif budget.computed_steps is not None:
            compute = evenly(steps, _whole(budget.computed_steps), begins)
        elif budget.speedup is not None:
            compute = evenly(steps, planning.steps_for_speedup(self.profile(), budget.speedup), begins)
        else:
            raise BadOption("max_error_db", budget.max_error_db, f"a budget in computed_steps: {self.why_output}")
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
        denoisers = {
            name: DenoiserPlan(
                sites={"model": self._plan(module, plan)},
                called=self._called(module),
                class_name=host.class_name(module),
                config_digest=host.config_digest(module),
            )
            for name, module in circumstances.denoisers(self.pipe, self.trajectories[0]).items()
        }
        timesteps = [t.timesteps.double().cpu().numpy() for t in self.trajectories]
        alike = all(np.array_equal(t, timesteps[0]) for t in timesteps)  # not where they depend on the picture's size
        return CacheSchedule(
            steps=self.steps,
            denoisers=denoisers,
            noise_scheduler=circumstances.noise_scheduler(self.trajectories[0]),
            guidance=self.guidance,
            timesteps=timesteps[0] if alike else None,
            sigmas=levels,
            expected=expected,
            provenance=dict(notes) | {"samples": str(circumstances.samples(self.trajectories, self.replays))},
        )

    def _called(self, module: nn.Module) -> np.ndarray:
        """bool [T]: the steps of the grid at which the loop calls ``module``."""
        own = [any(call.module is module for call in step.calls) for step in self.trajectories[0].steps]
        return np.array([False] * self.start + own[: self.steps - self.start])

    def _plan(self, module: nn.Module, plan: SitePlan) -> SitePlan:
        """The part of these decisions that is ``module``'s."""
        own = self._called(module)[self.start :]
        mine = plan.compute & own
        mine[0] = True
        # At the steps of another denoiser, which this one never sees, it reuses: that refers to nothing new.
        reused = np.where(mine[:, None], 0.0, np.eye(plan.weights.shape[2])[0])

        def begun(array: np.ndarray, before: float = 0.0) -> np.ndarray:
            """A loop that starts late (image to image) never enters the steps before; they count as computed."""
            return np.pad(array, [(0, 0), (self.start, 0), *[(0, 0)] * (array.ndim - 2)], constant_values=before)

        return SitePlan(
            compute=np.concatenate([np.ones(self.start, bool), mine]),
            weights=begun(np.where(own[:, None], plan.weights, reused)),
            kappa=None if plan.kappa is None else begun(np.where(own, plan.kappa, 0.0)),
            inputs=None if plan.inputs is None else begun(np.where(own[:, None], plan.inputs, 0.0)),
            scale=None if plan.scale is None else begun(plan.scale, 1.0),
        )


def _slopes(replay: Replay) -> np.ndarray | None:
    """Of the network's own outputs, of which guidance makes what the noise scheduler takes for a prediction."""
    found, shares = slopes(replay.trajectory), np.array([sum(weights) for weights in replay.guidance])
    return found / shares if found is not None and replay.paired and (np.abs(shares) > 1e-3).all() else None


def leading(replays: Sequence[Replay], samples: int) -> Sequence[Replay]:
    """The first replays that together hold ``samples`` samples, or all."""
    held = np.cumsum([len(r.reference(0)) // r.copies for r in replays])
    return replays[: int(np.searchsorted(held, samples)) + 1]


def _whole(computed_steps: float) -> int:
    if computed_steps != int(computed_steps):
        raise BadOption("computed_steps", computed_steps, "a whole number: the whole denoiser is computed, or not")
    return int(computed_steps)
