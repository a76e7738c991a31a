"""Run a pipeline in full and record its sampling loop: states, denoiser calls, noise-scheduler steps.

A recording keeps one state per step, the denoiser's outputs and the denoiser's other arguments. These are kept by
reference: embeddings are one object for all steps, ControlNet residuals are not. Equal tensors are kept once.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcache import host
from diffcache.errors import UnsupportedModel, Unusable
from diffcache.executor.store import Output
from diffcache.patch import inner_spot, layer
from diffcache.profiling.recording.clock import wait
from diffcache.profiling.recording.generators import (
    copy_of_global_generator,
    restored_generators,
    with_copied_generators,
)

EXPLAINED = 1e-2  # largest unexplained share of a step's move in a loop that counts as affine in the network's output
SAME_TIME = 1e-4  # relative difference up to which two times count as equal
FEEDERS = "controlnet"  # prefix of the names of components that run before the denoiser and feed it


@dataclass(slots=True)
class Forward:
    """One forward: its arguments, the name of its main input, and the tensors of its output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    main: str
    outputs: tuple[Tensor, ...]

    @property
    def input(self) -> Any:
        """The main input."""
        return self.args[0] if self.args else self.kwargs[self.main]

    def again(self, main: Any, instead: Mapping[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Run the forward again with another main input.

        Args:
            main: The main input.
            instead: id of a tensor among the arguments -> the tensor that replaces it.

        Returns:
            The tensors of its output.
        """
        fresh = instead or {}
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: fresh.get(id(t), t), (self.args, dict(self.kwargs)))
        value = self.module(main, *args[1:], **kwargs) if args else self.module(**kwargs | {self.main: main})
        return Output.of(value).tensors


@dataclass(slots=True)
class DenoiserCall(Forward):
    """A forward of the denoiser, its time, and the name of its branch or ""."""

    seconds: float
    branch: str = ""

    @property
    def output(self) -> Tensor:
        """The first tensor of the output."""
        return self.outputs[0]


@dataclass(slots=True)
class LoopStep:
    """One iteration: the denoiser calls, then ``scheduler.step(model_output, timestep, state, **extra) -> result``.

    Generators in ``extra`` are copies, standing where they stood before the step drew from them. ``feeds`` are forwards
    of networks that see the state too and whose outputs the denoiser is given. If the loop calls ``scheduler.step``
    several times in the iteration, ``model_output``, ``state`` and ``result`` are those of the last call.
    """

    feeds: list[Forward] = field(default_factory=list)
    calls: list[DenoiserCall] = field(default_factory=list)
    timestep: Any = None
    model_output: Tensor | None = None
    state: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    result: Tensor | None = None


@dataclass(slots=True)
class Trajectory:
    """One run of the loop.

    Attributes:
        scheduler: A copy of the noise scheduler before the first step.
        start: Index of the first iteration. ``steps[0]`` is iteration ``start``.
        timesteps: The noise scheduler's timesteps [T]. The loop may end before the last of them.
        guidance_scales: Name of an argument -> its value, as far as they can be read.
        steps: The iterations.
        rest_s: Seconds of the loop outside the denoiser, without the time that the recording takes.
        obstacle: Why the loop cannot be repeated, if the recording shows it; else "".
    """

    scheduler: Any
    start: int
    timesteps: Tensor
    guidance_scales: Mapping[str, float]
    steps: list[LoopStep]
    rest_s: float = 0.0
    obstacle: str = ""

    @property
    def end(self) -> int:
        """Index after the last iteration. It is below T if the loop ends early."""
        return self.start + len(self.steps)

    @property
    def first_steps(self) -> tuple[int, ...]:
        """Steps at which another denoiser takes over, the first included."""
        called = [{id(call.module) for call in step.calls} for step in self.steps]
        return tuple(i for i in range(len(called)) if i == 0 or called[i] != called[i - 1])


# (network, step, how many forwards the step had before this one, its main input) -> what is entered around a forward
Inside = Callable[[nn.Module, int, int, Any], contextlib.AbstractContextManager[None]]


def record(
    pipe: Any, call: Mapping[str, Any], inside: Inside = lambda *forward: contextlib.nullcontext()
) -> Trajectory:
    """Run ``pipe(**call)`` in full, unchanged, and return its last sampling loop."""
    name = host.host_name(pipe)
    host.demand_full_run(pipe)
    host.demand_one_process(pipe)
    recorder = _Recorder(pipe, inside)
    with recorder.attached(), torch.no_grad():
        value = pipe(**call)
    # The recorder and its host hold each other, until a cycle collection: they must not hold the recording too.
    trajectories, recorder.trajectories = recorder.trajectories, []
    if not trajectories:
        raise UnsupportedModel(
            f"the sampling loop of {name} was not seen: it runs in no pipe.progress_bar. The pipeline can be neither "
            "recorded nor accelerated. Write the loop yourself inside `with diffcache.trajectory(network, timesteps):`."
        )
    trajectory = trajectories[-1]
    if getattr(trajectory.scheduler, "counts_forwards", False):
        _identify(trajectory, recorder.result, value)
    elif not trajectory.steps[-1].calls and trajectory.steps[-1].result is None:
        trajectory.steps.pop()  # was opened for a step that did not come
    _order(trajectory)
    _demand_one_grid(name, trajectory, recorder.grids)
    if not all(bool(torch.isfinite(s.result).all()) for s in trajectory.steps if s.result is not None):
        raise Unusable(
            "calls", "the full run of a call produced NaN or Inf", "Try another dtype, such as torch.float32"
        )
    return trajectory


def _demand_one_grid(name: str, trajectory: Trajectory, grids: int) -> None:
    """Raise UnsupportedModel if one schedule cannot describe the loop, because its steps are not those of one grid.

    Args:
        name: The name of the pipeline, for the error.
        trajectory: The recording of the last loop.
        grids: How many grids of the noise scheduler the loop ran on.
    """
    planned = len(trajectory.timesteps) - trajectory.start
    here = f"{len(trajectory.steps)} step{'s' * (len(trajectory.steps) != 1)}"
    if grids > 1:
        why = f"its loop has {grids} stages, each with other timesteps, and a schedule holds one list of timesteps"
    elif not trajectory.steps:
        why = f"its network was not called at any of the {planned} steps that the noise scheduler planned"
    elif len(trajectory.steps) > planned:
        why = f"its loop takes {here}, and a schedule holds only the {planned} that the noise scheduler planned"
    elif len(trajectory.steps) < planned and _elsewhere(trajectory):
        why = f"its loop takes {here} of the {planned} that the noise scheduler planned, and leaves some out in between"
    else:
        return
    raise UnsupportedModel(
        f"{name} cannot be recorded: {why}. Accelerate it with a rule, which needs no recording: "
        'diffcache.accelerate(pipe, "auto").'
    )


def _elsewhere(trajectory: Trajectory) -> bool:
    """Return whether the last step of a loop that ends early is known to have another time than the grid has there."""
    given = trajectory.steps[-1].timestep
    if not isinstance(given, (Tensor, int, float)):
        return False
    here, there = float(torch.as_tensor(given).flatten()[0]), float(trajectory.timesteps[trajectory.end - 1])
    return abs(here - there) > SAME_TIME * abs(there)


def _order(trajectory: Trajectory) -> None:
    """Put the calls of each step into the order in which the run met their branches, where these have names."""
    numbers: dict[str, int] = {}
    for step in trajectory.steps:
        for call in step.calls:
            numbers.setdefault(call.branch, len(numbers))
        if all(call.branch for call in step.calls):
            step.calls.sort(key=lambda call: numbers[call.branch])


def _identify(trajectory: Trajectory, *results: Any) -> None:
    """Find how a loop without a noise scheduler combines state and output, by least squares at each step.

    Args:
        trajectory: The recording. Its noise scheduler is replaced by a ``Clock`` with the weights.
        results: Values that may be the last state, in order of preference.
    """
    last = trajectory.steps[-1]
    ends = [Output.of(value).tensors[:1] for value in results]
    last.result = next((t.detach().clone() for (t,) in filter(None, ends) if _alike(t, last.state)), None)
    moves = torch.zeros(len(trajectory.steps), 2, dtype=torch.float64)
    for i, step in enumerate(trajectory.steps):
        if step.model_output is not None and step.result is not None and _alike(step.model_output, step.state):
            x, f, y = (
                t.double().flatten().cpu() for t in (step.state, step.model_output, step.result) if t is not None
            )
            moves[i] = torch.linalg.lstsq(torch.stack([x, f], 1), y[:, None]).solution[:, 0]
            missed = float((moves[i, 0] * x + moves[i, 1] * f - y).norm())
            rounding = torch.finfo(step.result.dtype).eps * float(y.norm())
            if missed > EXPLAINED * float((y - x).norm()) + rounding:  # the move may be small next to the state
                step.result = None
                trajectory.obstacle = trajectory.obstacle or (
                    f"step {i} of the loop makes something else of the state and the network's output than a weighted "
                    "sum, as a loop does that draws noise, clips, or evaluates the network in stages."
                )
    trajectory.scheduler = host.Clock(trajectory.timesteps, moves=moves, config=trajectory.scheduler.config)


def _alike(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape


def record_all(
    pipe: Any, calls: Sequence[Mapping[str, Any]], done: Callable[[], None] = lambda: None
) -> list[Trajectory]:
    """``record`` for each call; ``done`` is called after each (a progress bar).

    Generators in the calls are drawn from as in any run, one shared by several calls too, and left at the end where
    they were found: the same calls, run again, repeat the recorded runs.
    """
    trajectories = []
    with restored_generators(calls):
        for call in calls:
            trajectories.append(record(pipe, call))
            done()
    return trajectories


def _kept(tensor: Tensor, *known: Tensor | None) -> Tensor:
    """Return a copy of ``tensor``, or the known tensor that equals it."""
    for other in known:
        if other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor):
            return other
    return tensor.detach().clone()


class _Recorder(host.LoopObserver):
    def __init__(self, pipe: Any, inside: Inside) -> None:
        self.inside = inside
        self.denoisers = host.denoisers(pipe)
        self.feeders = [
            part for name, part in host.parts(pipe).items() if isinstance(part, nn.Module) and name.startswith(FEEDERS)
        ]
        self.writes_arguments = host.traits(pipe).writes_arguments
        self.host = host.LoopWatcher(pipe, self)
        self.trajectories: list[Trajectory] = []
        self.result: Any = None  # result of a loop that passes it
        self.grids = 0  # how many grids of the noise scheduler the last loop ran on
        self._run: host.LoopRun | None = None
        self._step_layer = contextlib.ExitStack()
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._clock = 0.0  # when the loop, or what of it is the pipeline's own, went on

    @contextlib.contextmanager
    def attached(self) -> Any:
        with contextlib.ExitStack() as undo:
            for name, module in self.denoisers.items():
                undo.callback(layer(*inner_spot(module), self._denoiser(name, module)))
            for module in self.feeders:
                undo.callback(layer(module, "forward", self._feeder(module)))
            undo.callback(self._step_layer.close)
            undo.callback(self.host.detach)
            self.host.attach()
            yield

    def loop_began(self, run: host.LoopRun) -> None:
        self._step_layer.close()
        entered = run is self._run and any(step.calls for step in self.trajectories[-1].steps)
        self.grids, self._run = self.grids + 1 if entered else 1, run
        scheduler = copy.deepcopy(run.scheduler)
        scales = host.guidance_scales(self.host.pipe)
        self.trajectories.append(Trajectory(scheduler, run.start, run.timesteps.clone(), scales, [LoopStep()]))
        if not run.forwards:
            self._step_layer.callback(layer(run.scheduler, "step", self._step, copies=True))
        self._go_on()

    def loop_ended(self, run: host.LoopRun) -> None:
        self._pause()
        self.result = run.result

    def _pause(self) -> None:
        """Stop the clock for the work of the pipeline in the loop, outside the denoiser."""
        wait()
        self.trajectories[-1].rest_s += time.perf_counter() - self._clock

    def _go_on(self) -> None:
        wait()
        self._clock = time.perf_counter()

    def _feeder(self, module: nn.Module) -> Callable[..., Any]:
        main = host.main_input(module)

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            if self.host.run is not None:
                # The tensors themselves, not copies: the denoiser's arguments are recognised by identity.
                self.trajectories[-1].steps[-1].feeds.append(
                    Forward(module, args, kwargs, main, Output.of(value).tensors)
                )
            return value

        return around

    def _denoiser(self, name: str, module: nn.Module) -> Callable[..., Any]:
        main, main_of = host.main_input(module), host.main_of(module)
        time_of, conditions_of = host.time_of(module), host.conditions_of(module)

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = self.host.forward(name, time_of(args, kwargs), lambda: conditions_of(args, kwargs))
            if found is None:
                return inner(*args, **kwargs)
            self._pause()
            run, place = found
            steps = self.trajectories[-1].steps
            x = main_of(args, kwargs)
            branch = self.host.branch(name)
            if run.forwards:
                self._count(steps, x, place.step)
            else:
                self._enter(steps, place.step - run.start)
            keep = self._copied if self.writes_arguments else _repacked
            given_args, given_kwargs = keep(args, kwargs)
            with self.inside(module, len(steps) - 1, len(steps[-1].calls), x):
                wait()
                began = time.perf_counter()
                value = inner(*args, **kwargs)
                wait()
                seconds = time.perf_counter() - began
            outputs = tuple(t.detach().clone() for t in Output.of(value).tensors)
            steps[-1].calls.append(DenoiserCall(module, given_args, given_kwargs, main, outputs, seconds, branch))
            if run.forwards == 1:
                steps[-1].model_output = outputs[0] if len(steps[-1].calls) == 1 else None
            self._go_on()
            return value

        return around

    def _copied(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return copies of the arguments, because a user's loop may write into them. Unchanged tensors share a copy."""

        def copied(tensor: Tensor) -> Tensor:
            version = -1 if tensor.is_inference() else tensor._version  # rises when the tensor is written to
            known = self._copies.get((id(tensor), version)) if version >= 0 else None
            if known is None:
                known = tensor, tensor.detach().clone()  # the original too: its id must stay its own
                self._copies[id(tensor), version] = known
            return known[1]

        return pytree.tree_map_only(Tensor, copied, (args, kwargs))

    def _count(self, steps: list[LoopStep], x: Any, step: int) -> None:
        """Record the state of a loop without a noise scheduler: the network's next input is the state after a step."""
        if step >= len(steps):
            steps[-1].result = x.detach().clone()
            steps.append(LoopStep())
        if not steps[-1].calls:
            steps[-1].state, steps[-1].timestep = x.detach().clone(), len(steps) - 1

    def _enter(self, steps: list[LoopStep], index: int) -> None:
        """Make the step ``index`` of the loop the last of ``steps``, which is filled by what follows.

        The noise scheduler ends a step, unless the progress bar shows the end: some pipelines step copies of it.
        """
        if index == len(steps):
            steps.append(LoopStep())
            self.trajectories[-1].obstacle = "the pipeline steps copies of its noise scheduler."
        elif index == len(steps) - 2 and not steps[-1].calls:
            self._reopen(steps)

    def _reopen(self, steps: list[LoopStep]) -> None:
        """Continue the step before: the loop calls ``scheduler.step`` several times in it."""
        fresh = steps.pop()
        steps[-1].feeds += fresh.feeds
        steps[-1].calls += fresh.calls
        self.trajectories[-1].obstacle = "the pipeline calls scheduler.step several times in one step of its loop."

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._pause()
        assert self.host.run is not None
        steps = self.trajectories[-1].steps
        signature = inspect.signature(self.host.run.scheduler.step)  # through all layers
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        extra = {
            k: with_copied_generators(v)
            for k, v in given.items()
            if k not in ("model_output", "timestep", "sample", "return_dict")
        }
        drawing = given["sample"].device.type in ("cpu", "cuda") and "generator" in signature.parameters
        if drawing and extra.get("generator") is None:
            extra["generator"] = copy_of_global_generator(
                given["sample"].device
            )  # the noise scheduler then draws noise from it
        if self.host.run.steps_again(given["timestep"]) and len(steps) > 1 and steps[-1].result is None:
            self._reopen(steps)
        self._go_on()
        value = inner(*args, **kwargs)
        self._pause()
        step = steps[-1]
        step.model_output = _kept(given["model_output"], *(t for call in step.calls for t in call.outputs))
        step.timestep = given["timestep"]
        step.state = _kept(given["sample"], steps[-2].result if len(steps) > 1 else None)
        step.extra = extra
        step.result = Output.of(value).tensors[0].detach().clone()
        steps.append(LoopStep())
        self._go_on()
        return value


def _repacked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments in new lists and dictionaries, with the same tensors.

    A network may empty a list that it is given: HunyuanDiT takes the samples of its ControlNet off the end of one.
    """
    return pytree.tree_map(lambda leaf: leaf, (args, kwargs))
