"""Fast-dLLM's dual cache: keep the prompt, the finished blocks and the suffix, compute the block in progress."""

from __future__ import annotations

from diffcache.tokens.rules._block import refreshed
from diffcache.tokens.rules._checks import at_least
from diffcache.tokens.view import Fresh, View

SOURCE = "Wu et al. 2025, Fast-dLLM (arXiv 2505.22618); NVlabs/Fast-dLLM @24cc59e"


def fresh(view: View, *, block: int = 32) -> Fresh:
    """Return the block in progress; all positions at the first step of a block.

    Args:
        view: The state of the canvas.
        block: The length of a block, in tokens.
    """
    at_least("block", block, 1)
    start, end = view.block(block)
    return refreshed(view, start, (view.positions >= start) & (view.positions < end))
