"""Place keys and values in networks with a forward that takes neither positions nor a cache, such as LLaDA's.

LLaDA's blocks, like OLMo's, have a module ``rotary_emb`` that rotates queries and keys by their index, and a method
``_scaled_dot_product_attention``. Two wrappers for each block suffice: the first rotates the rows at their positions,
the second replaces the fresh keys and values by those of all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffcache.patch import Undo, layer, spot
from diffcache.tokens.rows import picked

if TYPE_CHECKING:
    from diffcache.tokens.store import PlacedCache  # imports transformers

ROTARY, ATTENTION = "rotary_emb", "_scaled_dot_product_attention"


class RotaryBlocks:
    """The blocks of one model, and their wrappers.

    Args:
        model: The network.
        current: Returns the cache of the forward in progress; None outside of one.
    """

    def __init__(self, model: nn.Module, current: Callable[[], PlacedCache | None]) -> None:
        self.blocks = blocks_of(model)
        self._current = current

    def attach(self) -> Iterator[Undo]:
        """Wrap every block. Yield the function that undoes each wrapper."""
        for rotary in dict.fromkeys(getattr(block, ROTARY) for block in self.blocks):
            yield layer(*spot(rotary), self._rotate)
        for number, block in enumerate(self.blocks):
            yield layer(block, ATTENTION, self._attention(number))

    def _rotate(self, inner: Callable[..., Any], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Rotate queries and keys, [B, heads, n, head_dim], at the positions of the fresh set."""
        cache = self._current()
        if cache is None or cache.index is None:
            return inner(q, k, *args, **kwargs)
        where = cache.index[:, None, :, None]
        spread = []
        for rows in (q, k):
            every = rows.new_zeros(*rows.shape[:2], cache.size, rows.shape[3])
            spread.append(every.scatter(2, where.expand_as(rows), rows))
        turned = inner(*spread, *args, **kwargs)
        return tuple(picked(rows, cache.index) for rows in turned)

    def _attention(self, number: int) -> Callable[..., Any]:
        """Return the wrapper of the attention of the block with this number."""

        def attention(inner: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = self._current()
            if cache is not None:
                k, v = cache.update(k, v, number)
            return inner(q, k, v, *args, **kwargs)

        return attention


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that have both parts, in order."""
    return [
        part
        for part in model.modules()
        if hasattr(part, ATTENTION) and isinstance(getattr(part, ROTARY, None), nn.Module)
    ]
