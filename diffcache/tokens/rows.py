"""Pick, write and append rows by position."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def gathered(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows [B, n, ...] of ``rows`` [B, N, ...] at ``index`` [B, n]."""
    where = index.reshape(*index.shape, *(1,) * (rows.ndim - 2)).expand(*index.shape, *rows.shape[2:])
    return torch.gather(rows, 1, where)


def picked(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows [B, heads, n, ...] of ``rows`` [B, heads, N, ...] at ``index`` [B, n]."""
    return torch.gather(rows, 2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def indices(chosen: np.ndarray) -> np.ndarray:
    """Return int64 [B, n], the positions chosen in each row; shorter rows repeat their last position.

    Args:
        chosen: bool [B, N]. A row without any has position 0.
    """
    counts = chosen.sum(1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(counts.max()), 1)]
    last = np.maximum(counts - 1, 0)[:, None]
    return np.take_along_axis(order, np.minimum(np.arange(order.shape[1])[None], last), 1)


def grown(rows: Tensor, axis: int, size: int) -> Tensor:
    """Return ``rows`` with zeros after the last one, so that the axis has ``size`` entries."""
    more = size - rows.shape[axis]
    if not more:
        return rows
    shape = list(rows.shape)
    shape[axis] = more
    return torch.cat([rows, torch.zeros(shape, dtype=rows.dtype, device=rows.device)], axis)
