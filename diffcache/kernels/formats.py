"""Define the formats in which a tensor can be kept, and compute their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffcache.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Format:
    """A format of codes, in groups with one float32 scale.

    Attributes:
        name: The name of the format.
        bits: The bits of a code.
        dtype: The dtype of the tensor of codes.
        top: The code of the largest magnitude of a group.
        group: The least number of neighbours in a row (``rows``) that share a scale, in rows that are long enough. If
            it is 0, codes are the values themselves, without scales.
    """

    name: str
    bits: int
    dtype: torch.dtype
    top: float = 0.0
    group: int = 0

    def group_of(self, length: int) -> int:
        """Return the number of values that share a scale in rows of this length.

        It is even, because two codes of four bits are one byte. The last group of a row may be smaller.
        """
        size = math.ceil(length / max(1, length // self.group)) if self.group else length
        return size + size % 2

    def groups(self, length: int) -> int:
        """Return the number of scales of a row of this length."""
        return math.ceil(length / self.group_of(length)) if length and self.group else 0

    def codes(self, length: int) -> int:
        """Return the number of elements of ``dtype`` for a row of this length. Groups of 4 bits are padded."""
        return self.groups(length) * self.group_of(length) // 2 if self.bits == 4 else length

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor of this shape, including scales."""
        count, length = rows(shape)
        return count * (self.codes(length) * self.dtype.itemsize + 4 * self.groups(length))


FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("bf16", 16, torch.bfloat16),
        Format("int8", 8, torch.int8, 127.0, 128),
        Format("fp8", 8, torch.float8_e4m3fn, 448.0, 128),
        Format("int4", 4, torch.uint8, 7.0, 128),
    )
}


def format_of(name: str) -> Format:
    """Return the format with this name.

    Raises:
        UnknownName: There is no such format.
    """
    if name not in FORMATS:
        raise UnknownName("store format", name, tuple(FORMATS))
    return FORMATS[name]


def rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number and the length of the rows of a tensor. No group crosses the end of a row.

    A row is all channels of a token. In pictures and videos (four dimensions or more, channels second) it is one
    channel of a sample.
    """
    within = shape[2:] if len(shape) >= 4 else shape[-1:]
    length = math.prod(within)
    return (math.prod(shape) // length if length else 0), length
