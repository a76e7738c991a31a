"""What a diffusers pipeline does around its denoiser: where its loop begins and ends, which step it is in.

The one file that knows pipeline habits. Nothing here needs a ``cache_context`` (most pipelines open none); the facts
come from three methods, layered on objects, never on classes:

* ``pipe.progress_bar`` brackets the sampling loop of all but two diffusers pipelines, in both of its forms
  (``with pipe.progress_bar(total=n)`` and ``for t in pipe.progress_bar(timesteps)``), and closes on exceptions too;
* ``scheduler.step`` of the scheduler in use, layered for the length of one loop, ends each step;
* ``pipe.maybe_free_model_hooks`` is the last thing a pipeline calls.

A pipeline that shares its denoiser with another is therefore told apart: its own loop is open, or it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffcache.errors import AlreadyAccelerated, UnsupportedModel
from diffcache.patch import Undo, layer

DENOISER_NAMES = ("transformer", "unet", "prior", "decoder")
GUIDER_METHODS = ("prepare_inputs", "prepare_inputs_from_block_state")


@dataclass
class Run:
    """One pass of the sampling loop.

    steps      iterations the noise scheduler planned (length of its timesteps)
    start      first iteration this run enters: above 0 for image-to-image and its kin
    index      the iteration now
    timesteps  the noise scheduler's own tensor [steps]
    branches   what a guider calls the branches of this step, in the order of their forwards
    numbers    by name, in the order in which the run met them
    again      called when the loop goes back: a pipeline may run it several times over, chunk by chunk
    """

    scheduler: Any
    timesteps: Tensor
    start: int
    index: int
    calls: dict[str, int] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    state: Any = None  # whatever ``begin`` wants to find again
    undo: Undo = lambda: None
    again: Callable[[], None] = lambda: None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def next_call(self, denoiser: str) -> int:
        """Which branch the forward of ``denoiser`` that is beginning serves: 0, 1, … Where no guider gives them names,
        branches come in a fixed order within a step."""
        ordinal = self.calls.get(denoiser, 0)
        self.calls[denoiser] = ordinal + 1
        name = self.branches[ordinal] if ordinal < len(self.branches) else str(ordinal)
        return self.numbers.setdefault(name, len(self.numbers))

    def step_done(self, timestep: Any) -> None:
        # Iterating a tensor yields views, so the address of ``timestep`` tells its index without reading the device.
        here = _position(timestep, self.timesteps)
        if here is not None and here + 1 < self.index:  # one step may be taken twice
            self.again()
        self.index = (self.index if here is None else here) + 1
        self.calls.clear()
        self.branches.clear()


class Host:
    """Watches one pipeline. ``begin(run)`` and ``end(run)`` are called around each of its sampling loops, ``missed()``
    after a call of the pipeline in which none was seen."""

    def __init__(
        self,
        pipe: Any,
        begin: Callable[[Run], None],
        end: Callable[[Run], None],
        missed: Callable[[], None] = lambda: None,
    ) -> None:
        # Weak: what hangs on a pipeline must not keep it alive once its last user drops it.
        self._pipe = weakref.ref(pipe)
        self._begin, self._end, self._missed = begin, end, missed
        self._open = threading.local()
        self._undo = contextlib.ExitStack()

    @property
    def pipe(self) -> Any:
        return self._pipe()

    @property
    def run(self) -> Run | None:
        """The loop this thread is in, or None."""
        return getattr(self._open, "run", None)

    def attach(self) -> None:
        if hasattr(self.pipe, "progress_bar"):
            self._undo.callback(layer(self.pipe, "progress_bar", self._progress_bar))
            self._undo.callback(layer(self.pipe, "maybe_free_model_hooks", self._last_call))
        for block in looping_blocks(self.pipe):  # two pipelines may share them
            self._undo.callback(layer(block, "progress_bar", self._progress_bar, copies=True))
            self._undo.callback(layer(block, "loop_step", self._loop_step, copies=True))

    def detach(self) -> None:
        self.close()
        self._undo.close()

    def open(self, scheduler: Any, start: int) -> Run:
        self.close()  # an interrupted run that nobody closed
        run = Run(scheduler, scheduler.timesteps, start, start)
        self._begin(run)
        undo = contextlib.ExitStack()
        undo.callback(layer(scheduler, "step", self._step, copies=True))
        for guider in guiders(self.pipe):
            for method in GUIDER_METHODS:
                undo.callback(layer(guider, method, self._prepare, copies=True))
        run.undo = undo.close
        self._open.run = run
        self._open.seen = True
        return run

    def close(self, run: Run | None = None) -> None:
        """End ``run``, or whichever is open; a run that is over already stays over."""
        current = self.run
        if current is None or (run is not None and run is not current):
            return
        self._open.run = None
        current.undo()
        self._end(current)

    def _progress_bar(
        self, inner: Callable[..., Any], iterable: Any = None, total: int | None = None, **more: Any
    ) -> Any:
        return _Bar(self, inner(iterable=iterable, total=total, **more), iterable, total)

    def _loop_step(self, inner: Callable[..., Any], components: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a modular pipeline: its bar does not know whose loop it is, its steps do. Those that are given no time are
        chunks, with the sampling loop inside: it may have no bar of its own."""
        bar: _Bar | None = getattr(self._open, "bar", None)
        own, chunk = components is self.pipe, "t" not in kwargs
        if bar is not None and own and not chunk:
            bar.begin()
            self._open.bar = None
        result = inner(components, *args, **kwargs)
        if own and chunk and not getattr(self._open, "seen", False):
            self._missed()
        return result

    def wait_for_step(self, bar: _Bar | None) -> None:
        self._open.bar = bar

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        run = self.run
        if run is not None:
            run.step_done(args[1] if len(args) > 1 else kwargs.get("timestep"))
        return result

    def _prepare(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of a guider: it may leave a branch out at some steps, and those behind it move up."""
        batches = inner(*args, **kwargs)
        run = self.run
        if run is not None:
            names = [getattr(batch, "__guidance_identifier__", "") for batch in batches]
            run.branches += [name for name in names if name not in run.branches]  # two guiders may share forwards
        return batches

    def _last_call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.close()
        if not getattr(self._open, "seen", False):
            self._missed()
        self._open.seen = False
        return inner(*args, **kwargs)


class _Bar:
    """A progress bar that is the sampling loop while its ``with`` block or its iteration lasts."""

    def __init__(self, host: Host, bar: Any, iterable: Any, total: int | None) -> None:
        self._host, self._bar, self._iterable, self._total = host, bar, iterable, total
        self._run: Run | None = None

    def begin(self) -> None:
        scheduler = self._host.pipe.scheduler
        self._run = self._host.open(scheduler, _start(scheduler, self._total))

    def __enter__(self) -> Any:
        if hasattr(self._host.pipe, "progress_bar"):
            self.begin()
        else:
            self._host.wait_for_step(self)
        return self._bar.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self._host.wait_for_step(None)
        if self._run is not None:
            self._host.close(self._run)
        return self._bar.__exit__(*exception)

    def __iter__(self) -> Iterator[Any]:
        scheduler = self._host.pipe.scheduler
        start = _start_of(self._iterable, scheduler.timesteps)
        run = None if start is None else self._host.open(scheduler, start)
        try:
            yield from self._bar
        finally:
            if run is not None:
                self._host.close(run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def looping_blocks(pipe: Any) -> list[Any]:
    """Of a modular pipeline: its blocks whose ``progress_bar`` is the sampling loop, and ``loop_step`` an iteration."""
    found, left = [], [getattr(pipe, "_blocks", None)]
    while left:
        block = left.pop()
        if hasattr(block, "progress_bar") and hasattr(block, "loop_step"):
            found.append(block)
        left += (getattr(block, "sub_blocks", None) or {}).values()
    return found


def guiders(pipe: Any) -> list[Any]:
    """What says anew at every step which branches there are: most modular pipelines have one, or two."""
    return [part for part in pipe.components.values() if hasattr(part, GUIDER_METHODS[-1])]


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks that ``pipe`` calls at every step, by component name."""
    components = getattr(pipe, "components", None)
    looks = hasattr(pipe, "scheduler") and (hasattr(pipe, "progress_bar") or looping_blocks(pipe))
    if not isinstance(components, dict) or not looks:
        raise UnsupportedModel(
            f"accelerate was asked for a {type(pipe).__name__}. A diffusers pipeline is needed: an object with a "
            "scheduler, components and a progress_bar. Pass the pipeline, not its transformer."
        )
    found = {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and any(name == n or name.startswith(n + "_") for n in DENOISER_NAMES)
    }
    if not found or pipe.scheduler is None:
        raise UnsupportedModel(
            f"{type(pipe).__name__} has no denoiser to accelerate. Components found: {', '.join(sorted(components))}; "
            f"looked for: {', '.join(DENOISER_NAMES)} and a scheduler."
        )
    return found


def demand_no_other_cache(pipe: Any) -> None:
    """Raise AlreadyAccelerated if a cache of diffusers' own, or of cache-dit, is on: both would skip, each unaware of
    what the other left out."""
    for name, module in denoisers(pipe).items():
        network = unwrapped(module)
        whose = None
        if getattr(network, "is_cache_enabled", False) is True:
            config = type(getattr(network, "_cache_config", None)).__name__
            whose = f"a cache of diffusers' own ({config})", f"pipe.{name}.disable_cache()"
        elif getattr(network, "_is_cached", False) is True:
            whose = "a cache of cache-dit", "cache_dit.disable_cache(pipe)"
        if whose:
            raise AlreadyAccelerated(
                f"the {name} of this {type(pipe).__name__} has {whose[0]} on. Call {whose[1]} first: two caches would "
                "skip work unaware of each other."
            )


def in_parts(pipe: Any) -> list[str]:
    """The denoisers that several processes run together, each its part of the tokens or of the weights (diffusers'
    ``enable_parallelism``). They wait for each other inside a forward: none may skip what the others compute."""
    return [n for n, m in denoisers(pipe).items() if getattr(unwrapped(m), "_parallel_config", None) is not None]


def demand_one_process(pipe: Any) -> None:
    """Raise UnsupportedModel where several processes run a denoiser together: each would see its part of it, and end
    its search at another moment than the others."""
    for name in in_parts(pipe):
        raise UnsupportedModel(
            f"the {name} of this {type(pipe).__name__} is run by several processes together (enable_parallelism). "
            "Measure and optimize before enable_parallelism, in one process or with a share of the calls in each; the "
            "schedule that comes of it serves the parallel pipeline too."
        )


def unwrapped(module: Any) -> Any:
    """What ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def main_input(module: nn.Module) -> str:
    """Name of the first parameter of the class's forward: what lies on the object may be anybody's wrapper."""
    kind: Any = type(unwrapped(module))
    return next(iter(list(inspect.signature(kind.forward).parameters)[1:]), "")


def class_name(module: Any) -> str:
    """The network's class; a compiled module answers for what it wraps."""
    return type(unwrapped(module)).__name__


def config_digest(module: Any) -> str:
    """sha256 of a diffusers object's configuration, private entries left out."""
    config = getattr(unwrapped(module), "config", {})
    public = {str(k): v for k, v in dict(config).items() if not str(k).startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=repr).encode()).hexdigest()


