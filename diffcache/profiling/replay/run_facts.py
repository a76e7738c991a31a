"""Facts about recorded runs of one pipeline that go into a schedule or a profile: grid, guidance, networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from diffcache import host
from diffcache.documents.branches import BranchLayout, provenance_of
from diffcache.documents.context import Network, ScheduleContext
from diffcache.documents.schedule import Guidance, NoiseSchedulerId
from diffcache.errors import Unusable
from diffcache.profiling.recording.record import Trajectory
from diffcache.profiling.replay.replay import NotReplayable, Replay


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts about one run, in plain values. The names of the fields are keys in files.

    Attributes:
        grid: The number of steps of the noise scheduler, the step at which the loop begins, and that after its last.
        begins: Steps of the loop at which a denoiser takes over.
        samples: Number of samples.
        guidance_scales: Name of an argument -> its value, as far as they can be read.
        obstacle: Why the loop cannot be replayed; "" if it can. The other fields are known only if it can.
        branches: Number of denoiser outputs that guidance combines.
        in_batch: Number of branches that share one forward.
        copies: How often the state itself holds every sample: ``Replay.batch_copies``.
        repeats: Whether branches that share a forward have the same main input.
        bent: Whether the noise scheduler is not affine in the guided output at some step: ``Replay.nonlinear_steps``.
    """

    grid: tuple[int, int, int]
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
    def of(cls, trajectory: Trajectory, replay: Replay | None, obstacle: str = "") -> RunFacts:
        """Collect the facts about a recorded run."""
        first = trajectory.steps[0]
        samples = len(first.calls[0].output if first.state is None else first.state)
        known: dict[str, Any] = {}
        if replay is not None:
            samples //= replay.batch_copies
            known = {
                "branches": replay.branches,
                "in_batch": replay.layout.per_forward,
                "copies": replay.batch_copies,
                "repeats": replay.inputs_repeat,
                "bent": bool(replay.nonlinear_steps),
            }
        grid = len(trajectory.timesteps), trajectory.start, trajectory.end
        return cls(grid, trajectory.first_steps, samples, trajectory.guidance_scales, obstacle, **known)

    @property
    def layout(self) -> BranchLayout:
        """The branches whose outputs guidance combines."""
        return BranchLayout(self.branches, self.in_batch)

    @property
    def separable(self) -> int:
        """Number of branches that can have separate tables and coefficients.

        It is 1 if branches cannot be distinguished: several calls each hold several branches, or the parts of a batch
        differ in more than the prompt.
        """
        told_apart = not self.obstacle and self.layout.uniform and self.repeats
        return self.branches if told_apart else 1


def branch_names(trajectory: Trajectory) -> dict[str, str]:
    """Return the entry of a schedule's provenance that holds the names of the branches, in the order of their
    coefficients; nothing where they have no names."""
    names = [call.branch for call in trajectory.steps[0].calls]
    return provenance_of(names)


def replay_all(trajectories: Sequence[Trajectory]) -> tuple[list[Replay], str]:
    """Make a replay of every trajectory.

    Returns:
        The replays and "". If one of the loops cannot be replayed: no replays, and the reason.

    Raises:
        BadOption: The runs differ so that one schedule cannot fit them all.
    """
    demand_agreement([RunFacts.of(t, None) for t in trajectories])
    replays = []
    for trajectory in trajectories:
        replay, obstacle = replayed(trajectory)
        if replay is None:
            return [], obstacle
        replays.append(replay)
    demand_agreement([RunFacts.of(t, r) for t, r in zip(trajectories, replays, strict=True)])
    return replays, ""


def replayed(trajectory: Trajectory) -> tuple[Replay | None, str]:
    """Return the replay of a trajectory and "", or None and the reason why the loop cannot be replayed."""
    try:
        return Replay(trajectory), ""
    except NotReplayable as reason:
        return None, str(reason)


