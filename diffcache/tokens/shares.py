"""Compute a share of the positions in each layer: those with values that differ most from the kept ones.

All positions of a forward pass through every layer, because a committed token changes its input. A layer projects the
values of all of them, which is cheap, and runs in full on the positions with the lowest cosine between new and kept
values. At every other position it adds what it added there last: the outputs of its attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.errors import UnsupportedModel, Unusable
from diffcache.patch import Undo
from diffcache.tokens.layers import EMBEDDINGS, MASK, wrapped
from diffcache.tokens.rows import gathered, picked
from diffcache.tokens.store import PlacedCache

NORMS = ("input_layernorm", "attn_norm")  # what a layer applies to its input before the projections
VALUES = "v_proj"
OFF = 0.1  # the largest relative difference between values that are projected here and in the layer


@dataclass(slots=True)
class Shares:
    """The choices of one canvas, and what its layers added to their inputs.

    Attributes:
        added: The newest output minus input of every position, [B, N, d], by number of the layer.
        where: int64 [B, n], the positions of the forward in progress. None for all.
        fixed: bool [B, n], the places in ``where`` that every layer computes. None if all are computed.
        open: bool [B, n], the places from which each layer chooses.
        counts: int64 [B], the number of places that a layer computes in each row.
        same: int64 [B, n], the first place of the position at each place: rows repeat their last position.
        whole: The number of layers, from the first one, that compute every place.
        computed: The number of positions computed, as a sum over the layers of the forward.
    """

    added: dict[int, Tensor] = field(default_factory=dict)
    where: Tensor | None = None
    fixed: Tensor | None = None
    open: Tensor | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    same: Tensor | None = None
    whole: int = 0
    computed: int = 0

    def begin(
        self, index: np.ndarray | None, among: np.ndarray | None, share: float, whole: int, device: torch.device
    ) -> None:
        """Begin a forward.

        Args:
            index: int64 [B, n], its positions. None for all.
            among: bool [B, N], the positions from which each layer chooses. None computes every position of ``index``.
            share: The share of ``among`` that a layer computes, in each row.
            whole: The number of layers, from the first one, that compute every position of ``index``.
            device: The device of the model.
        """
        self.where = None if index is None else torch.from_numpy(index).to(device)
        self.fixed = self.open = self.same = None
        self.whole, self.computed = whole, 0
        if among is None:
            return
        places = np.broadcast_to(np.arange(among.shape[1]), among.shape) if index is None else index
        first = np.ones_like(places, bool)
        first[:, 1:] = places[:, 1:] != places[:, :-1]
        chosen_from = np.take_along_axis(among, places, 1) & first
        fixed = first & ~chosen_from
        most = chosen_from.sum(1)
        self.counts = fixed.sum(1) + np.minimum(np.maximum((share * most).astype(np.int64), 1), most)
        same = np.minimum(np.arange(places.shape[1])[None], first.sum(1, keepdims=True) - 1)
        self.fixed, self.open, self.same = (torch.from_numpy(a).to(device) for a in (fixed, chosen_from, same))

    def places(self, new: Tensor, kept: Tensor) -> Tensor:
        """Return int64 [B, m], the places that a layer computes; shorter rows repeat their last place.

        Args:
            new: [B, n, channels], the values at every place.
            kept: As ``new``, the kept values.
        """
        alike = torch.nn.functional.cosine_similarity(new.float(), kept.float(), dim=-1)
        # values that differ by rounding alone are equal, so that the choice does not depend on the size of the batch
        alike = torch.where(alike > 1 - max(1e-6, torch.finfo(new.dtype).eps ** 2), 1, alike)
        alike = alike.masked_fill(~self.open, torch.inf).masked_fill(self.fixed, -torch.inf)  # type: ignore[operator,arg-type]
        order = alike.argsort(dim=1, stable=True)[:, : int(self.counts.max())]
        last = torch.from_numpy(self.counts - 1).to(order.device)[:, None]
        return order.gather(1, torch.minimum(torch.arange(order.shape[1], device=order.device)[None], last))

    @property
    def nbytes(self) -> int:
        """Return the bytes of what the layers added."""
        return sum(kept.nbytes for kept in self.added.values())


class ShareStack:
    """The layers of one model, and their wrappers.

    Args:
        layers: The layers, in the order in which they keep their values.
        current: Returns the state of the forward in progress, and the cache of its canvas; None outside of one.

    Attributes:
        modules: The layers.

    Raises:
        Unusable: A layer has no projection of values that can be run alone.
    """

    def __init__(self, layers: list[nn.Module], current: Callable[[], tuple[Shares, PlacedCache] | None]) -> None:
        self.modules = layers
        self._projections = [projection_of(module) for module in layers]
        self._current = current
        self._checked: set[int] = set()

    def attach(self) -> Iterator[Undo]:
        """Wrap the forward of every layer. Yield the function that undoes each wrapper."""
        yield from wrapped(self.modules, self._forward)

    def _forward(self, number: int, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Wrap the forward of the layer with this number."""
        found = self._current()
        if found is None:
            return inner(hidden_states, *args, **kwargs)
        shares, cache = found
        cache.index = shares.where
        if shares.fixed is None or number < shares.whole:
            out = inner(hidden_states, *args, **kwargs)
            self._check(number, hidden_states, cache)
            shares.added[number] = _written(shares.added.get(number), shares.where, _rows(out) - hidden_states)
            shares.computed += hidden_states.shape[0] * hidden_states.shape[1]
            return out
        return self._partly(number, inner, hidden_states, args, kwargs)

    def _partly(self, number: int, inner: Callable[..., Any], hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a layer on the places that it chooses, and return its output at every place."""
        shares, cache = self._current()  # type: ignore[misc]
        projected = self._projections[number](hidden)
        places = shares.places(projected, cache.values_at(number, shares.where))
        cache.write_values(number, projected, shares.where)
        cache.index = places if shares.where is None else shares.where.gather(1, places)
        rows = gathered(hidden, places)
        out = inner(rows, *args, **_arguments(kwargs, places, hidden.shape[1]))
        new, kept = _rows(out), shares.added[number]
        shares.added[number] = _written(kept, cache.index, new - rows)
        shares.computed += places.numel()
        before = kept if shares.where is None else gathered(kept, shares.where)
        every = (hidden + before).scatter(1, places[..., None].expand_as(new), new)
        if shares.same is not None:
            every = gathered(every, shares.same)
        return (every, *out[1:]) if isinstance(out, tuple) else every

    def _check(self, number: int, hidden: Tensor, cache: PlacedCache) -> None:
        """Raise UnsupportedModel unless the layer kept the values that its projection returns."""
        if number in self._checked or cache.values_now is None:
            return
        projected, written = self._projections[number](hidden).float(), cache.values_now.transpose(1, 2).flatten(2)
        if projected.shape != written.shape or (projected - written).norm() > OFF * written.float().norm():
            raise UnsupportedModel(
                f"layer {number} ({type(self.modules[number]).__name__}) keeps values that differ from those of its "
                f"projection {VALUES}. Allowed: layers that keep the output of {VALUES} on their normalised input. "
                "Use a rule that does not compare values: dkv, dual."
            )
        self._checked.add(number)


def projection_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function from the input of a layer, [B, n, d], to its values, [B, n, channels].

    Raises:
        Unusable: The layer has no separate projection of values, or no norm before it.
    """
    norm = next((getattr(module, name) for name in NORMS if hasattr(module, name)), None)
    owner = next((part for part in module.modules() if isinstance(getattr(part, VALUES, None), nn.Module)), None)
    if norm is None or owner is None:
        raise Unusable(
            type(module).__name__,
            f"the rule compares values before a layer runs; the layer has no {VALUES}, or no {' or '.join(NORMS)}",
            "Use a rule that does not compare values: dkv, dual",
        )
    values = getattr(owner, VALUES)

    def projected(hidden: Tensor) -> Tensor:
        found: Tensor = values(norm(hidden)).detach()
        return found

    return projected


def _rows(out: Any) -> Tensor:
    """Return the hidden states in the output of a layer."""
    found: Tensor = (out[0] if isinstance(out, tuple) else out).detach()
    return found


def _written(kept: Tensor | None, where: Tensor | None, rows: Tensor) -> Tensor:
    """Return ``kept`` with ``rows`` at the positions ``where``; the rows themselves if they are all positions."""
    if where is None or kept is None:
        return rows
    return kept.scatter(1, where[..., None].expand_as(rows), rows)


def _arguments(kwargs: dict[str, Any], places: Tensor, size: int) -> dict[str, Any]:
    """Return the arguments of a layer for some places of its ``size`` rows."""
    call, batch = dict(kwargs), len(places)
    positions, turns, mask = kwargs.get("position_ids"), kwargs.get(EMBEDDINGS), kwargs.get(MASK)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        call["position_ids"] = positions.expand(batch, -1).gather(1, places)
    if isinstance(turns, tuple):
        call[EMBEDDINGS] = tuple(gathered(part.expand(batch, -1, -1), places) for part in turns)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == size:
        call[MASK] = picked(mask.expand(batch, *mask.shape[1:]), places)
    return call
