"""Add up the changes of the output of the first block's first normalisation (TeaCache)."""

from __future__ import annotations

from torch import Tensor

from diffcache.executor.criteria import About, Memory, Signal, Where

ABOUT = About(
    source="TeaCache, arXiv 2411.19108, ali-vilab/TeaCache @7c10efc", where=Where.FIRST_NORM, accumulates=True
)


def change(signal: Signal, memory: Memory) -> Tensor:
    """Return the relative L1 change of the normalised input since the call before, 0-d."""
    return signal.moved / signal.level
