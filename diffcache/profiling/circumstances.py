"""What recorded runs of one pipeline have in common: all that a schedule or a profile says about its circumstances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffcache import host
from diffcache.errors import BadOption
from diffcache.profiling.record import Trajectory
from diffcache.profiling.replay import NotReplayable, Replay
from diffcache.schedule import Guidance, GuidanceMode, NoiseSchedulerId


def replay_all(trajectories: Sequence[Trajectory]) -> tuple[list[Replay], str]:
    """The replays, and why there are none. Raises BadOption for runs that no one schedule could serve."""
    if len({(len(t.timesteps), t.start, t.begins) for t in trajectories}) != 1:
        raise BadOption("calls", "of several step counts", "calls that all take the same steps")
    try:
        replays = [Replay(t) for t in trajectories]
    except NotReplayable as reason:
        return [], str(reason)
    if len({(r.branches, r.in_batch, r.copies) for r in replays}) != 1:
        raise BadOption("calls", "with several kinds of guidance", "calls that all use guidance, or none that does")
    return replays, ""


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
    """How branches reach the denoiser. None if unknown, or in a way a schedule cannot tell apart (several calls, each
    with several branches; a batch whose parts differ in more than the prompt), where they share all coefficients."""
    if not replays:
        return None
    replay = replays[0]
    mode: GuidanceMode = "none" if replay.branches == 1 else "batched" if replay.in_batch > 1 else "separate"
    if replay.in_batch not in (1, replay.branches) or not all(r.inputs_repeat for r in replays):
        return None
    scales = {t.guidance_scale for t in trajectories}
    return Guidance(mode=mode, branches=replay.branches, scale=scales.pop() if len(scales) == 1 else None)


def samples(trajectories: Sequence[Trajectory], replays: Sequence[Replay]) -> int:
    copies = replays[0].copies if replays else 1
    return sum(len(t.steps[0].state) // copies for t in trajectories if t.steps[0].state is not None)
