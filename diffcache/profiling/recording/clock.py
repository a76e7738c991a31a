"""Wall-clock of a pipeline's sampling loop alone: encoders and decoders stay out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from diffcache import host


@contextlib.contextmanager
def loop_clock(pipe: Any) -> Iterator[list[float]]:
    """Collects the seconds of every sampling loop that ``pipe`` runs inside the block; the device is waited for."""
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
    """Until the device has done what was asked of it, so that a clock read next tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
