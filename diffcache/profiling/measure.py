"""Measure full runs: how far apart the denoiser's outputs lie, what a call costs, how the loop passes errors on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.profile import DenoiserProfile, Dynamics, Profile, SiteProfile
from diffcache.profiling import circumstances
from diffcache.profiling.dynamics import measure_dynamics, with_response
from diffcache.profiling.fit import fit
from diffcache.profiling.record import Trajectory, record_all
from diffcache.profiling.replay import Replay
from diffcache.profiling.tables import Sums, site_tables
from diffcache.schedulers.uniform import evenly


def measure(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> Profile:
    """Run ``pipe(**call)`` in full for each call, and write down what a scheduler needs to know.

    The whole denoiser is the one site that is measured. Where the loop can be repeated apart from its pipeline, half
    of its steps are computed once more, to see how the network answers to errors. Generators in the calls are left
    where they were found. Raises UnsupportedModel, BadOption.
    """
    if not calls:
        raise BadOption("calls", list(calls), "at least one dictionary of arguments for pipe(**call)")
    trajectories = record_all(pipe, calls)
    return profile_of(pipe, trajectories, *circumstances.replay_all(trajectories))


def profile_of(
    pipe: Any, trajectories: Sequence[Trajectory], replays: Sequence[Replay], why_no_replays: str
) -> Profile:
    first = trajectories[0]
    denoisers = circumstances.denoisers(pipe, first)
    if len(denoisers) != 1:
        raise UnsupportedModel(
            f"{type(pipe).__name__} changes denoisers on its way ({', '.join(denoisers)}); a profile holds tables of "
            "one for all steps. Make the schedule from a Calibration."
        )
    (name, module), *_ = denoisers.items()
    guidance = circumstances.guidance(trajectories, replays)
    dynamics, why_none = _dynamics(replays, why_no_replays)
    output = first.steps[0].calls[0].output
    notes = {"batch": str(len(output)), "device": output.device.type, "dtype": str(output.dtype).removeprefix("torch.")}
    if why_none:
        notes["no_dynamics"] = why_none
    return Profile(
        steps=len(first.steps),
        start=first.start,
        timesteps=first.timesteps[first.start :].double().cpu().numpy(),
        sigmas=_sigmas(first),
        denoisers={
            name: DenoiserProfile(
                class_name=host.class_name(module),
                config_digest=host.config_digest(module),
                sites={"model": _site(trajectories, guidance.branches if guidance else 1)},
            )
        },
        noise_scheduler=circumstances.noise_scheduler(first),
        guidance=guidance,
        dynamics=dynamics,
        samples=circumstances.samples(trajectories, replays),
        provenance=notes,
    )


def _dynamics(replays: Sequence[Replay], why_not: str) -> tuple[Dynamics | None, str]:
    if not replays:
        return None, why_not
    if any(r.bent for r in replays):
        return None, "the noise scheduler's step is not affine in the model's output (it clips)."
    steps, begins = len(replays[0].steps), replays[0].begins
    run = fit(replays, evenly(steps, max(steps // 2, len(begins)), begins), per_branch=False)
    return with_response(measure_dynamics(replays), replays, [run]), ""


def _site(trajectories: Sequence[Trajectory], branches: int) -> SiteProfile:
    """Tables per branch; of all rows of all calls together where ``branches`` is 1."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton in: only when something is measured

    sums = [Sums() for _ in range(branches)]
    for trajectory in trajectories:
        rows = _rows(trajectory)
        for n, (inputs, outputs) in enumerate(rows):
            sums[n * branches // len(rows)].add(inputs, outputs)
    calls = trajectories[0].steps[0].calls
    like = [c for t in trajectories for s in t.steps for c in s.calls if c.output.shape == calls[0].output.shape]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        calls[0].again(calls[0].input)
    return SiteProfile(
        **site_tables(sums),
        seconds=float(np.median([c.seconds for c in like])),  # the first call of all also warms up
        flops=counter.get_total_flops(),
        calls=len(calls),
        output_bytes=sum(t.numel() * t.element_size() for t in calls[0].outputs),
    )


def _rows(trajectory: Trajectory) -> list[tuple[Tensor | None, Tensor]]:
    """Inputs and outputs of every sample of every call within a step, branch after branch: [steps, …] each."""
    found: list[tuple[Tensor | None, Tensor]] = []
    for ordinal in range(min(len(step.calls) for step in trajectory.steps)):
        calls = [step.calls[ordinal] for step in trajectory.steps]
        shapes = {tuple(t.shape for t in call.outputs) for call in calls}
        if len(shapes) != 1:
            raise UnsupportedModel(
                f"the outputs of {type(calls[0].module).__name__} change their shape on the way "
                f"({' and '.join(str([*map(tuple, s)]) for s in sorted(shapes))}); a profile has one for all steps. "
                "Call the pipeline with guidance that lasts for all steps."
            )
        if len(calls[0].outputs) == 1:
            for row in range(len(calls[0].output)):
                inputs = [c.input[row] for c in calls] if isinstance(calls[0].input, Tensor) else None
                found.append((torch.stack(inputs) if inputs else None, torch.stack([c.output[row] for c in calls])))
        else:  # several streams, or a list of samples: they move together
            found.append((None, torch.stack([torch.cat([t.flatten() for t in call.outputs]) for call in calls])))
    return found


def _sigmas(trajectory: Trajectory) -> np.ndarray | None:
    """The noise levels of the loop's steps and the one it ends at, where the noise scheduler has them."""
    sigmas = getattr(trajectory.scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != len(trajectory.timesteps) + 1:
        return None
    levels = torch.as_tensor(sigmas).double().cpu().numpy()[trajectory.start :]
    return levels if np.isfinite(levels).all() and (levels >= 0).all() else None
