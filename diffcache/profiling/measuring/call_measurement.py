"""Measure one recorded call, before the recording is dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffcache import host
from diffcache.documents.document import version_of
from diffcache.documents.sites import parse
from diffcache.errors import UnsupportedModel
from diffcache.host.channels import Place, carries, counterpart, find_sample, is_cut
from diffcache.profiling.fitting.dynamics import answers, grams_and_peaks, measure_reach
from diffcache.profiling.fitting.fit import fit
from diffcache.profiling.measuring.costs import count_flops, time_sites
from diffcache.profiling.measuring.influence import measure_influence, steps_to_measure
from diffcache.profiling.measuring.partial_profile import Arrays, CallProfile, FirstCall, PartialProfile, SiteCosts
from diffcache.profiling.measuring.tables import Sums
from diffcache.profiling.recording.clock import scatter, warn_of_unsteady_times
from diffcache.profiling.recording.format_costs import AT_STEPS, FormatCosts
from diffcache.profiling.recording.measured_sites import main_output, of_samples
from diffcache.profiling.recording.observe import Observer, Series
from diffcache.profiling.recording.record import DenoiserCall, Trajectory
from diffcache.profiling.replay import run_facts
from diffcache.profiling.replay.input_share import noise_levels
from diffcache.profiling.replay.replay import Replay
from diffcache.profiling.replay.run_facts import RunFacts
from diffcache.schedulers.uniform import evenly

ANSWERED = 4  # the first calls, whose loops are run once more with half of their steps predicted, for the response


@dataclass(slots=True)
class CallMeasurement:
    """One recorded call of a measurement.

    Attributes:
        pipe: The pipeline.
        index: Index of the call. More is measured in the first calls.
        trajectory: The recording.
        replay: The replay, or None.
        obstacle: Why there is no replay, or "".
        call: The arguments, for notes.
        observer: The tensors of inner sites. None: only the model site is measured.
        influence: Most steps at which influence is measured. 0: none.
    """

    pipe: Any
    index: int
    trajectory: Trajectory
    replay: Replay | None
    obstacle: str
    call: Mapping[str, Any] = field(default_factory=dict)
    observer: Observer | None = None
    influence: int = 0

    def partial_profile(self) -> PartialProfile:
        """Return the measurements of this call.

        Raises:
            UnsupportedModel: One profile cannot describe the run.
        """
        name, module = self._denoiser()
        here = RunFacts.of(self.trajectory, self.replay, self.obstacle)
        found = PartialProfile(calls={self.index: CallProfile(here, self._arrays(here))})
        found.sites["model"] = _sums(_model_series(self.trajectory), here.separable)
        if self.observer:
            left_out = {}
            for site in self.observer.places:
                rows = self.observer.series(site, len(self.trajectory.steps))
                if isinstance(rows, str):
                    left_out[site] = rows
                else:
                    found.sites[site] = _sums(rows, here.separable)
            found.calls[self.index].left_out = left_out
        if self.index == 0:
            found.first = self._first(name, module, here.samples)
        return found

    def _denoiser(self) -> tuple[str, nn.Module]:
        """Return the name and the module of the one denoiser. Raise UnsupportedModel if there are several."""
        denoisers = run_facts.denoisers(self.pipe, self.trajectory)
        if len(denoisers) != 1:
            raise UnsupportedModel(
                f"{host.host_name(self.pipe)} changes denoisers on its way ({', '.join(denoisers)}); a profile holds "
                "tables of one for all steps. Make the schedule from a Calibration."
            )
        return next(iter(denoisers.items()))

    def _arrays(self, here: RunFacts) -> Arrays:
        """Return the arrays of the dynamics that one call provides."""
        if self.replay is None:
            return {}
        grams, peaks = grams_and_peaks(self.replay)
        found = {"grams": grams, "peaks": peaks}
        if self.index < ANSWERED and not here.bent:
            steps = len(self.replay.steps)
            mask = evenly(steps, max(steps // 2, len(here.begins)), here.begins)
            run = fit([self.replay], mask, per_branch=False)
            found["answers"] = answers([self.replay], run)
        return found

    def _first(self, name: str, module: nn.Module, samples: int) -> FirstCall:
        """Return the values that the first call provides for all calls."""
        trajectory = self.trajectory
        steps = trajectory.steps
        arrays = {"timesteps": trajectory.timesteps[trajectory.start : trajectory.end].double().cpu().numpy()}
        sigmas = noise_levels(trajectory)
        arrays |= {} if sigmas is None else {"sigmas": sigmas}
        arrays |= {} if self.replay is None else {"reach": measure_reach(self.replay)}
        costs, notes = self._costs()
        return FirstCall(
            denoiser=(name, host.class_name(module), host.config_digest(module)),
            noise_scheduler=run_facts.noise_scheduler_id(trajectory.scheduler),
            rest_s=trajectory.rest_s,
            forwards=sum(len(step.calls) for step in steps),
            costs=costs,
            arrays=arrays,
            notes=_notes(self.call, steps[0].calls[0], samples)
            | notes
            | host.configurations(**{name: module, "scheduler": trajectory.scheduler}),
        )

    def _costs(self) -> tuple[dict[str, SiteCosts], dict[str, str]]:
        """Return the cost of every site, and notes on how it was measured."""
        steps, observer = self.trajectory.steps, self.observer
        call = steps[0].calls[0]
        places = observer.places if observer else {}
        flops = count_flops(call, places)
        like = [c.seconds for s in steps for c in s.calls if c.output.shape == call.output.shape]
        warn_of_unsteady_times(scatter(like), len(like))
        if observer:
            seconds = time_sites(call, places)
        else:  # no inner site was measured, so the times of the run count; its first call also warmed up
            seconds = {"model": float(np.median(like))}
        size = sum(t.numel() * t.element_size() for t in call.outputs)
        whole = FormatCosts()
        for n in AT_STEPS:
            if n < len(steps):
                whole.add(steps[n].calls[0].outputs, main=0)
        costs = {"model": SiteCosts(seconds["model"], flops["model"], len(steps[0].calls), size, **_kept(whole))}
        if observer is None:
            return costs, {}
        called = {site: modules for site, modules in places.items() if site in seconds and site in observer.calls}
        for site in called:
            kept = _kept(observer.kept[site]) if site in observer.kept else {}
            numbers = seconds[site], flops[site], observer.calls[site], observer.output_bytes[site]
            costs[site] = SiteCosts(*numbers, **kept)
        lists = dict.fromkeys(re.split(r"\.\d+(?:\.|$)", parse(site).path)[0] for site in observer.calls)
        notes = {"stacks": ", ".join(lists)}  # lists of blocks in running order, which their names do not show
        if not self.influence or len(steps) < 2:
            return costs, notes
        forwards = sum(len(step.calls) for step in steps)
        at = steps_to_measure(len(steps), forwards, len(called), self.influence)
        costs["model"].influence = np.ones(len(steps))  # by definition
        for site, found in measure_influence([s.calls[0] for s in steps], called, observer.main, at).items():
            costs[site].influence = found
        return costs, notes | {"influence_steps": ", ".join(map(str, at))}


def _kept(found: FormatCosts) -> dict[str, Any]:
    """Return the fields of SiteCosts that describe kept outputs."""
    return {"kept": found.profiles(), "channels": found.channels()}


def _sums(rows: Sequence[Series], branches: int) -> list[Sums]:
    """Return the tables of each branch. Rows come branch after branch, each with all its samples."""
    sums = [Sums() for _ in range(branches)]
    for n, row in enumerate(rows):
        sums[n * branches // len(rows)].add(*row.stacked())
    return sums


def _model_series(trajectory: Trajectory) -> list[Series]:
    """Return inputs and outputs of every sample of every call in a step, branch after branch."""
    rows = []
    place = _place(trajectory)
    for ordinal in range(min(len(step.calls) for step in trajectory.steps)):
        calls = [step.calls[ordinal] for step in trajectory.steps]
        _demand_one_shape(calls)
        given, made = ([_samples(call, place)[n] for call in calls] for n in range(2))
        for n in range(len(given[0])):
            rows.append(Series([x[n] for x in given], [y[n] for y in made], None, calls[0].output.device))
    return rows


def _place(trajectory: Trajectory) -> Place | None:
    """Return the position of the state in the denoiser's input; None if it is not found."""
    first = trajectory.steps[0]
    x, state = first.calls[0].input, first.state
    return find_sample(x, state) if isinstance(x, Tensor) and isinstance(state, Tensor) else None


