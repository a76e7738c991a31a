"""Tiles of rows in Triton: how an operation cuts its tensors, and ``coding`` for one tile.

A tile is [TILE, BLOCK]: that many groups, each with its values side by side. Four bits have two tiles of half a group
("parts"), so that the two codes of a byte lie at one place of both. A program has the groups of one sample only: what
belongs to a sample is then one row for it, and its sums are one sample's.

What a masked lane holds is undefined: results must not depend on it. A value is stored under a mask, or passes
``zero_outside`` before it enters a sum or a maximum.

Every operation as torch has it: divisions and casts round to nearest even, nothing is contracted to a multiply-add.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton reads the annotations of its functions itself: nothing but constexpr may stand there.)

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels.coding import SMALLEST
from diffcache.kernels.formats import Format

Given = TypeVar("Given", Tensor, Tensor | None)

TINY = tl.constexpr(SMALLEST)

THREADS = 128  # of a program
THREADS_OF_ROW = 512  # at most, where a program has a whole row
PER_THREAD = 16  # values: as many codes of one byte as a thread can store at once
FLAT = 128  # values that make a group where the format has none


@dataclass(frozen=True)
class Tiling:
    """Compile-time constants of a kernel; ``GROUPS`` of ``GROUP`` values are a row of ``LENGTH``.

    WIDTH  values of a part; BLOCK, a power of two, has room for them
    EVEN   groups fill rows and BLOCK: no column is masked
    """

    LENGTH: int
    FORMAT: str
    TOP: float
    GROUP: int
    GROUPS: int
    WIDTH: int
    BLOCK: int
    TILE: int
    EVEN: bool
    num_warps: int

    @property
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch. Without fusion ``a * b + c`` is two roundings, as in torch."""
        return asdict(self) | {"enable_fp_fusion": False}

    def programs(self, count: int) -> int:
        """That these rows take."""
        return math.ceil(count * self.GROUPS / self.TILE)


def tiling(how: Format, count: int, length: int, *, whole_rows: bool = False) -> Tiling:
    """For samples of ``count`` rows; ``whole_rows``: a program has one row, however long."""
    return tiling_for(32 if torch.version.hip is None else 64, how, count, length, whole_rows=whole_rows)


