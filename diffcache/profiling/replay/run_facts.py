"""What recorded runs of one pipeline have in common: all that a schedule or a profile says about its circumstances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffcache import host
from diffcache.documents.schedule import Guidance, GuidanceMode, NoiseSchedulerId
from diffcache.errors import BadOption
from diffcache.profiling.recording.record import Trajectory
from diffcache.profiling.replay.replay import NotReplayable, Replay


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Of one run, in plain values.

    grid            steps of the noise scheduler, and the one the loop begins at
    begins          steps of the loop at which a denoiser takes over
    samples         how many were made
    guidance_scales name of an argument -> its value, as far as they can be read
    obstacle        why the loop cannot be replayed; "" if it can. The rest is known only then:
    branches        number of denoiser outputs that guidance combines
    in_batch        how many of them share one forward
    copies          how often the state itself holds every sample
    repeats         whether branches that share a forward are given the same main input
    bent            whether the noise scheduler's step is somewhere not affine in the guided output
    """

    grid: tuple[int, int]
    begins: tuple[int, ...]
    samples: int
    guidance_scales: Mapping[str, float]
    obstacle: str
    branches: int = 1
    in_batch: int = 1
    copies: int = 1
    repeats: bool = True
    bent: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory, replay: Replay | None, obstacle: str = "") -> Circumstances:
        states = trajectory.steps[0].state
        samples = 0 if states is None else len(states)
        known: dict[str, Any] = {}
        if replay is not None:
            samples //= replay.copies
            known = {
                "branches": replay.branches,
                "in_batch": replay.in_batch,
                "copies": replay.copies,
                "repeats": replay.inputs_repeat,
                "bent": bool(replay.bent),
            }
        grid = len(trajectory.timesteps), trajectory.start
        return cls(grid, trajectory.begins, samples, trajectory.guidance_scales, obstacle, **known)

    @property
    def separable(self) -> int:
        """How many branches can have tables and coefficients of their own. Not those of several calls that each hold
        several, nor of a batch whose parts differ in more than the prompt: a schedule could not tell them apart."""
        told_apart = not self.obstacle and self.in_batch in (1, self.branches) and self.repeats
        return self.branches if told_apart else 1


def branch_names(trajectory: Trajectory) -> dict[str, str]:
    """Return the entry of a schedule's provenance that holds the names of the branches, in the order of their
    coefficients; nothing where they have no names."""
    names = [call.branch for call in trajectory.steps[0].calls]
    return {host.BRANCH_NAMES: json.dumps(names)} if len(names) > 1 and all(names) else {}


def replay_all(trajectories: Sequence[Trajectory]) -> tuple[list[Replay], str]:
    """The replays, and why there are none. Raises BadOption for runs that no one schedule could serve."""
    demand_agreement([Circumstances.of(t, None) for t in trajectories])
    replays = []
    for trajectory in trajectories:
        replay, obstacle = replayed(trajectory)
        if replay is None:
            return [], obstacle
        replays.append(replay)
    demand_agreement([Circumstances.of(t, r) for t, r in zip(trajectories, replays, strict=True)])
    return replays, ""


def replayed(trajectory: Trajectory) -> tuple[Replay | None, str]:
    """The replay, or why there is none."""
    try:
        return Replay(trajectory), ""
    except NotReplayable as reason:
        return None, str(reason)


def demand_agreement(runs: Sequence[Circumstances]) -> None:
    """Raises BadOption for runs that no one schedule could serve."""
    if len({(run.grid, run.begins) for run in runs}) > 1:
        raise BadOption("calls", "of several step counts", "calls that all take the same steps")
    if any(run.obstacle for run in runs):
        return
    if len({(run.branches, run.in_batch, run.copies) for run in runs}) > 1:
        raise BadOption("calls", "with several kinds of guidance", "calls that all use guidance, or none that does")


def denoisers(pipe: Any, trajectory: Trajectory) -> dict[str, nn.Module]:
    """The networks that were called, by component name."""
    called = {id(call.module) for step in trajectory.steps for call in step.calls}
    return {name: module for name, module in host.denoisers(pipe).items() if id(module) in called}


def noise_scheduler(trajectory: Trajectory) -> NoiseSchedulerId:
    scheduler = trajectory.scheduler
    return NoiseSchedulerId(
        class_name=type(scheduler).__name__,
        config_digest=host.config_digest(scheduler),
        prediction_type=host.prediction_type(scheduler),
    )


def guidance(trajectories: Sequence[Trajectory], replays: Sequence[Replay]) -> Guidance | None:
    """How branches reach the denoiser. None if unknown, or in a way a schedule cannot tell apart, where they share all
    coefficients."""
    if not replays:
        return None
    return guidance_of([Circumstances.of(t, r) for t, r in zip(trajectories, replays, strict=True)])


def guidance_of(runs: Sequence[Circumstances]) -> Guidance | None:
    run = runs[0]
    if any(r.obstacle or r.separable != r.branches for r in runs):
        return None
    mode: GuidanceMode = "none" if run.branches == 1 else "batched" if run.in_batch > 1 else "separate"
    shared = {n: v for n, v in run.guidance_scales.items() if all(r.guidance_scales.get(n) == v for r in runs)}
    return Guidance(mode=mode, branches=run.branches, scales=shared)


def samples(trajectories: Sequence[Trajectory], replays: Sequence[Replay]) -> int:
    runs = [Circumstances.of(t, replays[i] if replays else None) for i, t in enumerate(trajectories)]
    return sum(run.samples for run in runs)
