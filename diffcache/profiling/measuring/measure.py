"""Measure full runs: how sites change from step to step, what they cost, and how the loop passes errors on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from diffcache import host
from diffcache.documents.destinations import check_folder
from diffcache.documents.profile import Profile
from diffcache.documents.sites import Granularity
from diffcache.documents.token_profile import TokenProfile
from diffcache.errors import BadOption, Unusable
from diffcache.executor.bound import Bound
from diffcache.profiling.measuring.call_measurement import CallMeasurement
from diffcache.profiling.measuring.partial_profile import PartialProfile
from diffcache.profiling.measuring.resume import MeasurementFolder
from diffcache.profiling.measuring.token_measure import demand_loop, measure_decodes
from diffcache.profiling.recording.generators import demand_own_generators, restored_generators
from diffcache.profiling.recording.measured_sites import granularities, inner_places
from diffcache.profiling.recording.observe import Observer
from diffcache.profiling.recording.record import Trajectory, record
from diffcache.profiling.recording.shards import all_shares
from diffcache.profiling.replay.replay import Replay
from diffcache.profiling.replay.run_facts import replayed
from diffcache.settings import shows_progress


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """The contents of a measurement.

    Attributes:
        granularities: The granularities of sites.
        influence: Most steps at which influence is measured. 0: none.
    """

    granularities: tuple[Granularity, ...] = ("model",)
    influence: int = 0

    @property
    def settings(self) -> dict[str, str]:
        """The options as text, for the folder of a measurement."""
        return {"sites": ", ".join(self.granularities), "influence steps": str(self.influence)}


def measure(
    pipe: Any,
    calls: str | Mapping[str, Any] | Sequence[str] | Sequence[Mapping[str, Any]],
    *,
    sites: str | Sequence[str] = "model",
    influence: bool | None = None,
    influence_steps: int = 4,
    resume: str | Path | None = None,
    progress: bool | None = None,
    **common: Any,
) -> Profile | TokenProfile:
    """Run ``pipe(**call)`` in full for each call, and measure what a scheduler needs.

    If the loop can be repeated without its pipeline, the loops of the first four calls run once more with half of their
    steps predicted, to measure how the network answers to errors. Memory does not grow with the number of calls.

    Under ``torchrun``, or if torch.distributed is initialised, each process measures its share of the calls, and all
    return the same profile. Times are those of the first process. Every call then needs separate generators.

    Args:
        pipe: The pipeline, not accelerated.
        calls: Prompts, or dictionaries of arguments for ``pipe(**call)``: one, or a list. Each call may hold a batch.
            The prompts get the seeds 0, 1, … The state of generators is restored. A dictionary without a generator
            draws from torch's global generator: call ``torch.manual_seed`` before, or two measurements differ.
        sites: Granularities that are measured in addition to the model: "stack", "block", "sublayer", several in a list
            or with commas. Inner sites are measured on a fixed random subset of tokens.
        influence: Measure how an error of each inner site changes the output. This takes up to four full runs more of
            the first call's denoiser. None: if there are inner sites.
        influence_steps: Most steps at which influence is measured. It is interpolated between them.
        resume: A folder that keeps every measured call. The same measurement, started again, continues there and
            returns the same profile, bit for bit.
        progress: Whether to show a bar. None: on a terminal or in a notebook.
        **common: Arguments of the pipeline that are added to every call, such as ``num_inference_steps=28``.

    Returns:
        The profile. Of a loop around a language model, a :class:`TokenProfile`.

    Raises:
        UnsupportedModel, AlreadyAccelerated, BadOption, UnknownName.

    Example:
        >>> profile = diffcache.measure(pipe, ["a cat", "a dog"], num_inference_steps=28)
        >>> schedule = diffcache.plan(profile, "closed_loop", 10)
    """
    if not host.is_count(influence_steps, 1):
        raise BadOption("influence_steps", influence_steps, "a whole number, 1 or more")
    asked = granularities(sites)
    with_influence = len(asked) > 1 if influence is None else influence and len(asked) > 1
    options = MeasureOptions(asked, influence_steps if with_influence else 0)
    if host.language_model_of(pipe) is not None:
        given = {"sites": len(asked) > 1, "influence": influence is not None, "resume": resume is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise Unusable(name, "it does not apply to language models", f"Leave out {name}")
        return _of_language_model(pipe, calls, common, progress=shows_progress(progress))
    bound = Bound.of(pipe)
    pipe = bound.pipe
    host.demand_full_run(pipe)  # before a folder is made
    calls = host.calls_of(pipe, calls, common, measure)
    host.check_calls(pipe, calls)
    host.check_same_steps(pipe, calls)
    for name, sites_of_network in bound.sites.items():
        inner_places(name, sites_of_network, asked)
    if resume is not None:
        check_folder("resume", resume)

    def share(rank: int, size: int) -> bytes:
        if size > 1:
            demand_own_generators(calls)
        folder = None if resume is None else MeasurementFolder(Path(resume), pipe, options.settings)
        mine = [(index, call) for index, call in enumerate(calls) if index % size == rank]
        watch = Watch(pipe, options.granularities)
        found = PartialProfile()
        with restored_generators(calls):
            # A bar in a ``with`` block ends its line when a call fails.
            with tqdm(mine, desc="measure", unit="call", disable=rank > 0 or not shows_progress(progress)) as bar:
                for index, call in bar:
                    found.merge(_of_call(pipe, index, call, options.influence, watch, folder))
        return found.to_bytes()

    found = PartialProfile()
    for rank, data in enumerate(all_shares(share)):
        found.merge(PartialProfile.from_bytes(data, f"the findings of process {rank}")[0])
    return found.profile()


def profile_of(
    pipe: Any, trajectories: Sequence[Trajectory], replays: Sequence[Replay], why_no_replays: str
) -> Profile:
    """Return the profile of the model site from recorded runs: the same that ``measure`` makes of these calls."""
    found = PartialProfile()
    for index, trajectory in enumerate(trajectories):
        recorded = CallMeasurement(pipe, index, trajectory, replays[index] if replays else None, why_no_replays)
        found.merge(recorded.partial_profile())
    return found.profile()


def _of_call(
    pipe: Any, index: int, call: Mapping[str, Any], influence: int, watch: Watch, folder: MeasurementFolder | None
) -> PartialProfile:
    """Return the measurements of a call: read from the folder, or made and kept there."""
    if folder and (known := folder.find(index, call)):
        return known
    keep = folder.keeper(index, call) if folder else lambda found: None
    with watch.attached():
        trajectory = record(pipe, call, watch.forward)
    seen = watch.observers.get(id(trajectory.steps[0].calls[0].module))
    replay, obstacle = replayed(trajectory)
    found = CallMeasurement(pipe, index, trajectory, replay, obstacle, call, seen, influence).partial_profile()
    keep(found)
    return found


class Watch:
    """Observers of a pipeline's networks. There are none if only the model site is measured."""

    def __init__(self, pipe: Any, wanted: Sequence[Granularity]) -> None:
        self.observers = {
            id(sites["model"][0]): Observer(inner_places(name, sites, wanted))
            for name, sites in Bound.of(pipe).sites.items()
            if len(wanted) > 1
        }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Attach all observers for the length of the block."""
        with contextlib.ExitStack() as undo:
            for observer in self.observers.values():
                undo.enter_context(observer.attached())
            yield

    def forward(self, module: nn.Module, step: int, ordinal: int, x: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the module's observer expects one forward."""
        observer = self.observers.get(id(module))
        return contextlib.nullcontext() if observer is None else observer.forward(step, ordinal, len(x))


def _of_language_model(pipe: Any, calls: Any, common: Mapping[str, Any], *, progress: bool) -> TokenProfile:
    """Return the profile of a loop around a language model."""
    pipe = host.adopted(pipe)
    demand_loop(pipe)
    host.demand_full_run(pipe)
    made = host.calls_of(pipe, calls, common, measure)
    host.check_calls(pipe, made)
    return measure_decodes(pipe, made, progress=progress)
