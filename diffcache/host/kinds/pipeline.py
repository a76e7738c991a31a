"""Diffusers pipelines: the progress bar is the sampling loop, ``scheduler.step`` ends each step.

* ``pipe.progress_bar`` brackets the sampling loop of all but two diffusers pipelines, in both of its forms
  (``with pipe.progress_bar(total=n)`` and ``for t in pipe.progress_bar(timesteps)``), and closes on exceptions too.
* ``scheduler.step`` of the noise scheduler in use, wrapped for the length of one loop, ends each step.
* ``pipe.maybe_free_model_hooks`` is the last method that a pipeline calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffcache.errors import UnsupportedModel
from diffcache.host.arguments import GRIDS, STEPS, Parameters, is_count, parameters_of, planned
from diffcache.host.call_values import brings_noise, check_values
from diffcache.host.frames import calling_pipeline
from diffcache.host.guidance import values_of_pipeline
from diffcache.host.inspection import DENOISER_NAMES, GUIDER_METHODS, guiders, is_denoiser_name, is_pipeline
from diffcache.host.kinds._kind import Kind, LoopWatch, unsupported
from diffcache.host.loop_run import position, start_of
from diffcache.host.traits import Traits
from diffcache.patch import Undo, layer

if TYPE_CHECKING:
    from diffcache.host.loop_run import LoopRun
    from diffcache.host.watcher import LoopWatcher


class Pipeline(Kind):
    """A diffusers pipeline."""

    traits = Traits(
        returns="pictures", metrics=("psnr", "ssim", "latent", "state"), steps_argument=STEPS, swaps_scheduler=True
    )
    allowed = "a diffusers pipeline (an object with a scheduler, components and a progress_bar)"
    example = """\
