"""From a pipeline and a few calls to a schedule: record, replay, search, fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from diffcache import host
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.profiling.fit import Fit, fit
from diffcache.profiling.output_fit import fit_outputs
from diffcache.profiling.record import Trajectory, record_all
from diffcache.profiling.replay import NotReplayable, Replay
from diffcache.profiling.search import search
from diffcache.schedule import CacheSchedule, DenoiserPlan, Guidance, NoiseSchedulerId, SitePlan
from diffcache.schedulers.uniform import evenly

Target = Literal["state", "output"]


class Calibration:
    """Full runs of a pipeline, recorded once; schedules for any number of budgets are made from them.

    target  "state" if the loop can be replayed (closed-loop fit), else "output", and ``why_output`` says why not
    """

    def __init__(self, pipe: Any, trajectories: Sequence[Trajectory]) -> None:
        self.pipe = pipe
        self.trajectories = trajectories
        self.start = trajectories[0].start
        self.steps = len(trajectories[0].timesteps)
        self.target: Target = "state"
        self.why_output = ""
        if any(len(t.timesteps) != self.steps or t.start != self.start for t in trajectories):
            raise BadOption("calls", "of several step counts", "calls that all take the same steps")
        try:
            self.replays = [Replay(t) for t in trajectories]
            if len(self._denoisers_called()) != 1:
                raise NotReplayable("the loop changes denoisers on its way.")
        except NotReplayable as reason:
            self.target, self.why_output, self.replays = "output", str(reason), []

    @classmethod
    def record(
        cls, pipe: Any, calls: Sequence[Mapping[str, Any]], done: Callable[[], None] = lambda: None
    ) -> Calibration:
        """Run ``pipe(**call)`` in full for each call. Each call may hold a batch; generators are the caller's."""
        if not calls:
            raise BadOption("calls", list(calls), "at least one dictionary of arguments for pipe(**call)")
        return cls(pipe, record_all(pipe, calls, done))

    def schedule(
        self,
        computed_steps: int,
        *,
        time_limit_s: float = 60.0,
        per_branch: bool = True,
        tried: Callable[[Fit], None] = lambda f: None,
    ) -> CacheSchedule:
        """The best schedule found with ``computed_steps`` computed steps; ``time_limit_s`` 0 keeps the even mask."""
        compute = evenly(self.steps - self.start, computed_steps)
        notes = {"scheduler": "closed-loop fit", "fit_target": self.target, "computed_steps": str(computed_steps)}
        if self.target == "output":
            notes["fit_target_reason"] = self.why_output
            return self._document(compute, fit_outputs(self.trajectories, compute), notes)
        best = search(self.replays, computed_steps, time_limit_s=time_limit_s, per_branch=per_branch, tried=tried)
        notes["expected_state_psnr_db"] = f"{best.score:.2f}"
        notes["expected_state_psnr_db_worst_tenth"] = f"{np.quantile(best.error_db, 0.1):.2f}"
        return self._document(best.compute, best.weights, notes)

    def fitted(self, compute: np.ndarray, *, per_branch: bool = True) -> CacheSchedule:
        """The closed-loop fit of one given mask (bool, one entry per step of the loop)."""
        if self.target != "state":
            raise ScheduleMismatch(f"the loop cannot be replayed: {self.why_output}")
        found = fit(self.replays, compute, per_branch=per_branch)
        return self._document(compute, found.weights, {"scheduler": "closed-loop fit", "fit_target": "state"})

    def _document(self, compute: np.ndarray, weights: np.ndarray, notes: Mapping[str, str]) -> CacheSchedule:
        scheduler = self.trajectories[0].scheduler
        # A loop that starts late (image to image) never enters the steps before; they count as computed.
        plan = SitePlan(
            compute=np.concatenate([np.ones(self.start, bool), compute]),
            weights=np.pad(weights, ((0, 0), (self.start, 0), (0, 0))),
        )
        denoisers = {
            name: DenoiserPlan(
                sites={"model": plan}, class_name=host.class_name(module), config_digest=host.config_digest(module)
            )
            for name, module in host.denoisers(self.pipe).items()
            if id(module) in self._denoisers_called()
        }
        return CacheSchedule(
            steps=self.steps,
            denoisers=denoisers,
            noise_scheduler=NoiseSchedulerId(
                class_name=type(scheduler).__name__,
                config_digest=host.config_digest(scheduler),
                prediction_type=host.prediction_type(scheduler),
            ),
            guidance=self._guidance(),
            timesteps=self.trajectories[0].timesteps.double().cpu().numpy(),
            provenance=dict(notes) | {"samples": str(self._samples())},
        )

    def _guidance(self) -> Guidance | None:
        if self.target == "output":
            return None
        replay = self.replays[0]
        mode = "none" if replay.branches == 1 else "batched" if replay.in_batch > 1 else "separate"
        if replay.in_batch not in (1, replay.branches):
            return None
        return Guidance(mode=mode, branches=replay.branches, scale=self.trajectories[0].guidance_scale)  # type: ignore[arg-type]

    def _denoisers_called(self) -> set[int]:
        return {id(call.module) for t in self.trajectories for step in t.steps for call in step.calls}

    def _samples(self) -> int:
        return sum(t.steps[0].state.shape[0] for t in self.trajectories if t.steps[0].state is not None)


def optimize(
    pipe: Any, calls: Sequence[Mapping[str, Any]], *, computed_steps: int, time_limit_s: float = 60.0
) -> CacheSchedule:
    """Measure ``pipe`` on ``calls`` (arguments for ``pipe(**call)``, 16 prompts or more in all) and return the best
    schedule found that computes ``computed_steps`` of the loop's steps.

    The calls run once, in full; the search then repeats parts of their loops for ``time_limit_s`` seconds.
    Raises UnsupportedModel, BadOption.
    """
    return Calibration.record(pipe, calls).schedule(computed_steps, time_limit_s=time_limit_s)
