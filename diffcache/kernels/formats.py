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

    group  values that share a scale, at least, in rows of as many; they are neighbours (``rows``). 0: codes are the
           values themselves, and there are no scales
    """

    name: str
    bits: int
    dtype: torch.dtype
    top: float = 0.0
    group: int = 0

    def group_of(self, length: int) -> int:
        """Values that share a scale in rows of this length: an even number, for two codes of four bits make a byte. The
        last group of a row may have fewer."""
        size = math.ceil(length / max(1, length // self.group)) if self.group else length
        return size + size % 2

    def groups(self, length: int) -> int:
        """Scales of a row of this length."""
        return math.ceil(length / self.group_of(length)) if length and self.group else 0

    def codes(self, length: int) -> int:
        """Elements of ``dtype`` that a row of this length takes: a group of four bits is always a whole one."""
        return self.groups(length) * self.group_of(length) // 2 if self.bits == 4 else length

    def nbytes(self, shape: Sequence[int]) -> int:
        """Of a tensor of this shape, scales included."""
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