@functools.cache
def tiling_for(lanes: int, how: Format, count: int, length: int, *, whole_rows: bool) -> Tiling:
    """Where a warp has so many threads."""
    group = how.group_of(length) if how.group else min(FLAT, above(length))
    groups = math.ceil(length / group)
    parts = 2 if how.bits == 4 else 1
    width = group // parts
    block = above(width)
    room = THREADS * PER_THREAD // (block * parts)
    tile = above(groups) if whole_rows else min(max(1, room), above(count * groups))
    threads = min(tile * block * parts // PER_THREAD, THREADS_OF_ROW if whole_rows else THREADS)
    warps = max(1, threads // lanes)
    even = length % group == 0 and width == block
    return Tiling(length, how.name, how.top, group, groups, width, block, tile, even, warps)


def above(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def compiles(how: Format, device: torch.device) -> bool:
    """Whether Triton has the format's dtype on this device: e4m3 came with compute capability 8.9."""
    if how.dtype != torch.float8_e4m3fn or device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def by_rows(x: Given) -> Given:
    """With neighbours of a row side by side; rows may lie anywhere."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Given) -> Given:
    """With nothing between its elements."""
    return x if x is None else x.contiguous()


def stride(x: Tensor | None) -> int:
    """From row to row."""
    return 0 if x is None else x.stride(0)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x)


@triton.jit
def groups_of_program(count, programs, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """(sample, row of the tensor [TILE], number of the group in its row [TILE], whether there is one [TILE]).

    Positions need 64 bits, and their division is dear: it is done once, for the first group.
    """
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * TILE
    row = first // GROUPS
    number = (first - row * GROUPS).to(tl.int32) + tl.arange(0, TILE)
    row += number // GROUPS
    return sample, sample * count + row, number % GROUPS, row < count


@triton.jit
def columns_of(
    number,
    there,
    part: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(column [TILE, BLOCK], whether there is one) of the values of a part."""
    i = tl.arange(0, BLOCK)[None, :]
    columns = number[:, None] * GROUP + (i + part * WIDTH)
    inside = there[:, None]
    if not EVEN:
        inside = inside & (i < WIDTH) & (columns < LENGTH)
    return columns, inside


@triton.jit
def columns_of_codes(
    number,
    there,
    LENGTH: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """As ``columns_of``, for codes. A group of four bits is a whole one, though values end before it."""
    i = tl.arange(0, BLOCK)[None, :]
    columns = number[:, None] * WIDTH + i
    inside = there[:, None]
    if not EVEN:
        inside = inside & (i < WIDTH)
        if FORMAT != "int4":
            inside = inside & (columns < LENGTH)
    return columns, inside


@triton.jit
def length_of_codes(LENGTH: tl.constexpr, FORMAT: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    length: tl.constexpr = GROUPS * WIDTH if FORMAT == "int4" else LENGTH
    return length


@triton.jit
def load(x, rows, stride, columns, inside):
    """Values of a tensor [R, L] as float32."""
    return tl.load(x + (rows * stride)[:, None] + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, rows, columns, inside, values, LENGTH: tl.constexpr):
    """Into a contiguous tensor [R, LENGTH], in its dtype."""
    tl.store(x + (rows * LENGTH)[:, None] + columns, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_columns(pair, which: tl.constexpr, columns, inside, LENGTH: tl.constexpr):
    """Values of one row of a tensor [2, LENGTH] as float32."""
    return tl.load(pair + which * LENGTH + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def zero_outside(values, inside):
    """The values, and 0 in masked lanes, whatever arithmetic made of them."""
    return tl.where(inside, values, 0.0)


@triton.jit
def load_codes(
    codes,
    scales,
    rows,
    number,
    there,
    LENGTH: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return (codes [TILE, BLOCK], scales [TILE]).

    ``other`` is 0, which four bits decode to -8 times the scale, and not 0x88, the code of zeros: Triton before
    3.9 extends the sign of a constant before it repeats it, and fills the bytes of a masked vector with 0x88, 0xff, ….
    """
    columns, inside = columns_of_codes(number, there, LENGTH, FORMAT, WIDTH, BLOCK, EVEN)
    places = codes + (rows * length_of_codes(LENGTH, FORMAT, GROUPS, WIDTH))[:, None] + columns
    found = tl.load(places, mask=inside, other=0.0)
    if FORMAT == "bf16":
        of_groups = rows  # not read
    else:
        of_groups = tl.load(scales + rows * GROUPS + number, mask=there, other=0.0)
    return found, of_groups


@triton.jit
def decode(codes, scales, part: tl.constexpr, FORMAT: tl.constexpr):
    """Values of a part, from what ``load_codes`` gave."""
    if FORMAT == "bf16":
        values = codes.to(tl.float32)
    elif FORMAT == "int4":
        values = (((codes.to(tl.int32) >> (4 * part)) & 15).to(tl.float32) - 8.0) * scales[:, None]
    else:
        values = codes.to(tl.float32) * scales[:, None]
    return values


@triton.jit
def total(values):
    """Of a tile."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def largest_of(x):
    """[TILE]: infinite where anything is not finite, for a maximum does not see NaN."""
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1)


@triton.jit
def encode(x, inverse, FORMAT: tl.constexpr, TOP: tl.constexpr):
    """Codes of a part's values, one in a byte."""
    z = x * inverse[:, None]
    z = tl.where(z == z, z, 0.0)
    if FORMAT == "int4":
        codes = (z + 8.5).to(tl.uint8)  # above zero: the cast is the floor
    elif FORMAT == "int8":
        codes = (z + tl.where(z >= 0, 0.5, -0.5)).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(z, -TOP), TOP).to(tl.float8e4nv)  # not all GPUs saturate
    return codes


@triton.jit
def store_codes(
    low,
    high,
    codes,
    scales,
    rows,
    number,
    there,
    LENGTH: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``encode`` of ``coding``. ``low``, and ``high`` where the format has a second part, hold 0 outside of rows."""
    columns, inside = columns_of_codes(number, there, LENGTH, FORMAT, WIDTH, BLOCK, EVEN)
    if FORMAT == "bf16":
        found = low
    else:
        largest = largest_of(low)
        if FORMAT == "int4":
            largest = tl.maximum(largest, largest_of(high))
        of_groups = tl.maximum(largest * (1.0 / TOP), TINY)
        of_groups = tl.where(largest < float("inf"), of_groups, float("nan"))
        tl.store(scales + rows * GROUPS + number, of_groups, mask=there)
        inverse = tl.div_rn(tl.full(of_groups.shape, 1.0, tl.float32), of_groups)
        found = encode(low, inverse, FORMAT, TOP)
        if FORMAT == "int4":
            found = found.to(tl.int32) | (encode(high, inverse, FORMAT, TOP).to(tl.int32) << 4)
    store(codes, rows, columns, inside, found, length_of_codes(LENGTH, FORMAT, GROUPS, WIDTH))
