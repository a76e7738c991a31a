"""Compare the first block's residual with that of the newest computed step (FirstBlockCache)."""

from __future__ import annotations

from torch import Tensor

from diffcache.executor.criteria import About, Memory, Signal, Where

ABOUT = About(
    source="ParaAttention, chengzeyi/ParaAttention; diffusers' hooks/first_block_cache.py", where=Where.FIRST_BLOCK
)


def change(signal: Signal, memory: Memory) -> Tensor:
    """Return the relative L1 change of the residual, 0-d."""
    return signal.moved / signal.level
