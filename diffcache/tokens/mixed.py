"""Keep the masks that are far from every decoded token in fewer bits than the other positions.

MiKV (arXiv 2402.18096) keeps unimportant tokens in fewer bits in place of dropping them. A far mask receives little
attention, and is computed again before or after its commit. Each of the two groups of positions has its own channels
and scales. A position that changes its group is encoded again; all others keep their codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffcache import registry
from diffcache.errors import BadOption, UnknownName
from diffcache.kernels import Format, format_of
from diffcache.kernels.library import Backend
from diffcache.tokens.compact import CompactRows
from diffcache.tokens.rows import grown, indices, picked

EXACT = "exact"  # the name of the precision of the model
DISTANCE = 32


@dataclass(frozen=True, slots=True)
class Store:
    """The formats in which keys and values are kept.

    Attributes:
        spec: The text that it was made from.
        near: The format of all positions, or of those that are not far. None keeps the precision of the model.
        far: The format of far masks. None: that of all positions.
        distance: A mask is far if the nearest decoded position is more than this many positions away.
    """

    spec: str
    near: Format | None
    far: Format | None = None
    distance: int = DISTANCE

    def layout(self, masked: np.ndarray, device: torch.device) -> Layout | None:
        """Return which positions are kept in which format; None if there is one format."""
        return None if self.far is None else Layout.of(far_masks(masked, self.distance), device)


def parse_store(spec: str | None) -> Store:
    """Return the formats of a spec such as ``"int8"`` or ``"int8:far=int4,distance=32"``.

    Raises:
        UnknownName: There is no such format, or no such option.
        BadOption: An option is out of range.
    """
    name, _, rest = (spec or EXACT).partition(":")
    near = None if name == EXACT else format_of(name)
    options = registry.options(str(spec), rest)
    for key in options:
        if key not in ("far", "distance"):
            raise UnknownName("option of a store format", key, ("far", "distance"))
    far, distance = options.get("far"), options.get("distance", DISTANCE)
    if isinstance(distance, bool) or not isinstance(distance, int) or distance < 0:
        raise BadOption("distance", distance, "a whole number of at least 0")
    if options and (near is None or far is None):
        raise BadOption("store", spec, 'a format for each group of positions, such as "int8:far=int4,distance=32"')
    return Store(spec or EXACT, near, None if far is None else format_of(str(far)), distance)


def far_masks(masked: np.ndarray, distance: int) -> np.ndarray:
    """Return bool [B, N], the masks with no decoded position within ``distance``.

    Args:
        masked: bool [B, N].
        distance: A number of positions.
    """
    places, never = np.arange(masked.shape[1])[None], 1 << 40
    left = np.maximum.accumulate(np.where(masked, -never, places), 1)
    right = np.minimum.accumulate(np.where(masked, never, places)[:, ::-1], 1)[:, ::-1]
    far: np.ndarray = masked & (np.minimum(places - left, right - places) > distance)
    return far


@dataclass(frozen=True, slots=True)
class Layout:
    """Which positions are kept in which of two formats. Group 0 is near, group 1 is far.

    Attributes:
        member: bool [2, B, N], the positions of each group.
        places: int64 [B, n] for each group, its positions; shorter rows repeat their last one. None for an empty group.
        real: bool [B, n] for each group, where ``places`` does not repeat.
        slots: int64 [2, B, N], where a position is in ``places`` of its group.
    """

    member: Tensor
    places: tuple[Tensor | None, Tensor | None]
    real: tuple[Tensor, Tensor]
    slots: Tensor

    @classmethod
    def of(cls, far: np.ndarray, device: torch.device) -> Layout:
        """Return the layout with these far positions, bool [B, N]."""
        places: list[Tensor | None] = []
        real = []
        for member in (~far, far):
            index = indices(member)
            places.append(torch.from_numpy(index).to(device) if member.any() else None)
            real.append(torch.from_numpy(np.arange(index.shape[1])[None] < member.sum(1, keepdims=True)).to(device))
        members = np.stack([~far, far])
        slots = torch.from_numpy((members.cumsum(2) - 1).clip(0)).to(device)
        return cls(torch.from_numpy(members).to(device), (places[0], places[1]), (real[0], real[1]), slots)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        parts = (self.member, self.slots, *self.real, *(one for one in self.places if one is not None))
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True, slots=True)
class MixedRows:
    """Rows [B, heads, N, head_dim] in two formats.

    Attributes:
        parts: The rows of each group. None for an empty group.
        formats: The format of each group.
        layout: Which positions are in which group.
        heads: The number of heads.
        by_channel: Whether the channels are centred and scaled first.
        backend: What runs the operations.
    """

    parts: tuple[CompactRows | None, CompactRows | None]
    formats: tuple[Format, Format]
    layout: Layout
    heads: int
    by_channel: bool
    backend: Backend

    @classmethod
    def of(
        cls, rows: Tensor, formats: tuple[Format, Format], layout: Layout, *, by_channel: bool, backend: Backend
    ) -> MixedRows:
        """Return the rows of all positions in two formats.

        Args:
            rows: [B, heads, N, head_dim].
            formats: The format of each group.
            layout: Which positions are in which group.
            by_channel: Whether the channels are centred and scaled first.
            backend: What runs the operations.
        """
        empty = cls((None, None), formats, layout, rows.shape[1], by_channel, backend)
        return empty.written(rows, torch.ones_like(layout.member[0]), layout)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the codes, scales and channels of both groups."""
        return sum(part.nbytes for part in self.parts if part is not None)

    def written(self, rows: Tensor, fresh: Tensor, layout: Layout) -> MixedRows:
        """Return the rows in another layout, with some of them new.

        Args:
            rows: [B, heads, N, head_dim], all positions. Those that are not new are as ``read`` returns them.
            fresh: bool [B, N], the new ones.
            layout: Which positions are in which group now.
        """
        made = [self._part(number, rows, fresh, layout) for number in range(2)]
        return replace(self, parts=(made[0], made[1]), layout=layout)

    def _part(self, number: int, rows: Tensor, fresh: Tensor, layout: Layout) -> CompactRows | None:
        """Return the rows of one group. Positions that were in it, and are not new, keep their codes."""
        places, old = layout.places[number], self.parts[number]
        if places is None:
            return None
        chosen = picked(rows, places)
        real = layout.real[number]
        if old is None or bool(fresh.all()):
            how = self.formats[number]
            return CompactRows.of(chosen, how, by_channel=self.by_channel, backend=self.backend, real=real)
        new = old.like(chosen)
        more = fresh.shape[1] - self.layout.member.shape[2]
        member = torch.nn.functional.pad(self.layout.member[number], (0, more))
        slots = torch.nn.functional.pad(self.layout.slots[number], (0, more))
        return new.where((member & ~fresh).gather(1, places), old, slots.gather(1, places))

    def read(self) -> Tensor:
        """Return the rows of all positions, [B, heads, N, head_dim], approximately."""
        spread: list[Tensor] = []
        for number, part in enumerate(self.parts):
            if part is None:
                continue
            slots = self.layout.slots[number].clamp(max=part.codes.shape[1] - 1)
            spread.append(picked(part.read(), slots))
        if len(spread) == 1:
            return spread[0]
        return torch.where(self.layout.member[1][:, None, :, None], spread[1], spread[0])


def fresh_mask(index: Tensor, size: int) -> Tensor:
    """Return bool [B, size], True at the positions ``index`` [B, n]."""
    found = torch.zeros(len(index), size, dtype=torch.bool, device=index.device)
    return found.scatter(1, index, True)


def with_rows(rows: Tensor, new: Tensor, index: Tensor, size: int) -> Tensor:
    """Return [B, heads, size, head_dim]: ``rows`` with ``new`` at the positions ``index`` [B, n]."""
    return grown(rows, 2, size).scatter(2, index[:, None, :, None].expand_as(new), new)
