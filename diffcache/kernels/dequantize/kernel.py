"""``dequantize`` in Triton: one program per tile of groups."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels import tiles
from diffcache.kernels.dequantize import twin
from diffcache.kernels.formats import format_of
from diffcache.kernels.tiles import columns_of, decode, groups_of_program, load, load_codes, load_columns, store


def launch(
    codes: Tensor,
    scales: Tensor,
    format: str,
    length: int,
    dtype: torch.dtype,
    affine: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Launch the kernel. The arguments and results are those of the plain form."""
    how, count = format_of(format), len(codes)
    if not tiles.compiles(how, codes.device):
        return twin.dequantize(codes, scales, format, length, dtype, affine, add)
    out = codes.new_empty(count, length, dtype=dtype)
    if not out.numel():
        return out
    tiling = tiles.tiling(how, count, length)
    programs = tiling.programs(count)
    add = tiles.by_rows(add)
    with tiles.on(codes):
        _dequantize[programs,](
            tiles.dense(codes),
            tiles.dense(scales),
            tiles.dense(affine),
            add,
            out,
            tiles.stride(add),
            count,
            programs,
            **tiling.launch,
        )
    return out


@triton.jit
def _dequantize(
    codes,
    scales,
    affine,
    add,
    out,
    add_stride,
    count,
    programs,
    LENGTH: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Dequantise a tile."""
    _, rows, number, there = groups_of_program(count, programs, GROUPS, TILE)
    found, of_groups = load_codes(codes, scales, rows, number, there, LENGTH, FORMAT, GROUPS, WIDTH, BLOCK, EVEN)
    for part in tl.static_range(2 if FORMAT == "int4" else 1):
        columns, inside = columns_of(number, there, part, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
        v = decode(found, of_groups, part, FORMAT)
        if affine is not None:
            v = v * load_columns(affine, 0, columns, inside, LENGTH) + load_columns(affine, 1, columns, inside, LENGTH)
        if add is not None:
            v += load(add, rows, add_stride, columns, inside)
        store(out, rows, columns, inside, v, LENGTH)
