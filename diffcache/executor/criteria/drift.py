"""Compute a planned prediction if the denoiser's input has moved too far from that of the newest planned step."""

from __future__ import annotations

from torch import Tensor

from diffcache.executor.criteria import About, Memory, Signal, Where

ABOUT = About(source="diffcache, a guard for schedules made offline", where=Where.MODEL, keeps_anchors=True)


def change(signal: Signal, memory: Memory) -> Tensor:
    """Return the relative L1 change of the denoiser's input, 0-d."""
    return signal.moved / signal.level
