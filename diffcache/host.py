"""What a diffusers pipeline does around its denoiser: where its loop begins and ends, which step it is in.

The one file that knows pipeline habits. Nothing here needs a ``cache_context`` (most pipelines open none); the facts
come from three methods, layered on objects, never on classes:

* ``pipe.progress_bar`` brackets the sampling loop of every diffusers pipeline, in both of its forms
  (``with pipe.progress_bar(total=n)`` and ``for t in pipe.progress_bar(timesteps)``); the bracket closes on exceptions too;
* ``scheduler.step`` of the scheduler in use, layered for the length of one loop, ends each step;
* ``pipe.maybe_free_model_hooks`` is the last thing a pipeline calls.

A pipeline that shares its denoiser with another is therefore told apart: its own loop is open, or it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcache.errors import UnsupportedModel
from diffcache.patch import Undo, layer

DENOISER_NAMES = ("transformer", "unet", "prior", "decoder")


@dataclass
class Run:
    """One pass of the sampling loop.

    steps      iterations the noise scheduler planned (length of its timesteps)
    start      first iteration this run enters: above 0 for image-to-image and its kin
    index      the iteration now
    timesteps  the noise scheduler's own tensor [steps]
    """

    scheduler: Any
    timesteps: Tensor
    start: int
    index: int
    calls: dict[int, int] = field(default_factory=dict)
    state: Any = None  # whatever ``begin`` wants to find again
    undo: Undo = lambda: None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def next_call(self, denoiser: nn.Module) -> int:
        """Which forward of ``denoiser`` within this step is beginning: 0, 1, …; guidance branches come in a fixed order."""
        ordinal = self.calls.get(id(denoiser), 0)
        self.calls[id(denoiser)] = ordinal + 1
        return ordinal

    def step_done(self, timestep: Any) -> None:
        # Iterating a tensor yields views, so the address of ``timestep`` tells its index without reading the device.
        here = _position(timestep, self.timesteps)
        self.index = (self.index if here is None else here) + 1
        self.calls.clear()


class Host:
    """Watches one pipeline. ``begin(run)`` and ``end(run)`` are called around each of its sampling loops."""

    def __init__(self, pipe: Any, begin: Callable[[Run], None], end: Callable[[Run], None]) -> None:
        self.pipe = pipe
        self._begin, self._end = begin, end
        self._open = threading.local()
        self._undo = contextlib.ExitStack()

    @property
    def run(self) -> Run | None:
        """The loop this thread is in, or None."""
        return getattr(self._open, "run", None)

    def attach(self) -> None:
        self._undo.callback(layer(self.pipe, "progress_bar", self._progress_bar))
        self._undo.callback(layer(self.pipe, "maybe_free_model_hooks", self._last_call))

    def detach(self) -> None:
        self.close()
        self._undo.close()

    def open(self, scheduler: Any, total: int | None) -> Run:
        self.close()  # an interrupted run that nobody closed
        timesteps = scheduler.timesteps
        start = _start(scheduler, len(timesteps), total)
        run = Run(scheduler, timesteps, start, start)
        self._begin(run)
        run.undo = layer(scheduler, "step", self._step, copies=True)
        self._open.run = run
        return run

    def close(self, run: Run | None = None) -> None:
        """End ``run``, or whichever is open; a run that is over already stays over."""
        current = self.run
        if current is None or (run is not None and run is not current):
            return
        self._open.run = None
        current.undo()
        self._end(current)

    def _progress_bar(self, inner: Callable[..., Any], iterable: Any = None, total: int | None = None) -> Any:
        bar = inner(iterable=iterable, total=total)
        if iterable is None:
            return _Bracket(self, bar, total)
        length = len(iterable) if hasattr(iterable, "__len__") else None
        return self._iterate(bar, length)

    def _iterate(self, bar: Any, length: int | None) -> Iterator[Any]:
        scheduler = self.pipe.scheduler
        run = self.open(scheduler, _iterations_to_steps(scheduler, length))
        try:
            yield from bar
        finally:
            self.close(run)

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        run = self.run
        if run is not None:
            run.step_done(args[1] if len(args) > 1 else kwargs.get("timestep"))
        return result

    def _last_call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.close()
        return inner(*args, **kwargs)


class _Bracket:
    """A progress bar whose ``with`` block is the sampling loop."""

    def __init__(self, host: Host, bar: Any, total: int | None) -> None:
        self._host, self._bar, self._total = host, bar, total
        self._run: Run | None = None

    def __enter__(self) -> Any:
        self._run = self._host.open(self._host.pipe.scheduler, self._total)
        return self._bar.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self._host.close(self._run)
        return self._bar.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks that ``pipe`` calls at every step, by component name."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict) or not hasattr(pipe, "scheduler") or not hasattr(pipe, "progress_bar"):
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


def class_name(module: Any) -> str:
    """The network's class; a compiled module answers for what it wraps."""
    return type(getattr(module, "_orig_mod", module)).__name__


def config_digest(module: Any) -> str:
    """sha256 of a diffusers object's configuration, private entries left out."""
    config = getattr(getattr(module, "_orig_mod", module), "config", {})
    public = {str(k): v for k, v in dict(config).items() if not str(k).startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=repr).encode()).hexdigest()


def prediction_type(scheduler: Any) -> str | None:
    value = dict(scheduler.config).get("prediction_type")
    return None if value is None else str(value)


def guidance_scale(pipe: Any) -> float | None:
    """The guidance scale of the run in progress, where the pipeline tells."""
    for name in ("_guidance_scale", "_true_cfg_scale"):
        value = getattr(pipe, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _start(scheduler: Any, steps: int, total: int | None) -> int:
    """First iteration of the loop: what the pipeline told the scheduler, else what its progress bar leaves out."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    planned = getattr(scheduler, "num_inference_steps", None)
    if total is None or planned is None or total >= planned:
        return 0
    return min((planned - total) * int(getattr(scheduler, "order", 1)), steps - 1)


def _iterations_to_steps(scheduler: Any, length: int | None) -> int | None:
    """The iterable form counts iterations; ``_start`` wants inference steps."""
    planned = getattr(scheduler, "num_inference_steps", None)
    if length is None or planned is None:
        return None
    skipped = len(scheduler.timesteps) - length
    return int(planned - skipped // int(getattr(scheduler, "order", 1)))


def _position(timestep: Any, timesteps: Tensor) -> int | None:
    """Index of a view in the tensor it was taken from, by address; None for anything else."""
    if not isinstance(timestep, torch.Tensor) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return offset if rest == 0 and 0 <= offset < len(timesteps) else None
