"""Run the output projection on the positions with logits that a loop reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.host import unwrapped
from diffcache.patch import Undo, layer, spot
from diffcache.tokens.rows import gathered, indices


@dataclass(slots=True)
class Projection:
    """The logits that one forward computes.

    Attributes:
        needed: bool [B, N], the positions with logits that the loop reads.
        index: Returns the positions that the last layer computed, int64 [B, n]; None for all.
        where: int64 [B, m], the positions of the logits. None until the projection has run on fewer positions.
    """

    needed: np.ndarray
    index: Callable[[], np.ndarray | None]
    where: Tensor | None = None

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 [B, m], the needed places in the last layer's output, and their positions."""
        index = self.index()
        if index is None:
            index = np.broadcast_to(np.arange(self.needed.shape[1]), self.needed.shape)
        first = np.ones_like(index, bool)
        first[:, 1:] = index[:, 1:] != index[:, :-1]  # rows repeat their last position
        places = indices(np.take_along_axis(self.needed, index, 1) & first)
        return places, np.take_along_axis(index, places, 1)


class Head:
    """The output projection of one model, and its wrapper.

    Args:
        model: The model.
        current: Returns what the forward in progress projects; None for every position, or outside of a forward.
    """

    def __init__(self, model: nn.Module, current: Callable[[], Projection | None]) -> None:
        self._module: nn.Module = unwrapped(model).get_output_embeddings()
        self._current = current

    def attach(self) -> Iterator[Undo]:
        """Wrap the projection. Yield the function that undoes it."""
        yield layer(*spot(self._module), self._forward)

    def _forward(self, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        projection = self._current()
        # a projection that shares the module of the embeddings is also called with token ids
        if projection is None or hidden.ndim != 3 or not hidden.is_floating_point():
            return inner(hidden, *args, **kwargs)
        places, positions = projection.places()
        if places.shape[1] >= hidden.shape[1]:
            return inner(hidden, *args, **kwargs)
        projection.where = torch.from_numpy(positions).to(hidden.device)
        return inner(gathered(hidden, torch.from_numpy(places).to(hidden.device)), *args, **kwargs)
