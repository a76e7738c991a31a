"""Time the sampling loop of a pipeline, without encoders and decoders, and warn of times that scatter."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffcache import host

LOG = logging.getLogger("diffcache")
STEADY = 0.25  # the scatter up to which times are used without a warning
FEWEST = 4  # times from which a scatter is computed


class UnsteadyTimes(RuntimeWarning):
    """The same forward took very different times while a profile was measured, so estimates in seconds are rough.

    Most often, other programs run on the machine. Counts of positions and steps do not depend on times.

    Example:
        >>> warnings.simplefilter("error", diffcache.UnsteadyTimes)  # refuse profiles of a busy machine
        >>> profile = diffcache.measure(loop, calls)
    """


def scatter(seconds: Sequence[float]) -> float:
    """Return the interquartile range of repeated times, as a share of their median. Fewer than FEWEST times have 0.

    Single interruptions and the first, slower forward do not count; a machine that is busy half of the time does.
    """
    if len(seconds) < FEWEST:
        return 0.0
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / max(middle, 1e-12))


def warn_of_unsteady_times(found: float, times: int) -> None:
    """Log and warn that repeated times scatter by ``found``, the median of several scatters, if it is above STEADY.

    Args:
        found: The scatter.
        times: The number of times of each forward.
    """
    if found <= STEADY:
        return
    text = (
        f"the middle half of {times} times of the same forward differ by {found:.0%} of their median, more than "
        f"{STEADY:.0%}. Seconds and speed-ups that this profile predicts are not reliable. Measure again while no "
        "other program runs on the machine, or state goals as Budget(computed_steps=…), which does not depend on times."
    )
    LOG.warning("unsteady-times: %s", text, extra={"kind": "unsteady-times", "times": 1})
    warnings.warn(text, UnsteadyTimes, stacklevel=2)


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
