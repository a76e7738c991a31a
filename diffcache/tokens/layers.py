"""Compute more positions from a layer on: keep the input of every decoder layer, and widen the fresh set inside a pass.

A forward begins with the fresh positions. At each layer, the inputs of these positions replace their kept rows. If a
rule asks for a refresh from layer b on, the kept rows of all positions are handed to layer b, and the layers from there
to the last compute every position. A row of the batch that needs no refresh repeats its own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.errors import Unusable
from diffcache.patch import Undo, layer, spot
from diffcache.tokens.rows import gathered, picked

if TYPE_CHECKING:
    from diffcache.tokens.store import PlacedCache  # imports transformers

EMBEDDINGS, MASK = "position_embeddings", "attention_mask"  # arguments of a decoder layer


@dataclass(slots=True)
class Depths:
    """The refreshes of one canvas, and its kept inputs of layers.

    Attributes:
        hidden: The newest input of every position, [B, N, d], by number of the layer.
        embeddings: The cosines and sines of all positions, each [B or 1, N, head_dim], by number of the layer.
        masks: The attention mask of a forward of all positions, by number of the layer.
        index: int64 [B, n], the positions that the layer in progress computes. None for all.
        start: int64 [B], the first layer that computes every position of a row. ``layers`` or more for none.
        widened: Whether ``index`` is wider than at the first layer.
        wide: The number of layers of the forward that computed more positions than its first layer.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    embeddings: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)
    index: np.ndarray | None = None
    start: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    widened: bool = False
    wide: int = 0

    def begin(self, index: np.ndarray | None, start: np.ndarray) -> None:
        """Begin a forward.

        Args:
            index: int64 [B, n], its positions. None for all.
            start: int64 [B], the first layer that computes every position of a row.
        """
        self.index, self.start, self.widened, self.wide = index, start, False, 0


class LayerStack:
    """The decoder layers of one model, and their wrappers.

    Args:
        model: The decoder.
        current: Returns the state of the forward in progress, and the cache of its canvas; None outside of one.

    Raises:
        Unusable: The model has no list of layers.
    """

    def __init__(self, model: nn.Module, current: Callable[[], tuple[Depths, PlacedCache] | None]) -> None:
        self.modules = decoder_layers(model)
        self._current = current

    def attach(self) -> Iterator[Undo]:
        """Wrap the forward of every layer. Yield the function that undoes each wrapper."""
        yield from wrapped(self.modules, self._forward)

    def _forward(self, number: int, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Wrap the forward of the layer with this number."""
        found = self._current()
        if found is None:
            return inner(hidden_states, *args, **kwargs)
        depths, cache = found
        if depths.index is None:
            depths.hidden[number] = hidden_states.detach()
            depths.embeddings[number], depths.masks[number] = kwargs[EMBEDDINGS], kwargs.get(MASK)
            return inner(hidden_states, *args, **kwargs)
        where = torch.from_numpy(depths.index).to(hidden_states.device)
        rows = where[..., None].expand_as(hidden_states)
        kept = depths.hidden[number].scatter(1, rows, hidden_states)
        depths.hidden[number] = kept.detach()
        wider = _widened(depths.index, depths.start, number, kept.shape[1])
        if wider is not None:
            depths.index, depths.widened = wider, True
            where = cache.index = torch.from_numpy(wider).to(hidden_states.device)
            hidden_states = gathered(kept, where)
        if depths.widened:
            depths.wide += 1
            kwargs.update(_arguments(depths, number, where))
        return inner(hidden_states, *args, **kwargs)


def wrapped(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[Undo]:
    """Wrap the forward of every layer. Yield the function that undoes each wrapper.

    Args:
        modules: The layers.
        forward: The wrapper. It takes the number of the layer, its forward, and the arguments of the call.
    """
    for number, module in enumerate(modules):
        yield layer(*spot(module), partial(forward, number))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model, in order: the longest list of modules of one class.

    Raises:
        Unusable: There is no such list.
    """
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    alike = [found for found in lists if len({type(module) for module in found}) == 1]
    if not alike:
        raise Unusable(type(model).__name__, "it has no list of decoder layers", "Use a rule without depth: dkv, dual")
    return max(alike, key=len)


def _widened(index: np.ndarray, start: np.ndarray, number: int, size: int) -> np.ndarray | None:
    """Return the positions from layer ``number`` on, if a row begins to compute all of its ``size`` positions there."""
    begins = start == number
    if not begins.any():
        return None
    if index.shape[1] < size:
        index = np.concatenate([index, np.repeat(index[:, -1:], size - index.shape[1], axis=1)], 1)
    return np.where(begins[:, None], np.arange(size)[None], index)


def _arguments(depths: Depths, number: int, where: Tensor) -> dict[str, Any]:
    """Return the arguments of the layer ``number`` when it computes the positions ``where``."""
    batch = (len(where), -1, -1)
    turns = tuple(gathered(part.expand(batch), where) for part in depths.embeddings[number])
    mask = depths.masks[number]
    if isinstance(mask, Tensor):
        mask = picked(mask.expand(len(where), *mask.shape[1:]), where)
    return {"position_ids": where, EMBEDDINGS: turns, MASK: mask}