def demand_agreement(runs: Sequence[RunFacts]) -> None:
    """Check that one schedule can fit all of these runs.

    Raises:
        BadOption: The runs differ in their steps or in the form of guidance.
    """
    if len({(run.grid, run.begins) for run in runs}) > 1:
        raise Unusable("calls", "they take different steps", "Pass calls that all take the same steps")
    if any(run.obstacle for run in runs):
        return
    if len({(run.branches, run.in_batch, run.copies) for run in runs}) > 1:
        raise Unusable(
            "calls",
            "they use several kinds of guidance",
            "Pass calls that all use the same guidance, or calls without guidance",
        )


def denoisers(pipe: Any, trajectory: Trajectory) -> dict[str, nn.Module]:
    """Return the networks that the run called, by component name."""
    called = {id(call.module) for step in trajectory.steps for call in step.calls}
    return {name: module for name, module in host.denoisers(pipe).items() if id(module) in called}


def noise_scheduler_id(scheduler: Any) -> NoiseSchedulerId:
    """Return the identity of a noise scheduler."""
    return NoiseSchedulerId(
        class_name=type(scheduler).__name__,
        config_digest=host.config_digest(scheduler),
        prediction_type=host.prediction_type(scheduler),
    )


def network(module: nn.Module, called: np.ndarray | None = None) -> Network:
    """Return the identity of a denoiser. ``called``: bool [T], steps at which the loop calls it, or None."""
    return Network(host.class_name(module), host.config_digest(module), called)


def context(pipe: Any, trajectories: Sequence[Trajectory], samples: int, guidance: Guidance | None) -> ScheduleContext:
    """Return the loop and the networks of recorded runs.

    Timesteps that differ from run to run, because they depend on the size of the picture, are left out.

    Args:
        pipe: The pipeline.
        trajectories: The runs.
        samples: Their number of samples.
        guidance: Their form of guidance.
    """
    first = trajectories[0]
    called = denoisers(pipe, first)
    timesteps = [t.timesteps.double().cpu().numpy() for t in trajectories]
    alike = all(np.array_equal(t, timesteps[0]) for t in timesteps)
    return ScheduleContext(
        steps=len(first.timesteps),
        networks={name: network(module, steps_called(first, module)) for name, module in called.items()},
        noise_scheduler=noise_scheduler_id(first.scheduler),
        guidance=guidance,
        timesteps=timesteps[0] if alike else None,
        notes={"samples": str(samples)}
        | branch_names(first)
        | host.configurations(**called, scheduler=first.scheduler),
    )


def steps_called(trajectory: Trajectory, module: nn.Module) -> np.ndarray:
    """Return the steps of the grid at which the loop calls ``module``, bool [T]."""
    called = np.zeros(len(trajectory.timesteps), bool)
    called[trajectory.start : trajectory.end] = [any(c.module is module for c in s.calls) for s in trajectory.steps]
    return called


def guidance(trajectories: Sequence[Trajectory], replays: Sequence[Replay]) -> Guidance | None:
    """Return the form of guidance that these runs have in common.

    None if it is not known, or if branches cannot be distinguished; they then share all coefficients.
    """
    if not replays:
        return None
    return guidance_of([RunFacts.of(t, r) for t, r in zip(trajectories, replays, strict=True)])


def guidance_of(runs: Sequence[RunFacts]) -> Guidance | None:
    """Return the form of guidance that the runs with these facts have in common; None as in ``guidance``."""
    run = runs[0]
    if any(r.obstacle or r.separable != r.branches for r in runs):
        return None
    shared = {n: v for n, v in run.guidance_scales.items() if all(r.guidance_scales.get(n) == v for r in runs)}
    return Guidance(mode=run.layout.mode, branches=run.branches, scales=shared)


def samples(trajectories: Sequence[Trajectory], replays: Sequence[Replay]) -> int:
    """Return the number of samples in these runs."""
    runs = [RunFacts.of(t, replays[i] if replays else None) for i, t in enumerate(trajectories)]
    return sum(run.samples for run in runs)
