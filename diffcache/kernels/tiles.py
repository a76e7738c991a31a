"""Cut tensors into tiles of rows for Triton kernels, and encode and decode one tile.

A tile is [TILE, BLOCK]: TILE groups, each with its values in a row. Formats of four bits have two tiles of half a group
("parts"), so that the two codes of a byte are at the same place of both. A program has groups of one sample only. It
therefore reads one row of numbers that belong to samples, and its sums are those of one sample.

The values of masked lanes are undefined, and results must not depend on them. A value is stored under a mask, or passes
``zero_outside`` before it enters a sum or a maximum.

Every operation rounds as in torch: divisions and casts round to nearest even, and nothing is contracted to a
multiply-add.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

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

THREADS = 128  # the threads of a program
THREADS_OF_ROW = 512  # the most threads of a program that has a whole row
PER_THREAD = 16  # values of a thread: as many codes of one byte as a thread can store at once
FLAT = 128  # the values of a group in formats without groups


@dataclass(frozen=True)
class Tiling:
    """Compile-time constants of a kernel.

    Attributes:
        LENGTH: The length of a row.
        FORMAT: The name of the format.
        TOP: The code of the largest magnitude of a group.
        GROUP: The number of values of a group.
        GROUPS: The number of groups of a row.
        WIDTH: The number of values of a part.
        BLOCK: The least power of two that is not below WIDTH.
        TILE: The number of groups of a program.
        EVEN: Whether groups fill rows and parts fill BLOCK, so that no column is masked.
        num_warps: The number of warps of a program.
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
        """Return the keyword arguments of a launch. Without fusion, ``a * b + c`` is rounded twice, as in torch."""
        return asdict(self) | {"enable_fp_fusion": False}

    def programs(self, count: int) -> int:
        """Return the number of programs for ``count`` rows."""
        return math.ceil(count * self.GROUPS / self.TILE)


def tiling(how: Format, count: int, length: int, *, whole_rows: bool = False) -> Tiling:
    """Return the tiling on this machine.

    Args:
        how: The format.
        count: The number of rows of a sample.
        length: The length of a row.
        whole_rows: Whether a program has one row of any length.
    """
    return tiling_for(32 if torch.version.hip is None else 64, how, count, length, whole_rows=whole_rows)


@functools.cache
def tiling_for(lanes: int, how: Format, count: int, length: int, *, whole_rows: bool) -> Tiling:
    """Return the tiling for warps of ``lanes`` threads. The other arguments are those of ``tiling``."""
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
    """Return the smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def compiles(how: Format, device: torch.device) -> bool:
    """Return whether Triton supports the format's dtype on this device. CUDA has e4m3 since compute capability 8.9."""
    if how.dtype != torch.float8_e4m3fn or device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def by_rows(x: Given) -> Given:
    """Return ``x`` with the values of a row next to each other in memory. Rows may have any stride."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Given) -> Given:
    """Return ``x`` as a contiguous tensor."""
    return x if x is None else x.contiguous()


def stride(x: Tensor | None) -> int:
    """Return the distance between two rows in elements; 0 without a tensor."""
    return 0 if x is None else x.stride(0)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context with the tensor's device as the current one, on which Triton launches."""
    return torch.cuda.device_of(x)


@triton.jit
def groups_of_program(count, programs, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """Return the groups of this program.

    Positions need 64 bits, and their division is slow, so it is done once, for the first group.

    Returns:
        The sample, the row of the tensor [TILE], the number of the group in its row [TILE], and whether the group
        exists [TILE].
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
    """Return the columns of the values of a part, [TILE, BLOCK], and whether they exist."""
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
    """Return the columns of the codes, [TILE, BLOCK], and whether they exist.

    The codes of the last group in formats of four bits are padded to a whole group.
    """
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
    """Return the number of codes of a row."""
    length: tl.constexpr = GROUPS * WIDTH if FORMAT == "int4" else LENGTH
    return length


@triton.jit
def load(x, rows, stride, columns, inside):
    """Load values of a tensor [R, L] as float32."""
    return tl.load(x + (rows * stride)[:, None] + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, rows, columns, inside, values, LENGTH: tl.constexpr):
    """Store values in a contiguous tensor [R, LENGTH], in its dtype."""
    tl.store(x + (rows * LENGTH)[:, None] + columns, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_columns(pair, which: tl.constexpr, columns, inside, LENGTH: tl.constexpr):
    """Load values of one row of a tensor [2, LENGTH] as float32."""
    return tl.load(pair + which * LENGTH + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def zero_outside(values, inside):
    """Return the values, with 0 in masked lanes."""
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
    """Return the codes [TILE, BLOCK] and the scales [TILE].

    ``other`` is 0, which decodes to -8 times the scale with four bits. It is not 0x88, the code of zeros, because
    Triton before 3.9 extends the sign of a constant before it repeats it, and fills the bytes of a masked vector with
    0x88, 0xff, ….
    """
    columns, inside = columns_of_codes(number, there, LENGTH, FORMAT, WIDTH, BLOCK, EVEN)
    places = codes + (rows * length_of_codes(LENGTH, FORMAT, GROUPS, WIDTH))[:, None] + columns
    found = tl.load(places, mask=inside, other=0.0)
    if FORMAT == "bf16":
        of_groups = rows  # the kernel does not read it
    else:
        of_groups = tl.load(scales + rows * GROUPS + number, mask=there, other=0.0)
    return found, of_groups


@triton.jit
def decode(codes, scales, part: tl.constexpr, FORMAT: tl.constexpr):
    """Return the values of a part, from the codes and scales of ``load_codes``."""
    if FORMAT == "bf16":
        values = codes.to(tl.float32)
    elif FORMAT == "int4":
        values = (((codes.to(tl.int32) >> (4 * part)) & 15).to(tl.float32) - 8.0) * scales[:, None]
    else:
        values = codes.to(tl.float32) * scales[:, None]
    return values


@triton.jit
def total(values):
    """Return the sum over a tile."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def largest_of(x):
    """Return the largest magnitude of each group, [TILE].

    It is infinite if a value is not finite, because a maximum ignores NaN.
    """
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1)


@triton.jit
def encode(x, inverse, FORMAT: tl.constexpr, TOP: tl.constexpr):
    """Return the codes of a part's values, one per byte."""
    z = x * inverse[:, None]
    z = tl.where(z == z, z, 0.0)
    if FORMAT == "int4":
        codes = (z + 8.5).to(tl.uint8)  # positive values, for which the cast is the floor
    elif FORMAT == "int8":
        codes = (z + tl.where(z >= 0, 0.5, -0.5)).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(z, -TOP), TOP).to(tl.float8e4nv)  # the cast does not saturate on every GPU
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
    """Encode a tile as ``coding.encode`` does, and store codes and scales.

    ``low``, and ``high`` if the format has a second part, must be 0 outside of rows.
    """
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
