"""Measure full runs: how a network's sites change from step to step, what they cost, how the loop passes errors on."""

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
from diffcache.errors import BadOption
from diffcache.executor.bound import Bound
from diffcache.profiling.measuring.call_measurement import CallMeasurement
from diffcache.profiling.measuring.partial_profile import PartialProfile
from diffcache.profiling.measuring.resume import MeasurementFolder
from diffcache.profiling.recording.generators import demand_own_generators, restored_generators
from diffcache.profiling.recording.measured_sites import granularities, inner_places
from diffcache.profiling.recording.observe import Observer
from diffcache.profiling.recording.record import Trajectory, record
from diffcache.profiling.recording.shards import all_shares
from diffcache.profiling.replay.replay import Replay
from diffcache.profiling.replay.run_facts import replayed


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What is to be measured. ``influence``: at how many steps at most; 0: not at all."""

    granularities: tuple[Granularity, ...] = ("model",)
    influence: int = 0

    @property
    def settings(self) -> dict[str, str]:
        return {"sites": ", ".join(self.granularities), "influence steps": str(self.influence)}


def measure(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    *,
    sites: str | Sequence[str] = "model",
    influence: bool | None = None,
    influence_steps: int = 4,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Profile:
    """Run ``pipe(**call)`` in full for each call, and write down what a scheduler needs to know.

    calls            arguments of the pipeline; each call may hold a batch. Generators in them are left where they were
                     found
    sites            granularities that are measured beside the model: "stack", "block", "sublayer", several in a list
                     or with commas. Of inner sites a fixed random subset of tokens is looked at
    influence        measure how far an error of each inner site reaches, by running the first call's denoiser up to
                     four full runs' worth more; None: if there are inner sites
    influence_steps  at how many steps at most; between them it is interpolated
    resume           a folder in which every measured call is kept: the same measurement, started again, goes on there
                     and comes to the same profile, bit for bit
    progress         show a bar

    Where the loop can be repeated apart from its pipeline, those of the first four calls are run once more with half
    of their steps predicted, to see how the network answers to errors. Memory does not grow with the number of calls.

    Under ``torchrun``, or wherever torch.distributed is initialised, each process measures its share of the calls and
    all return the same profile; times are those of the first process. Give every call generators of its own then.

    Raises UnsupportedModel, AlreadyAccelerated, BadOption.
    """
    if not host.is_count(influence_steps, 1):
        raise BadOption("influence_steps", influence_steps, "a whole number, 1 or more")
    asked = granularities(sites)
    with_influence = len(asked) > 1 if influence is None else influence and len(asked) > 1
    wanted = MeasureOptions(asked, influence_steps if with_influence else 0)
    bound = Bound.of(pipe)
    pipe = bound.pipe
    host.demand_full_run(pipe)  # before a folder is made
    host.check_calls(pipe, calls)
    host.check_same_steps(pipe, calls)
    for name, sites_of_network in bound.sites.items():
        inner_places(name, sites_of_network, asked)
    if resume is not None:
        check_folder("resume", resume)

    def share(rank: int, size: int) -> bytes:
        if size > 1:
            demand_own_generators(calls)
        folder = None if resume is None else MeasurementFolder(Path(resume), pipe, wanted.settings)
        mine = [(index, call) for index, call in enumerate(calls) if index % size == rank]
        watch = Watch(pipe, wanted.granularities)
        found = PartialProfile()
        with restored_generators(calls):
            # A bar in a ``with`` block ends its line when a call fails.
            with tqdm(mine, desc="measure", unit="call", disable=rank > 0 or not progress) as bar:
                for index, call in bar:
                    found.merge(_of_call(pipe, index, call, wanted.influence, watch, folder))
        return found.to_bytes()

    found = PartialProfile()
    for rank, data in enumerate(all_shares(share)):
        found.merge(PartialProfile.from_bytes(data, f"the findings of process {rank}")[0])
    return found.profile()


def profile_of(
    pipe: Any, trajectories: Sequence[Trajectory], replays: Sequence[Replay], why_no_replays: str
) -> Profile:
    """What recorded runs tell about the model site: the profile that ``measure`` makes of the same calls."""
    found = PartialProfile()
    for index, trajectory in enumerate(trajectories):
        recorded = CallMeasurement(pipe, index, trajectory, replays[index] if replays else None, why_no_replays)
        found.merge(recorded.partial_profile())
    return found.profile()


def _of_call(
    pipe: Any, index: int, call: Mapping[str, Any], influence: int, watch: Watch, folder: MeasurementFolder | None
) -> PartialProfile:
    """Taken from the folder, or measured and left there."""
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
    """Observers of the networks that a pipeline has, by id; none where the model site alone is wanted."""

    def __init__(self, pipe: Any, wanted: Sequence[Granularity]) -> None:
        self.observers = {
            id(sites["model"][0]): Observer(inner_places(name, sites, wanted))
            for name, sites in Bound.of(pipe).sites.items()
            if len(wanted) > 1
        }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for observer in self.observers.values():
                undo.enter_context(observer.attached())
            yield

    def forward(self, module: nn.Module, step: int, ordinal: int, x: Any) -> contextlib.AbstractContextManager[None]:
        observer = self.observers.get(id(module))
        return contextlib.nullcontext() if observer is None else observer.forward(step, ordinal, len(x))