def prediction_type(scheduler: Any) -> str | None:
    value = dict(scheduler.config).get("prediction_type")
    return None if value is None else str(value)


def batches_guidance(pipe: Any) -> bool:
    """Whether the pipeline says that the run in progress is guided; False where it does not tell."""
    return getattr(pipe, "do_classifier_free_guidance", False) is True


def guidance_scale(pipe: Any) -> float | None:
    """The guidance scale of the run in progress, where the pipeline tells."""
    told = [getattr(pipe, name, None) for name in ("_guidance_scale", "_true_cfg_scale")]
    told += [getattr(guider, "guidance_scale", None) for guider in guiders(pipe)]
    return next((float(value) for value in told if isinstance(value, (int, float))), None)


def _start(scheduler: Any, total: int | None) -> int:
    """First iteration of the loop: what the pipeline told the scheduler, else what its progress bar leaves out."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    planned = getattr(scheduler, "num_inference_steps", None)
    if total is None or planned is None or total >= planned:
        return 0
    return min((int(planned) - total) * int(getattr(scheduler, "order", 1)), len(scheduler.timesteps) - 1)


def _start_of(iterable: Any, timesteps: Tensor) -> int | None:
    """First iteration of a loop over ``iterable``; None if these are not the noise scheduler's timesteps."""
    if isinstance(iterable, Tensor) and iterable.device == timesteps.device:
        return _position(iterable, timesteps)
    length = len(iterable) if hasattr(iterable, "__len__") else -1
    moved = isinstance(iterable, Tensor) and 0 < length <= len(timesteps)
    return len(timesteps) - length if moved or length == len(timesteps) else None


def _position(timestep: Any, timesteps: Tensor) -> int | None:
    """Index of a view in the tensor it was taken from, by address; None for anything else."""
    if not isinstance(timestep, Tensor) or (timestep.dtype, timestep.device) != (timesteps.dtype, timesteps.device):
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return int(offset) if rest == 0 and 0 <= offset < len(timesteps) else None
