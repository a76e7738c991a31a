"""Measure the wall-clock time of a pipeline's sampling loop, without encoders and decoders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from diffcache import host


@contextlib.contextmanager
def loop_clock(pipe: Any) -> Iterator[list[float]]:
    """Collect the seconds of every sampling loop that ``pipe`` runs in the block, until the device has finished."""
    seconds: list[float] = []
    began: list[float] = []

    def begin(run: host.Run) -> None:
        wait()
        began.append(time.perf_counter())

    def end(run: host.Run) -> None:
        wait()
        seconds.append(time.perf_counter() - began.pop())

    watcher = host.Host(pipe, begin, end)
    watcher.attach()
    try:
        yield seconds
    finally:
        watcher.detach()


def wait() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
