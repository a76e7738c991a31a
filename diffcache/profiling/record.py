"""Watch a pipeline run in full and write down its sampling loop: states, denoiser calls, noise-scheduler steps."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcache import host
from diffcache.errors import UnsupportedModel
from diffcache.patch import layer
from diffcache.store import Output


@dataclass(slots=True)
class DenoiserCall:
    """One forward: its arguments as given, the name of its main input, and the first tensor of its output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    main: str
    output: Tensor

    @property
    def input(self) -> Any:
        return self.args[0] if self.args else self.kwargs[self.main]

    def again(self, main: Tensor) -> Tensor:
        """The same forward with another main input."""
        if self.args:
            value = self.module(main, *self.args[1:], **self.kwargs)
        else:
            value = self.module(**{**self.kwargs, self.main: main})
        return Output.of(value).tensors[0]


@dataclass(slots=True)
class LoopStep:
    """One iteration: the denoiser calls, then ``scheduler.step(model_output, timestep, state, **extra) -> result``."""

    calls: list[DenoiserCall] = field(default_factory=list)
    timestep: Any = None
    model_output: Tensor | None = None
    state: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    result: Tensor | None = None


@dataclass(slots=True)
class Trajectory:
    """One run of the loop.

    scheduler  the noise scheduler as it was before the first step (a copy)
    start      index of the first iteration; ``steps[0]`` is iteration ``start``
    timesteps  the noise scheduler's own tensor [T]
    """

    scheduler: Any
    start: int
    timesteps: Tensor
    guidance_scale: float | None
    steps: list[LoopStep]


def record(pipe: Any, call: Mapping[str, Any]) -> Trajectory:
    """Run ``pipe(**call)`` in full, unchanged, and return its last sampling loop."""
    recorder = _Recorder(pipe)
    with recorder.attached(), torch.no_grad():
        pipe(**call)
    if not recorder.trajectories:
        raise UnsupportedModel(
            f"{type(pipe).__name__} finished without a sampling loop this library can see: its loop calls neither "
            "pipe.progress_bar nor scheduler.step. It cannot be measured; accelerate it with a rule instead."
        )
    return recorder.trajectories[-1]


def record_all(
    pipe: Any, calls: Sequence[Mapping[str, Any]], done: Callable[[], None] = lambda: None
) -> list[Trajectory]:
    """``record`` for each call; ``done`` is called after each (a progress bar)."""
    trajectories = []
    for call in calls:
        trajectories.append(record(pipe, call))
        done()
    return trajectories


class _Recorder:
    def __init__(self, pipe: Any) -> None:
        self.denoisers = host.denoisers(pipe)
        self.main = {n: next(iter(inspect.signature(m.forward).parameters)) for n, m in self.denoisers.items()}
        self.host = host.Host(pipe, self._begin, lambda run: None)
        self.trajectories: list[Trajectory] = []
        self._step_layer = contextlib.ExitStack()

    @contextlib.contextmanager
    def attached(self) -> Any:
        with contextlib.ExitStack() as undo:
            for name, module in self.denoisers.items():
                undo.callback(layer(module, "forward", self._forward(name, module)))
            undo.callback(self._step_layer.close)
            undo.callback(self.host.detach)
            self.host.attach()
            yield

    def _begin(self, run: host.Run) -> None:
        self._step_layer.close()
        scheduler = copy.deepcopy(run.scheduler)
        scale = host.guidance_scale(self.host.pipe)
        self.trajectories.append(Trajectory(scheduler, run.start, run.timesteps.clone(), scale, [LoopStep()]))
        self._step_layer.callback(layer(run.scheduler, "step", self._step, copies=True))

    def _forward(self, name: str, module: nn.Module) -> Callable[..., Any]:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            if self.host.run is not None:
                tensors = Output.of(value).tensors
                output = tensors[0].detach().clone()
                self.trajectories[-1].steps[-1].calls.append(DenoiserCall(module, args, kwargs, self.main[name], output))
            return value

        return around

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = inner(*args, **kwargs)
        given = inspect.signature(inner).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        step = self.trajectories[-1].steps[-1]
        step.model_output = given.pop("model_output").detach().clone()
        step.timestep = given.pop("timestep")
        step.state = given.pop("sample").detach().clone()
        step.extra = {k: v for k, v in given.items() if k != "return_dict"}
        step.result = Output.of(value).tensors[0].detach().clone()
        if len(self.trajectories[-1].steps) < len(self.trajectories[-1].timesteps) - self.trajectories[-1].start:
            self.trajectories[-1].steps.append(LoopStep())
        return value
