"""Add up the changes of the time embedding that the first block is given (TeaCache for CogVideoX and Wan)."""

from __future__ import annotations

from torch import Tensor

from diffcache.executor.criteria import About, Memory, Signal, Where

ABOUT = About(
    source="TeaCache, arXiv 2411.19108, ali-vilab/TeaCache @7c10efc", where=Where.TIME_EMBEDDING, accumulates=True
)


def change(signal: Signal, memory: Memory) -> Tensor:
    """Return the relative L1 change of the time embedding since the call before, 0-d."""
    return signal.moved / signal.level
