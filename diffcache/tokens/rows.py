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


def can_write(rows: Tensor, size: int) -> bool:
    """Return whether ``write_rows`` can write into ``rows`` [B, heads, N, head_dim] of ``size`` positions."""
    dense = rows.is_contiguous() or rows.transpose(1, 2).is_contiguous()
    return dense and rows.shape[2] == size and (torch.is_inference_mode_enabled() or not rows.is_inference())


def write_rows(rows: Tensor, new: Tensor, index: Tensor) -> None:
    """Write ``new`` [B, heads, n, head_dim] into ``rows`` [B, heads, N, head_dim] at the positions ``index`` [B, n].

    It copies whole rows, which is several times as fast as ``Tensor.scatter``.
    """
    if not rows.is_contiguous():  # the heads of a position are neighbors in memory: they are one row
        rows, new = (part.transpose(1, 2).flatten(2)[:, None] for part in (rows, new))
    batch, heads, size, width = rows.shape
    starts = torch.arange(0, batch * heads * size, size, device=index.device).view(batch, heads, 1)
    rows.view(-1, width).index_copy_(0, (starts + index[:, None]).flatten(), new.reshape(-1, width))


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
