"""Keep keys and values by position, behind the cache interface of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache


class PlacedCache(DynamicCache):
    """The keys and values of a model, [B, heads, N, head_dim] in each layer, written by position.

    Attributes:
        index: int64 [B, n], the positions of the forward in progress; None if it computes all of them.
        size: The number of positions, N.
        keeps_before: Whether ``before`` is filled.
        before: The keys of a layer before the forward in progress wrote its rows, by number of the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.index: Tensor | None = None
        self.size = 0
        self.keeps_before = False
        self.before: dict[int, Tensor] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the fresh rows of a layer, and return the rows of all positions.

        Args:
            key_states: [B, heads, n, head_dim], in the order of ``index``.
            value_states: As ``key_states``.
            layer_idx: The number of the layer.
            *args: Arguments of other caches.
            **kwargs: Arguments of other caches.
        """
        if self.index is None:
            self._kept[layer_idx] = key_states.detach(), value_states.detach()
            return key_states, value_states
        where = self.index[:, None, :, None]
        keys, values = (grown(kept, 2, self.size) for kept in self._kept[layer_idx])
        if self.keeps_before:
            self.before[layer_idx] = keys
        keys = keys.scatter(2, where.expand_as(key_states), key_states)
        values = values.scatter(2, where.expand_as(value_states), value_states)
        self._kept[layer_idx] = keys.detach(), values.detach()
        return keys, values

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, and the offset of the first."""
        return self.size, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: no position comes before those of the forward."""
        return 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of all kept keys and values."""
        return sum(t.numel() * t.element_size() for pair in self._kept.values() for t in pair)

    def clear(self) -> None:
        """Drop everything kept."""
        self._kept.clear()
        self.before.clear()


def gathered(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows [B, n, ...] of ``rows`` [B, N, ...] at ``index`` [B, n]."""
    where = index.reshape(*index.shape, *(1,) * (rows.ndim - 2)).expand(*index.shape, *rows.shape[2:])
    return torch.gather(rows, 1, where)


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
    return torch.cat([rows, rows.new_zeros(shape)], axis)
