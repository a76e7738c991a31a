"""What the block-wise rules share."""

from __future__ import annotations

import numpy as np

from diffcache.tokens.view import Fresh, View


def refreshed(view: View, start: np.ndarray, near: np.ndarray) -> Fresh:
    """Return ``near``, or all positions of the rows in which a block has just begun.

    A block has just begun if a token outside of it changed: the step before committed the last token of another block.
    Tokens of the block in progress that change are within ``near``.

    Args:
        view: The state of the canvas.
        start: int64 [B, 1], where the block in progress begins.
        near: bool [B, N], the positions that are computed within the block.
    """
    begun = (view.changed & (view.positions < start)).any(1, keepdims=True)
    return Fresh(near | begun)
