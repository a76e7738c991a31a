"""Keep keys and values by position, behind the cache interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from diffcache.kernels import Format
from diffcache.kernels.library import Backend
from diffcache.tokens.compact import CompactRows
from diffcache.tokens.rows import grown, picked


class PlacedCache(DynamicCache):
    """The keys and values of a model, [B, heads, N, head_dim] in each layer, written by position.

    Args:
        how: The format in which keys and values are kept. None keeps the precision of the model.
        backend: What runs operations on kept rows.

    Attributes:
        index: int64 [B, n], the positions of the forward in progress; None if it computes all of them.
        size: The number of positions, N.
        keeps_before: Whether ``before`` is filled.
        before: The keys of a layer before the forward in progress wrote its rows, by number of the layer.
        values_now: The values that a layer wrote last, [B, heads, n, head_dim], during a forward.
    """

    def __init__(self, how: Format | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        self.index: Tensor | None = None
        self.size = 0
        self.keeps_before = False
        self.before: dict[int, Tensor] = {}
        self.values_now: Tensor | None = None
        self._how, self._backend = how, backend
        self._kept: dict[int, tuple[Tensor, Tensor] | tuple[CompactRows, CompactRows]] = {}

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
            self._kept[layer_idx] = fresh if self._how is None else self._compact(fresh, self._how)
            return key_states, value_states
        index, kept = self.index, self._kept[layer_idx]
        where = index[:, None, :, None]
        old = [one.read() if isinstance(one, CompactRows) else one for one in kept]
        if self.keeps_before:
            self.before[layer_idx] = old[0]
        keys, values = (
            grown(rows, 2, self.size).scatter(2, where.expand_as(new), new)
            for rows, new in zip(old, (key_states, value_states), strict=True)
        )
        if isinstance(kept[0], CompactRows) and isinstance(kept[1], CompactRows):
            self._kept[layer_idx] = (
                kept[0].written(fresh[0], index, self.size),
                kept[1].written(fresh[1], index, self.size),
            )
        else:
            self._kept[layer_idx] = keys.detach(), values.detach()
        return keys, values

    def values_at(self, number: int, index: Tensor | None) -> Tensor:
        """Return the kept values of a layer, [B, n, heads · head_dim].

        Args:
            number: The number of the layer.
            index: int64 [B, n], their positions. None for all.
        """
        kept = self._kept[number][1]
        rows = kept.read() if isinstance(kept, CompactRows) else kept
        return (rows if index is None else picked(rows, index)).transpose(1, 2).flatten(2)

    def write_values(self, number: int, values: Tensor, index: Tensor | None) -> None:
        """Write values of a layer without their keys.

        Args:
            number: The number of the layer.
            values: [B, n, heads · head_dim].
            index: int64 [B, n], their positions. None for all.
        """
        keys, kept = self._kept[number]
        heads = kept.heads if isinstance(kept, CompactRows) else kept.shape[1]
        rows = values.view(*values.shape[:2], heads, -1).transpose(1, 2)
        if index is None:
            index = torch.arange(rows.shape[2], device=rows.device).expand(len(rows), -1)
        if isinstance(kept, CompactRows):
            self._kept[number] = keys, kept.written(rows, index, self.size)  # type: ignore[assignment]
        else:
            where = index[:, None, :, None].expand_as(rows)
            self._kept[number] = keys, kept.scatter(2, where, rows)  # type: ignore[assignment]

    def _compact(self, fresh: tuple[Tensor, Tensor], how: Format) -> tuple[CompactRows, CompactRows]:
        """Return the keys and values of all positions in fewer bytes."""
        return (
            CompactRows.of(fresh[0], how, by_channel=True, backend=self._backend),
            CompactRows.of(fresh[1], how, by_channel=False, backend=self._backend),
        )

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, and the offset of the first."""
        return self.size, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: no position comes before those of the forward."""
        return 0

    @property
    def layers_kept(self) -> int:
        """Return the number of layers that have written keys and values."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all kept keys and values."""
        return sum(kept.nbytes for pair in self._kept.values() for kept in pair)

    def clear(self) -> None:
        """Drop everything kept."""
        self._kept.clear()
        self.end()

    def end(self) -> None:
        """Drop what is needed during a forward only."""
        self.before.clear()
        self.values_now = None