calls = [{"prompt": prompt, "num_inference_steps": 28, "generator": torch.Generator().manual_seed(seed)}
         for seed, prompt in enumerate(prompts)]"""

    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` has components, a noise scheduler and a progress bar."""
        return is_pipeline(value) and hasattr(value, "progress_bar")

    def denoisers(self, host: Any) -> dict[str, nn.Module]:
        """Return the components with the name of a denoiser."""
        components = host.components
        if not isinstance(components, dict):
            raise unsupported(host)
        found = {
            name: part for name, part in components.items() if isinstance(part, nn.Module) and is_denoiser_name(name)
        }
        if not found or host.scheduler is None:
            raise UnsupportedModel(
                f"{type(host).__name__} has no denoiser to accelerate. Components found: "
                f"{', '.join(sorted(components))}; looked for: {', '.join(DENOISER_NAMES)} and a scheduler."
            )
        return found

    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        """Return a watch on the progress bar."""
        return PipelineWatch(watcher)

    def arguments(self, host: Any) -> Parameters | None:
        """Return the parameters of the class's ``__call__``."""
        return parameters_of(type(host).__call__, leave_out=1)

    def check_values(self, call: Mapping[str, Any], where: str) -> None:
        """Check prompts, sizes, counts, generators and the number of steps."""
        check_values(call, where)

    def noise_of(self, host: Any, seed: int) -> Mapping[str, Any]:
        """Return a generator on the CPU, unless the pipeline takes none."""
        arguments = self.arguments(host)
        takes = arguments is None or "generator" in arguments
        return {"generator": torch.Generator("cpu").manual_seed(seed)} if takes else {}

    def repeats(self, call: Mapping[str, Any]) -> bool:
        """Return whether the call brings its noise, or a generator for it."""
        return brings_noise(call)

    def steps_asked(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return ``num_inference_steps`` of the call, or its default."""
        given = call.get(STEPS)
        if given is None:
            parameter = (self.arguments(host) or {}).get(STEPS)
            given = None if parameter is None or STEPS in call else parameter.default
        return None if given is None or not is_count(given, 1) else int(given)

    def iterations(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return the iterations that the noise scheduler plans; None if the call has its own timesteps or levels."""
        steps = self.steps_asked(host, call)
        if steps is None or any(call.get(name) is not None for name in GRIDS):
            return None
        return planned(host.scheduler, steps)

    def noise_scheduler(self, host: Any) -> Any:
        """Return ``host.scheduler``."""
        return host.scheduler

    def parts(self, host: Any) -> Mapping[str, Any]:
        """Return the components."""
        found: Mapping[str, Any] = host.components
        return found

    def guidance(self, host: Any) -> dict[str, float | None]:
        """Return the guidance settings of the call, of the pipeline and of its guiders."""
        return values_of_pipeline(host)


class PipelineWatch(LoopWatch):
    """Watches the progress bar, which is the sampling loop."""

    def attach(self) -> Iterator[Undo]:
        """Wrap the progress bar, and the last method that the pipeline calls."""
        yield layer(self.host, "progress_bar", self.progress_bar)
        yield layer(self.host, "maybe_free_model_hooks", self._last_method)

    def opened(self, run: LoopRun) -> Iterator[Undo]:
        """Wrap ``scheduler.step``, and the guiders, which name the branches of each step."""
        self.local.seen = True
        yield layer(run.scheduler, "step", self.watcher.step, copies=True)
        for guider in guiders(self.host):
            for method in GUIDER_METHODS:
                yield layer(guider, method, self._prepare, copies=True)

    def outside(self) -> None:
        """Report another pipeline that shares a denoiser."""
        self.watcher.called_by(calling_pipeline())

    def progress_bar(
        self, inner: Callable[..., Any], iterable: Any = None, total: int | None = None, **more: Any
    ) -> Any:
        """Return a progress bar that opens and closes the loop."""
        return Bar(self, inner(iterable=iterable, total=total, **more), iterable, total)

    def entered(self, bar: Bar) -> None:
        """Open the loop when the ``with`` block of a progress bar begins."""
        bar.begin()

    def left(self) -> None:
        """Do nothing when the ``with`` block of a progress bar ends."""

    def _prepare(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Read the names of the branches from a guider.

        A guider may leave a branch out at some steps. The branches after it then come one place earlier.
        """
        batches = inner(*args, **kwargs)
        run = self.watcher.run
        if run is not None:
            names = [getattr(batch, "__guidance_identifier__", "") for batch in batches]
            run.branches += [name for name in names if name not in run.branches]  # two guiders may share forwards
        return batches

    def _last_method(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Close the loop, and report a call in which no loop was seen."""
        self.watcher.close()
        if not getattr(self.local, "seen", False):
            self.watcher.no_loop()
        self.local.seen = False
        return inner(*args, **kwargs)


class Bar:
    """A progress bar that is the sampling loop while its ``with`` block or its iteration lasts."""

    def __init__(self, watch: PipelineWatch, bar: Any, iterable: Any, total: int | None) -> None:
        self._watch, self._bar, self._iterable, self._total = watch, bar, iterable, total
        self._run: LoopRun | None = None

    def begin(self) -> None:
        """Open the loop."""
        scheduler = self._watch.host.scheduler
        self._run = self._watch.watcher.open(scheduler, start_of(scheduler, self._total))

    def __enter__(self) -> Any:
        self._watch.entered(self)
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._watch.left()
        if self._run is not None:
            self._watch.watcher.close(self._run)
        return self._bar.__exit__(*exception)

    def update(self, *args: Any) -> Any:
        """Note that an iteration is over, and update the bar."""
        if self._run is not None and self._run is self._watch.watcher.run:
            self._run.bar_moved()
        return self._bar.update(*args)

    def __iter__(self) -> Iterator[Any]:
        scheduler = self._watch.host.scheduler
        start = _start_of(self._iterable, scheduler.timesteps)
        run = None if start is None else self._watch.watcher.open(scheduler, start)
        try:
            yield from self._bar
        finally:
            if run is not None:
                self._watch.watcher.close(run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _start_of(iterable: Any, timesteps: Tensor) -> int | None:
    """Return the first iteration of a loop over ``iterable``; None if it does not hold the scheduler's timesteps."""
    if isinstance(iterable, Tensor) and iterable.device == timesteps.device:
        return position(iterable, timesteps)
    length = len(iterable) if hasattr(iterable, "__len__") else -1
    moved = isinstance(iterable, Tensor) and 0 < length <= len(timesteps)
    return len(timesteps) - length if moved or length == len(timesteps) else None


KIND = Pipeline()
