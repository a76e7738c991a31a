"""Time the forwards of a decoding loop: of all positions, and of fewer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffcache import tokens
from diffcache.errors import Unusable
from diffcache.patch import layer, spot
from diffcache.profiling.recording.clock import scatter, wait, warn_of_unsteady_times
from diffcache.profiling.recording.decoding import canvas_of, network_of

if TYPE_CHECKING:
    from diffcache.tokens.engine import TokenCache

COUNTS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # positions of timed forwards
REPEATS = 5  # of a timed forward


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds of forwards.

    Attributes:
        counts: Numbers of positions, rising; the last is that of a canvas.
        seconds: The time of a forward that computes so many positions of each row.
        outside: The time between two forwards of the loop.
        forwards: The number of forwards of the call.
    """

    counts: tuple[int, ...]
    seconds: tuple[float, ...]
    outside: float
    forwards: int


def time_decode(pipe: Any, call: Mapping[str, Any]) -> Times:
    """Run a call in full, and time forwards of fewer and fewer positions after its last one.

    Args:
        pipe: See ``record_decodes``.
        call: The arguments of the loop.
    """
    pipe(**call)  # the first call of a process is slower than the next ones
    network, clock = network_of(pipe), _Clock()
    undo = layer(*spot(network), clock.forward)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            pipe(**call)
            wait()
    finally:
        undo()
    if not clock.forwards:
        raise Unusable(
            "the loop",
            f"a call runs no forward of {type(network).__name__}",
            "Pass a loop that calls the network it was made with: diffcache.Loop(model, sample)",
        )
    outside = max(0.0, (time.perf_counter() - began - clock.inside) / max(clock.forwards, 1))
    args, kwargs = clock.given
    ids = args[0] if args else kwargs["input_ids"]
    cache = tokens.cache_for(pipe, "full")
    cache.attach()
    try:
        with torch.no_grad():
            network(*args, **kwargs)
            counts = [*(n for n in COUNTS if n < ids.shape[1]), ids.shape[1]]
            seconds = [_times(cache, ids, count) for count in counts]
    finally:
        cache.detach()
    warn_of_unsteady_times(float(np.median([scatter(found) for found in seconds])), REPEATS)
    least = [min(found) for found in seconds]  # interruptions only lengthen a forward
    return Times(tuple(counts), tuple(np.maximum.accumulate(least)), outside, clock.forwards)


class _Clock:
    """Times the forwards of a call, and keeps the arguments of the last one."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.forwards = 0
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap a forward of the network."""
        wait()
        began = time.perf_counter()
        out = inner(*args, **kwargs)
        wait()
        self.inside += time.perf_counter() - began
        self.forwards += 1
        self.given = args, kwargs
        return out


def _times(cache: TokenCache, ids: Tensor, count: int) -> list[float]:
    """Return the times of REPEATS forwards of ``count`` positions spread over the canvas."""
    size, rows = ids.shape[1], canvas_of(cache).cache.rows()
    index = None if count == size else np.linspace(0, size - 1, count).astype(np.int64)[None].repeat(len(ids), 0)
    found = []
    for _ in range(REPEATS):
        wait()
        began = time.perf_counter()
        cache.trial(ids, rows, index)
        wait()
        found.append(time.perf_counter() - began)
    return found
