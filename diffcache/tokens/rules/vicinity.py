"""dInfer's vicinity refresh: compute the block in progress and some positions on either side of it."""

from __future__ import annotations

from diffcache.tokens.rules._block import refreshed
from diffcache.tokens.rules._checks import at_least
from diffcache.tokens.view import Fresh, View

SOURCE = "Ma et al. 2025, dInfer (arXiv 2510.08666); inclusionAI/dInfer @fce4e32"


def fresh(view: View, *, block: int = 32, around: int = 16, refresh: int = 0) -> Fresh:
    """Return the block in progress, widened by ``around`` positions; all positions at the first step of a block.

    Args:
        view: The state of the canvas.
        block: The length of a block, in tokens.
        around: The number of further positions on either side.
        refresh: Every so many steps, all positions are computed as well. 0 refreshes only when a block begins.
    """
    at_least("block", block, 1)
    at_least("around", around, 0)
    at_least("refresh", refresh, 0)
    start, end = view.block(block)
    near = (view.positions >= start - around) & (view.positions < end + around)
    if refresh and view.step % refresh == 0:
        near = near | True
    return refreshed(view, start, near)
