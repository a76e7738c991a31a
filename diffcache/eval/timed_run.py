"""One run of a pipeline, watched from outside: seconds, operations, memory, states. No cache is asked for any of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.patch import layer
from diffcache.profiling.recording import loop_clock, wait, with_copied_generators

ACTIONS = ("action_pred", "action")
OUTPUTS = ("images", "frames", "videos", "audios", "audio", "sample", "latents")


@dataclass(slots=True)
class TimedRun:
    """What one call gave and took.

    output      float64-safe numpy: pictures [N, H, W, 3] or videos [N, F, H, W, 3] in 0..1, audio [N, …], or latents
    loop_s      seconds of the sampling loop (the denoiser, and what a cache does around it); all loops of the call
    pipeline_s  seconds of the whole call: encoders and decoders too
    peak_bytes  most memory on the GPU at one time; None on a CPU
    states      after each step, float32 [steps, N, …], where asked for
    latent      the last state, float32, None where the pipeline's noise scheduler makes no steps
    flops       of the sampling loop, where asked for
    """

    output: np.ndarray
    loop_s: float
    pipeline_s: float
    peak_bytes: int | None = None
    states: list[np.ndarray] = field(default_factory=list)
    latent: np.ndarray | None = None
    flops: int | None = None


def watched(pipe: Any, call: Mapping[str, Any], *, closely: bool = False) -> TimedRun:
    """``pipe(**call)``. Generators in the call are left where they stand. ``closely``: count operations and keep every
    state, which costs time: its seconds mean nothing."""
    call = {name: with_copied_generators(value) for name, value in call.items()}
    on_gpu = torch.cuda.is_available()
    states: list[Tensor] = []
    counter = _Counter(pipe) if closely else contextlib.nullcontext()
    with loop_clock(pipe) as loops, _states(pipe, states, every=closely), counter as flops, torch.no_grad():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        wait()
        began = time.perf_counter()
        result = pipe(**call)
        wait()
        seconds = time.perf_counter() - began
    kept = [_numpy(state) for state in states]
    return TimedRun(
        output=output_of(result),
        loop_s=sum(loops),
        pipeline_s=seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        states=kept if closely else [],
        latent=kept[-1] if kept else None,
        flops=flops[0] if flops else None,
    )


def output_of(result: Any) -> np.ndarray:
    """The first thing a pipeline returns, as numpy [N, …]."""
    if isinstance(result, Mapping):  # a policy's
        result = next((result[name] for name in ACTIONS if name in result), next(iter(result.values())))
    found = next((getattr(result, name) for name in OUTPUTS if getattr(result, name, None) is not None), None)
    if found is None:
        found = result[0] if isinstance(result, tuple) else result
    if isinstance(found, Tensor):
        return _numpy(found)
    if isinstance(found, np.ndarray):
        return found
    return np.stack([_array(one) for one in found])


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return _numpy(value)
    if isinstance(value, (list, tuple)):
        return np.stack([_array(one) for one in value])
    array = np.asarray(value)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy())


@contextlib.contextmanager
def _states(pipe: Any, kept: list[Tensor], *, every: bool) -> Iterator[None]:
    """Collects what the noise scheduler's steps return; only the last one unless ``every``."""

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        state = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if isinstance(state, Tensor):
            if not every:
                kept.clear()
            kept.append(state.detach().clone())
        return result

    off = layer(host.noise_scheduler(pipe), "step", around, copies=True)
    try:
        yield
    finally:
        off()


class _Counter:
    """Operations of everything that runs within the sampling loops."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._total = [0]

    def __enter__(self) -> list[int]:
        from torch.utils.flop_counter import FlopCounterMode

        total = self._total

        class Observer(host.LoopObserver):
            def loop_began(self, run: host.LoopRun) -> None:
                self.mode = cast(Any, FlopCounterMode(display=False))
                self.mode.__enter__()

            def loop_ended(self, run: host.LoopRun) -> None:
                self.mode.__exit__(None, None, None)
                total[0] += self.mode.get_total_flops()

        self._watcher = host.LoopWatcher(self._pipe, Observer())
        self._watcher.attach()
        return self._total

    def __exit__(self, *exception: object) -> None:
        self._watcher.detach()
