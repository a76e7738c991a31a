"""Measure the seconds, operations, memory and states of one run of a pipeline, with or without a cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.profiling.recording import loop_clock, step_states, wait, with_copied_generators

ACTIONS = ("action_pred", "action")
OUTPUTS = ("images", "frames", "videos", "audios", "audio", "sample", "latents")


@dataclass(slots=True)
class TimedRun:
    """The output and the cost of one call.

    Attributes:
        output: Pictures [N, H, W, 3] or videos [N, F, H, W, 3] in 0..1, audio [N, …], or latents, as a numpy array.
        loop_s: Seconds of the sampling loops of the call: the denoiser and the work of a cache.
        pipeline_s: Seconds of the whole call, with encoders and decoders.
        peak_bytes: Most memory on the GPU at one time. None on a CPU.
        states: The state after each step, float32 [steps, N, …], if requested.
        latent: The final state, float32. None if the noise scheduler makes no steps.
        flops: Operations of the sampling loops, if requested.
    """

    output: np.ndarray
    loop_s: float
    pipeline_s: float
    peak_bytes: int | None = None
    states: list[np.ndarray] = field(default_factory=list)
    latent: np.ndarray | None = None
    flops: int | None = None


def watched(pipe: Any, call: Mapping[str, Any], *, closely: bool = False) -> TimedRun:
    """Run ``pipe(**call)`` and return its output and cost.

    Args:
        pipe: The pipeline, which may have a cache.
        call: Arguments of the call. Its generators are copied, so that their states do not change.
        closely: Whether to count operations and keep every state. This takes time, so the seconds are not valid.
    """
    call = {name: with_copied_generators(value) for name, value in call.items()}
    on_gpu = torch.cuda.is_available()
    counter = _Counter(pipe) if closely else contextlib.nullcontext()
    with loop_clock(pipe) as loops, step_states(pipe, every=closely) as states, counter as flops, torch.no_grad():
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
    """Return the first output of a pipeline as numpy [N, …]."""
    if isinstance(result, Mapping):  # policies return a mapping
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


class _Counter:
    """A context that counts the operations inside the sampling loops."""

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
