"""Block diffusion: keep the finished blocks, and compute the block in progress. Exact if attention is block-causal.

In a block-causal network a position attends to its own block and to earlier ones, so a block that no longer changes
keeps its keys and values. A block is computed once more after its last change.
"""

from __future__ import annotations

import numpy as np

from diffcache.tokens.rules._checks import at_least
from diffcache.tokens.view import Fresh, View

SOURCE = "Arriola et al. 2025, Block Diffusion (arXiv 2503.09573), section 5; LLaDA2 (arXiv 2512.15745)"


def fresh(view: View, *, block: int = 32) -> Fresh:
    """Return all positions from the first block that changed, or that holds a mask.

    Args:
        view: The state of the canvas.
        block: The length of a block, in tokens. Blocks are counted from position 0.
    """
    at_least("block", block, 1)
    size = view.masked.shape[1]
    open_ = view.masked | view.changed
    first = np.where(open_.any(1), open_.argmax(1), size - 1) // block * block
    return Fresh(view.positions >= first[:, None])
