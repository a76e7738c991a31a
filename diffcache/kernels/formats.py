"""The formats in which a tensor may be kept, and how many bytes they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffcache.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Format:
    """Codes of ``bits`` each, in groups with one float32 scale: the group's largest magnitude is stored as ``top``.

    group  values that share a scale, at most; they are neighbours in a row (``rows``)
    """

    name: str
    bits: int
    top: float
    group: int
    dtype: torch.dtype

    def group_of(self, length: int) -> int:
        """Values that share a scale in rows of this length: an even number, for two codes of four bits make a byte."""
        return min(self.group, length + length % 2)

    def groups(self, length: int) -> int:
        return math.ceil(length / self.group_of(length)) if length else 0

    def nbytes(self, shape: Sequence[int]) -> int:
        """Of a tensor of this shape, scales included."""
        count, length = rows(shape)
        groups = self.groups(length)
        codes = groups * self.group_of(length) // 2 if self.bits == 4 else length * self.bits // 8
        return count * (codes + 4 * groups)


FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("int8", 8, 127.0, 128, torch.int8),
        Format("fp8", 8, 448.0, 128, torch.float8_e4m3fn),
        Format("int4", 4, 7.0, 64, torch.uint8),
    )
}


def format_of(name: str) -> Format:
    """The format of this name; UnknownName says which there are."""
    if name not in FORMATS:
        raise UnknownName("store format", name, tuple(FORMATS))
    return FORMATS[name]


def rows(shape: Sequence[int]) -> tuple[int, int]:
    """(number, length) of the rows that groups stay within: the channels of a token, or in pictures and videos (four
    dimensions and more, channels second) one channel of a sample."""
    within = shape[2:] if len(shape) >= 4 else shape[-1:]
    length = math.prod(within)
    return (math.prod(shape) // length if length else 0), length
