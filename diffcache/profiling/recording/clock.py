"""Time the sampling loop of a pipeline, without encoders and decoders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from diffcache import host


class _Clock(host.LoopObserver):
    """Times loops."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began: list[float] = []

    def loop_began(self, run: host.LoopRun) -> None:
        wait()
        self._began.append(time.perf_counter())

    def loop_ended(self, run: host.LoopRun) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._began.pop())


@contextlib.contextmanager
def loop_clock(pipe: Any) -> Iterator[list[float]]:
    """Collect the seconds of every sampling loop that ``pipe`` runs in the ``with`` block. It waits for the device."""
    clock = _Clock()
    watcher = host.LoopWatcher(pipe, clock)
    watcher.attach()
    try:
        yield clock.seconds
    finally:
        watcher.detach()


def wait() -> None:
    """Wait until the device has done all its work, so that a clock that is read next counts it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