def _samples(call: DenoiserCall, place: Place | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs and the outputs of a forward, [tokens, channels] of each sample.

    If ``place`` is known, the input is the state without conditions.

    Raises:
        UnsupportedModel: The output is not a batch of samples like the input.
    """
    x = call.input
    if isinstance(x, Tensor):
        if carries(x.shape, call.output.shape, place) and is_cut(x.shape, call.output.shape, place):
            x = counterpart(x, call.output.shape, place)
        main = main_output(call.outputs, x.shape, lambda t: float((t - x).double().square().mean()))
        found = of_samples([x], len(x), listed=False), of_samples([call.outputs[main]], len(x), listed=False)
    else:
        members = [t for t in x if isinstance(t, Tensor)] if isinstance(x, (list, tuple)) else []
        found = (of_samples(members, len(members), listed=True), of_samples(call.outputs, len(members), listed=True))
    given, made = found
    if not given or not made:
        shapes = ", ".join(str(list(t.shape)) for t in call.outputs)
        raise UnsupportedModel(
            f"{type(call.module).__name__} returns {shapes}, which is not a batch of samples like its input."
        )
    return given, made


def _demand_one_shape(calls: Sequence[DenoiserCall]) -> None:
    """Raise UnsupportedModel if the shapes of outputs change from step to step."""
    shapes = {tuple(t.shape for t in call.outputs) for call in calls}
    if len(shapes) != 1:
        raise UnsupportedModel(
            f"the outputs of {type(calls[0].module).__name__} change their shape on the way "
            f"({' and '.join(str([*map(tuple, s)]) for s in sorted(shapes))}); a profile has one for all steps. "
            "Call the pipeline with guidance that lasts for all steps."
        )


def _notes(call: Mapping[str, Any], forward: DenoiserCall, samples: int) -> dict[str, str]:
    """Return notes on the first call: samples, sizes, device, number type and versions of packages."""
    output = forward.output
    notes = {
        "batch": str(samples),
        "device": output.device.type,
        "dtype": str(output.dtype).removeprefix("torch."),
    }
    notes |= {key: str(call[key]) for key in ("height", "width", "num_frames") if call.get(key) is not None}
    return notes | {package: version_of(package) for package in ("torch", "diffusers", "diffcache")}
