"""Keep keys and values by position, behind the cache interface of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from diffcache.kernels.library import Backend
from diffcache.tokens.compact import CompactRows
from diffcache.tokens.mixed import Layout, MixedRows, Store, fresh_mask, with_rows
from diffcache.tokens.rows import can_write, picked, write_rows

Kept = Tensor | CompactRows | MixedRows


class PlacedCache(DynamicCache):
    """The keys and values of a model, [B, heads, N, head_dim] in each layer, written by position.

    Args:
        how: The formats in which keys and values are kept. None keeps the precision of the model.
        backend: What runs operations on kept rows.

    Attributes:
        index: int64 [B, n], the positions of the forward in progress; None if it computes all of them.
        size: The number of positions, N.
        keeps_before: Whether ``before`` is filled.
        before: The keys of a layer before the forward in progress wrote its rows, by number of the layer.
        layout: Which positions this forward keeps in which format; None if there is one format.
        values_now: The values that a layer wrote last, [B, heads, n, head_dim], during a forward.
    """

    def __init__(self, how: Store | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        self.index: Tensor | None = None
        self.size = 0
        self.keeps_before = False
        self.before: dict[int, Tensor] = {}
        self.values_now: Tensor | None = None
        self._how, self._backend = how, backend
        self.layout: Layout | None = None
        self._kept: dict[int, tuple[Kept, Kept]] = {}
        self._own: set[int] = set()  # layers with kept rows that only this cache refers to

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the fresh rows of a layer, and return the rows of all positions. Fresh rows are returned exactly.

        Args:
            key_states: [B, heads, n, head_dim], in the order of ``index``.
            value_states: As ``key_states``.
            layer_idx: The number of the layer.
            *args: Arguments of other caches.
            **kwargs: Arguments of other caches.
        """
        fresh = key_states.detach(), value_states.detach()
        self.values_now = fresh[1]
        if self.index is None:
            self._kept[layer_idx] = self._compact(fresh)
            self._own.discard(layer_idx)
            return key_states, value_states
        index, kept = self.index, self._kept[layer_idx]
        keys, values = kept
        if layer_idx in self._own and isinstance(keys, Tensor) and isinstance(values, Tensor):
            if can_write(keys, self.size) and can_write(values, self.size):
                write_rows(keys, fresh[0], index)
                write_rows(values, fresh[1], index)
                return keys, values
        old = [_rows_of(one) for one in kept]
        if self.keeps_before:
            self.before[layer_idx] = old[0]
        keys = with_rows(old[0], key_states, index, self.size)
        values = with_rows(old[1], value_states, index, self.size)
        self._kept[layer_idx] = (
            self._written(kept[0], fresh[0], index, keys.detach()),
            self._written(kept[1], fresh[1], index, values.detach()),
        )
        if not self.keeps_before and not keys.requires_grad:
            self._own.add(layer_idx)
        return keys, values

    def _written(self, kept: Kept, new: Tensor, index: Tensor, every: Tensor) -> Kept:
        """Return kept rows with others at some positions.

        Args:
            kept: The kept rows.
            new: [B, heads, n, head_dim], the others.
            index: int64 [B, n], their positions.
            every: [B, heads, N, head_dim], the rows of all positions after that.
        """
        if isinstance(kept, CompactRows):
            return kept.written(new, index, self.size)
        if isinstance(kept, MixedRows) and self.layout is not None:
            return kept.written(every, fresh_mask(index, self.size), self.layout)
        return every

    def values_at(self, number: int, index: Tensor | None) -> Tensor:
        """Return the kept values of a layer, [B, n, heads · head_dim].

        Args:
            number: The number of the layer.
            index: int64 [B, n], their positions. None for all.
        """
        rows = _rows_of(self._kept[number][1])
        return (rows if index is None else picked(rows, index)).transpose(1, 2).flatten(2)

    def write_values(self, number: int, values: Tensor, index: Tensor | None) -> None:
        """Write values of a layer without their keys.

        Args:
            number: The number of the layer.
            values: [B, n, heads · head_dim].
            index: int64 [B, n], their positions. None for all.
        """
        keys, kept = self._kept[number]
        heads = kept.shape[1] if isinstance(kept, Tensor) else kept.heads
        rows = values.view(*values.shape[:2], heads, -1).transpose(1, 2)
        if index is None:
            index = torch.arange(rows.shape[2], device=rows.device).expand(len(rows), -1)
        every = with_rows(_rows_of(kept), rows, index, self.size)
        self._kept[number] = keys, self._written(kept, rows, index, every)

    def _compact(self, fresh: tuple[Tensor, Tensor]) -> tuple[Kept, Kept]:
        """Return the keys and values of all positions in the formats in which they are kept."""
        how, backend = self._how, self._backend
        if how is None or how.near is None:
            return fresh
        if how.far is None or self.layout is None:
            return (
                CompactRows.of(fresh[0], how.near, by_channel=True, backend=backend),
                CompactRows.of(fresh[1], how.near, by_channel=False, backend=backend),
            )
        formats = how.near, how.far
        return (
            MixedRows.of(fresh[0], formats, self.layout, by_channel=True, backend=backend),
            MixedRows.of(fresh[1], formats, self.layout, by_channel=False, backend=backend),
        )

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, and the offset of the first."""
        return self.size, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: no position comes before those of the forward."""
        return 0

    def rows(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the kept keys and values by number of the layer, [B, heads, N, head_dim] each."""
        return {number: (_rows_of(keys), _rows_of(values)) for number, (keys, values) in self._kept.items()}

    def place(self, rows: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Keep these keys and values, in the precision they have.

        Args:
            rows: As ``rows`` returns them.
        """
        self._kept = dict(rows)
        self._own.clear()

    @property
    def layers_kept(self) -> int:
        """Return the number of layers that have written keys and values."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all kept keys and values."""
        layout = 0 if self.layout is None else self.layout.nbytes
        return layout + sum(kept.nbytes for pair in self._kept.values() for kept in pair)

    def clear(self) -> None:
        """Drop everything kept."""
        self._kept.clear()
        self._own.clear()
        self.layout = None
        self.end()

    def end(self) -> None:
        """Drop what is needed during a forward only."""
        self.before.clear()
        self.values_now = None


def _rows_of(kept: Kept) -> Tensor:
    """Return kept rows, [B, heads, N, head_dim], approximately if they are in fewer bytes."""
    return kept if isinstance(kept, Tensor) else kept.read()
