"""One method on some pictures of a demo model: what it draws, and how long its sampling loop takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffcache import CacheSchedule, accelerated
from diffcache.assets import DemoModel
from diffcache.profiling.recording import loop_clock
from diffcache.schedulers import Rule


@dataclass(frozen=True, slots=True)
class Trial:
    """Pictures [N, H, W, 3] of one method, and the median seconds of its sampling loop."""

    images: np.ndarray
    seconds: float


def trial(
    model: DemoModel,
    shown: tuple[Sequence[str], Sequence[int]],
    steps: int,
    repeats: int,
    schedule: CacheSchedule | Rule | None = None,
) -> Trial:
    with _maybe_accelerated(model.pipe, schedule), loop_clock(model.pipe) as seconds:
        for _ in range(repeats):
            images = model.pipe(**model.call(*shown, steps=steps)).images
    return Trial(images, statistics.median(seconds))


@contextmanager
def _maybe_accelerated(pipe: Any, schedule: CacheSchedule | Rule | None) -> Iterator[None]:
    if schedule is None:
        yield
    else:
        with accelerated(pipe, schedule):
            yield
