"""From a pipeline and a few calls to a schedule: record, replay, search, fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from diffcache import host
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.profile import Profile
from diffcache.profiling import circumstances
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.measure import profile_of
from diffcache.profiling.output_fit import fit_outputs
from diffcache.profiling.record import Trajectory, record_all
from diffcache.profiling.replay import Replay
from diffcache.profiling.search import search
from diffcache.schedule import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.schedulers.uniform import evenly

Target = Literal["state", "output"]
SEARCHED_SAMPLES = 16  # a mask needs fewer samples than its coefficients do; the final fit sees all of them


class Calibration:
    """Full runs of a pipeline, recorded once; schedules for any number of budgets are made from them.

    target  "state" if the loop can be replayed (closed-loop fit), else "output", and ``why_output`` says why not
    """

    def __init__(self, pipe: Any, trajectories: Sequence[Trajectory]) -> None:
        self.pipe = pipe
        self.trajectories = trajectories
        self.start = trajectories[0].start
        self.steps = len(trajectories[0].timesteps)
        self.replays, self.why_output = circumstances.replay_all(trajectories)
        self.target: Target = "state" if self.replays else "output"
        self.guidance = circumstances.guidance(trajectories, self.replays)

    @classmethod
    def record(
        cls, pipe: Any, calls: Sequence[Mapping[str, Any]], done: Callable[[], None] = lambda: None
    ) -> Calibration:
        """Run ``pipe(**call)`` in full for each call. Each call may hold a batch.

        Generators in the calls are left where they were found: the same calls, run again, repeat the recorded runs.
        """
        if not calls:
            raise BadOption("calls", list(calls), "at least one dictionary of arguments for pipe(**call)")
        return cls(pipe, record_all(pipe, calls, done))

    def profile(self) -> Profile:
        """What the recorded runs tell a scheduler. Repeats half of each loop, to see how the network answers errors."""
        return profile_of(self.pipe, self.trajectories, self.replays, self.why_output)

    def schedule(
        self,
        computed_steps: int,
        *,
        time_limit_s: float = 60.0,
        per_branch: bool = True,
        tried: Callable[[Fit], None] = lambda f: None,
    ) -> CacheSchedule:
        """The best schedule found with ``computed_steps`` computed steps; ``time_limit_s`` 0 keeps the even mask."""
        notes = {"scheduler": "closed-loop fit", "fit_target": self.target, "computed_steps": str(computed_steps)}
        if self.target == "output":
            notes["fit_target_reason"] = self.why_output
            compute = evenly(self.steps - self.start, computed_steps, self.trajectories[0].begins)
            return self._document(compute, fit_outputs(self.trajectories, compute), notes)
        apart = per_branch and self.guidance is not None
        few = leading(self.replays, SEARCHED_SAMPLES)
        best = search(few, computed_steps, time_limit_s=time_limit_s, per_branch=apart, tried=tried)
        if len(few) < len(self.replays):
            best = fit(self.replays, best.compute, per_branch=apart)
        notes["expected_state_psnr_db"] = f"{best.score:.2f}"
        notes["expected_state_psnr_db_worst_tenth"] = f"{np.quantile(best.error_db, 0.1):.2f}"
        return self._document(best.compute, best.weights, notes)

    def fitted(self, compute: np.ndarray, *, per_branch: bool = True) -> CacheSchedule:
        """The closed-loop fit of one given mask (bool, one entry per step of the loop)."""
        if self.target != "state":
            raise ScheduleMismatch(f"the loop cannot be replayed: {self.why_output}")
        found = fit(self.replays, compute, per_branch=per_branch and self.guidance is not None)
        return self._document(compute, found.weights, {"scheduler": "closed-loop fit", "fit_target": "state"})

    def _document(self, compute: np.ndarray, weights: np.ndarray, notes: Mapping[str, str]) -> CacheSchedule:
        denoisers = {
            name: DenoiserPlan(
                sites={"model": self._plan(module, compute, weights)},
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
            provenance=dict(notes) | {"samples": str(circumstances.samples(self.trajectories, self.replays))},
        )

    def _plan(self, module: nn.Module, compute: np.ndarray, weights: np.ndarray) -> SitePlan:
        """The part of these decisions that is ``module``'s."""
        own = np.array([any(call.module is module for call in s.calls) for s in self.trajectories[0].steps])
        mine = compute & own
        mine[0] = True
        # At the steps of another denoiser, which this one never sees, it reuses: that refers to nothing new.
        weights = np.where(own[:, None], weights, np.where(mine[:, None], 0.0, np.eye(weights.shape[2])[0]))
        # A loop that starts late (image to image) never enters the steps before; they count as computed.
        return SitePlan(
            compute=np.concatenate([np.ones(self.start, bool), mine]),
            weights=np.pad(weights, ((0, 0), (self.start, 0), (0, 0))),
        )


def leading(replays: Sequence[Replay], samples: int) -> Sequence[Replay]:
    """The first replays that together hold ``samples`` samples, or all."""
    held = np.cumsum([len(r.reference(0)) // r.copies for r in replays])
    return replays[: int(np.searchsorted(held, samples)) + 1]


def optimize(
    pipe: Any, calls: Sequence[Mapping[str, Any]], *, computed_steps: int, time_limit_s: float = 60.0
) -> CacheSchedule:
    """Measure ``pipe`` on ``calls`` (arguments for ``pipe(**call)``, 16 prompts or more in all) and return the best
    schedule found that computes ``computed_steps`` of the loop's steps.

    The calls run once, in full; the search then repeats parts of their loops for ``time_limit_s`` seconds. Generators
    in the calls are left where they were found.
    Raises UnsupportedModel, BadOption.
    """
    return Calibration.record(pipe, calls).schedule(computed_steps, time_limit_s=time_limit_s)
