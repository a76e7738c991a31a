"""The pipeline that an evaluation runs, and the facts about it that the evaluation uses."""

from __future__ import annotations

import contextlib
import inspect
import math
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffcache import host
from diffcache.documents.schedule import CacheSchedule, noise_scheduler_title
from diffcache.errors import Unusable
from diffcache.eval.methods import STEPS, Method, baselines
from diffcache.eval.record import WHOLE
from diffcache.eval.timed_run import watched
from diffcache.executor.bound import Bound
from diffcache.executor.by_steps import BySteps
from diffcache.executor.checks import check_call
from diffcache.executor.first_step import first_step
from diffcache.host.digest import TO_DIGEST, NoDigestError
from diffcache.profiling.recording import with_copied_generators

ASKED = ("prompt", "negative_prompt", "class_labels")  # arguments of a call that differ between samples

Call = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """The pipeline of an evaluation.

    Attributes:
        bound: The pipeline, its networks and its executor.
        pipe: The pipeline, which is called.
        networks: Its denoisers by component name.
        traits: The facts about its kind.
        title: The name of its class.
        loaded_from: The name or the path that it was loaded from; "" if it is not known.
        has_output_type: Whether a call has the argument ``output_type``.
    """

    bound: Bound
    pipe: Any
    networks: Mapping[str, nn.Module]
    traits: host.Traits
    title: str
    loaded_from: str
    has_output_type: bool

    @classmethod
    def of(cls, pipe: Any) -> Subject:
        """Return the subject of an evaluation of what a user passed.

        Raises:
            UnsupportedModel: The object cannot be accelerated.
            AlreadyAccelerated: diffcache or another cache is on.
        """
        bound = Bound.of(pipe)
        pipe = bound.pipe
        host.demand_full_run(pipe)
        return cls(
            bound,
            pipe,
            bound.denoisers,
            host.traits(pipe),
            title=type(pipe).__name__,
            loaded_from=str(getattr(pipe, "config", {}).get("_name_or_path") or ""),
            has_output_type="output_type" in inspect.signature(type(pipe).__call__).parameters,
        )

    @property
    def origin(self) -> dict[str, str]:
        """Return the class, the origin and the networks, without settings."""
        networks = {name: f"{host.class_name(m)} {host.config_digest(m)}" for name, m in self.networks.items()}
        return {"class": self.title, "model": self.loaded_from} | networks

    def identity(self) -> dict[str, str]:
        """Return the parts that identify the pipeline, as :func:`host.identity` does.

        A part without a digest causes a warning and gets a random value. Results of such a pipeline are not found
        again.
        """
        return host.identity(self.pipe, _alone)

    def in_record(self, call: Call, steps: int) -> dict[str, Any]:
        """Return the description of the pipeline for the record.

        Args:
            call: The first call.
            steps: Number of steps of the full run.
        """
        return {
            "class": self.title,
            "denoiser": ", ".join(host.class_name(module) for module in self.networks.values()),
            "noise_scheduler": noise_scheduler_title(type(host.noise_scheduler(self.pipe)).__name__),
            "steps": steps,
            "guidance": str(call.get("guidance_scale", "the pipeline's own")),
            "model": self.loaded_from,
            "arguments": _plain(call),
        }

    def numeric(self, call: Call) -> dict[str, Any]:
        """Return the call with an ``output_type`` that returns pictures as arrays, if there is such an argument.

        Calls that return latents are unchanged.
        """
        if not self.has_output_type or call.get("output_type") == "latent":
            return dict(call)
        return {**call, "output_type": "np"}

    @contextlib.contextmanager
    def on(self, method: Method) -> Iterator[Any]:
        """Apply a method, after checking that no other method is still applied. Yield the pipeline."""
        host.demand_full_run(self.pipe)
        with method.on(self.pipe):
            yield self.pipe

    def check_methods(self, methods: Sequence[Method], calls: Sequence[Call]) -> None:
        """Raise an error unless every method can be applied to the pipeline and fits the calls.

        Each schedule and rule is applied to the pipeline and removed again. This makes every check that ``accelerate``
        makes.
        """
        for method in methods:
            if method.source is not None:
                with method.on(self.pipe):
                    pass
            for call in calls:
                changed = {**call, **method.change}
                host.check_call(self.pipe, changed, f"the call of {method.name!r}")
                if isinstance(method.source, CacheSchedule):
                    check_call(method.source, changed, host.iterations(self.pipe, changed))

    def steps(self, calls: Sequence[Call]) -> int:
        """Return the number of steps that all calls take. If calls of the loop do not state it, the loop runs.

        Raises:
            BadOption: If the call of a pipeline does not state its steps, or calls have different numbers of steps.
        """
        runs = self.traits.steps_argument is None
        some = calls[:1] if runs and len({call.get(STEPS) for call in calls}) == 1 else calls
        steps = set()
        for call in some:
            count = self._counted(call) if runs else host.steps_asked(self.pipe, call)
            if count is None:
                raise Unusable(
                    "calls",
                    f"a call has {', '.join(sorted(call)) or 'no arguments'}, without num_inference_steps",
                    "Pass num_inference_steps in each call",
                )
            steps.add(count)
        if len(steps) > 1:
            raise Unusable(
                "calls",
                f"they ask for different numbers of steps, {sorted(steps)}",
                "Pass calls with one number of steps",
            )
        return steps.pop()

    def _counted(self, call: Call) -> int:
        """Return the steps of a loop whose calls do not state them. This runs the loop once.

        Raises:
            BadOption: If the call does not run the loop exactly once.
        """
        steps: list[int] = []

        class Observer(host.LoopObserver):
            def loop_began(self, run: host.LoopRun) -> None:
                steps.append(run.steps)

        watcher = host.LoopWatcher(self.pipe, Observer())
        watcher.attach()
        try:
            with torch.no_grad():
                self.pipe(**{name: with_copied_generators(value) for name, value in call.items()})
        finally:
            watcher.detach()
        if len(set(steps)) != 1:
            raise Unusable(
                "sample",
                f"it ran {len(steps)} trajectories",
                "Run the loop exactly once in it, inside `with diffcache.trajectory(…)`",
            )
        return steps[0]

    def baselines(self, methods: Sequence[Method], call: Call, steps: int) -> list[Method]:
        """Return the methods to compare with: those of the work of each method (see ``eval.methods.baselines``).

        Args:
            methods: The methods.
            call: A call. Its first step runs with each schedule.
            steps: Number of steps of the full run.
        """
        budgets = [self.work(method, call, steps) for method in methods]
        fewer = bool(self.traits.steps_argument) or call.get(STEPS) == steps
        return baselines(self.pipe, steps, budgets, fewer=fewer)

    def work(self, method: Method, call: Call, steps: int) -> int:
        """Return the work of a method in whole steps, rounded up. The method is compared with methods of this cost.

        Args:
            method: The method.
            call: A call, whose first step runs.
            steps: Number of steps of the full run.
        """
        source = method.source.of(steps) if isinstance(method.source, BySteps) else method.source
        if source is None:
            return steps
        first = first_step(self.bound, source, call)
        fraction = first.compute_fraction
        if first.online:  # the run itself decides, so its operations are counted
            whole = watched(self.pipe, call, closely=True).flops
            with method.on(self.pipe):
                done = watched(self.pipe, {**call, **method.change}, closely=True).flops
            fraction = done / whole if done is not None and whole else fraction
        return max(1, math.ceil(fraction * steps - WHOLE))


def _plain(call: Call) -> dict[str, bool | int | float | str]:
    """Return the arguments that JSON can hold, without the arguments that differ between samples."""
    return {k: v for k, v in call.items() if k not in ASKED and isinstance(v, (bool, int, float, str))}


def _alone(name: str, reason: NoDigestError) -> str:
    """Warn that a part of the pipeline has no digest, and return a random one."""
    warnings.warn(
        f"evaluate cannot recognise this pipeline in a later run: its {name} has {reason.what} at "
        f"{reason.where or 'the top'}. All runs are made now, and made again next time. Give the object {TO_DIGEST} to "
        "keep them.",
        stacklevel=5,
    )
    return uuid.uuid4().hex
