"""Calibrations of the tiny pipelines, recorded once per process, and what the real loop makes of a schedule."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pipelines import ALL, TINY, fresh, with_scheduler
from torch import Tensor

from diffcache.patch import layer
from diffcache.profiling import Calibration

CALLS, BATCH = 2, 2  # calls of a calibration, samples in each


def calls(name: str, pipe: Any) -> list[dict[str, Any]]:
    """Calls of several samples each, a generator per sample, no noise twice."""
    return [
        TINY[name].call(pipe, batch=BATCH)
        | {"generator": [torch.Generator().manual_seed(10 * k + s) for s in range(BATCH)]}
        for k in range(CALLS)
    ]


@functools.cache
def calibration(name: str, noise_scheduler: str = "") -> Calibration:
    pipe = fresh(name)
    if noise_scheduler:
        with_scheduler(pipe, noise_scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some pipelines draw from the global generator too
        return Calibration.record(pipe, calls(name, pipe))


def recorded(name: str) -> Calibration:
    """A new calibration of one call with one sample."""
    pipe = fresh(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Calibration.record(pipe, [{**ALL[name].call(pipe), "generator": torch.Generator().manual_seed(0)}])


def final_states(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """What the last ``scheduler.step`` of each call returned, with the global generator as ``calibration`` set it."""
    ends = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for call in calls:
            states: list[Tensor] = []
            undo = _listen(pipe, states)
            try:
                pipe(**call)
            finally:
                undo()
            ends.append(states[-1])
    return ends


def _listen(pipe: Any, states: list[Tensor]) -> Any:
    """Collects the results of ``scheduler.step``, of a scheduler that the pipeline makes for the call as well."""

    def bar(inner: Any, *args: Any, **kwargs: Any) -> Any:
        undo.append(layer(pipe.scheduler, "step", step, copies=True))
        return inner(*args, **kwargs)

    def step(inner: Any, *args: Any, **kwargs: Any) -> Any:
        value = inner(*args, **kwargs)
        states.append(value[0] if isinstance(value, tuple) else value.prev_sample)
        return value

    undo = [layer(pipe, "progress_bar", bar)]
    return lambda: [off() for off in undo]
