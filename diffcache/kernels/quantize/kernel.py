"""``quantize`` in Triton: one program per tile of groups, and a second launch that adds up partial sums."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels import tiles
from diffcache.kernels.formats import format_of
from diffcache.kernels.quantize import twin
from diffcache.kernels.tiles import (
    columns_of,
    decode,
    groups_of_program,
    load,
    load_codes,
    load_columns,
    store_codes,
    total,
    zero_outside,
)

AT_ONCE = 4096  # the most partial sums that a program reads at once


def launch(
    x: Tensor,
    format: str,
    minus: Tensor | None = None,
    prescale: Tensor | None = None,
    previous_codes: Tensor | None = None,
    previous_scales: Tensor | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels. The arguments and results are those of the plain form."""
    how, (count, length) = format_of(format), x.shape
    if not tiles.compiles(how, x.device):
        return twin.quantize(x, format, minus, prescale, previous_codes, previous_scales, samples)
    compared = previous_codes is not None and previous_scales is not None
    codes = x.new_empty(count, how.codes(length), dtype=how.dtype)
    scales = x.new_empty(count, how.groups(length), dtype=torch.float32)
    sums = x.new_zeros(samples if compared else 0, 6, dtype=torch.float32)
    if not x.numel():
        return codes, scales, sums
    samples = samples if compared else 1  # only the sums depend on the samples
    tiling = tiles.tiling(how, count // samples, length)
    programs = tiling.programs(count // samples)
    partial = x.new_empty(samples, 6, programs, dtype=torch.float32) if compared else None
    x, minus = tiles.by_rows(x), tiles.by_rows(minus)
    with tiles.on(x):
        _quantize[programs * samples,](
            x,
            minus,
            tiles.dense(prescale),
            tiles.dense(previous_codes) if compared else None,
            tiles.dense(previous_scales) if compared else None,
            codes,
            scales,
            partial,
            tiles.stride(x),
            tiles.stride(minus),
            count // samples,
            programs,
            **tiling.launch,
        )
        if compared:
            block = min(AT_ONCE, tiles.above(programs))
            options = {"num_warps": max(1, block // 512), "enable_fp_fusion": False}
            _add_up[samples * 6,](partial, sums, programs, BLOCK=block, **options)
    return codes, scales, sums


@triton.jit
def _difference(x, minus, rows, x_stride, minus_stride, columns, inside):
    """Return ``x - minus`` as float32."""
    d = load(x, rows, x_stride, columns, inside)
    if minus is not None:
        d -= load(minus, rows, minus_stride, columns, inside)
    return d


@triton.jit
def _scaled(d, prescale, columns, inside, LENGTH: tl.constexpr):
    """Return the values after the prescale, with 0 outside of rows."""
    if prescale is not None:
        d -= load_columns(prescale, 0, columns, inside, LENGTH)
        d = tl.div_rn(d, load_columns(prescale, 1, columns, inside, LENGTH))
    return zero_outside(d, inside)


@triton.jit
def _kept(codes, of_groups, part: tl.constexpr, prescale, columns, inside, LENGTH: tl.constexpr, FORMAT: tl.constexpr):
    """Return the previous values of a part, decoded."""
    p = decode(codes, of_groups, part, FORMAT)
    if prescale is not None:
        p = p * load_columns(prescale, 1, columns, inside, LENGTH) + load_columns(prescale, 0, columns, inside, LENGTH)
    return p


@triton.jit
def _sums(d, p, inside):
    """Return the six sums over a tile."""
    d, p = zero_outside(d, inside), zero_outside(p, inside)
    e = d - p
    return total(tl.abs(e)), total(tl.abs(p)), total(e * e), total(p * p), total(d * p), total(d * d)


@triton.jit
def _quantize(
    x,
    minus,
    prescale,
    previous_codes,
    previous_scales,
    codes,
    scales,
    partial,
    x_stride,
    minus_stride,
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
    """Quantise a tile, and store the partial sums of the comparison."""
    sample, rows, number, there = groups_of_program(count, programs, GROUPS, TILE)
    columns, inside = columns_of(number, there, 0, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
    d = _difference(x, minus, rows, x_stride, minus_stride, columns, inside)
    low = _scaled(d, prescale, columns, inside, LENGTH)
    high = low
    if FORMAT == "int4":
        columns_1, inside_1 = columns_of(number, there, 1, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
        d_1 = _difference(x, minus, rows, x_stride, minus_stride, columns_1, inside_1)
        high = _scaled(d_1, prescale, columns_1, inside_1, LENGTH)
    if partial is not None:
        before, of_groups = load_codes(
            previous_codes, previous_scales, rows, number, there, LENGTH, FORMAT, GROUPS, WIDTH, BLOCK, EVEN
        )
        p = _kept(before, of_groups, 0, prescale, columns, inside, LENGTH, FORMAT)
        a, b, c, e, f, g = _sums(d, p, inside)
        if FORMAT == "int4":
            p_1 = _kept(before, of_groups, 1, prescale, columns_1, inside_1, LENGTH, FORMAT)
            a_1, b_1, c_1, e_1, f_1, g_1 = _sums(d_1, p_1, inside_1)
            a, b, c, e, f, g = a + a_1, b + b_1, c + c_1, e + e_1, f + f_1, g + g_1
        place = partial + sample * 6 * programs + tl.program_id(0) % programs
        tl.store(place, a)
        tl.store(place + programs, b)
        tl.store(place + 2 * programs, c)
        tl.store(place + 3 * programs, e)
        tl.store(place + 4 * programs, f)
        tl.store(place + 5 * programs, g)
    store_codes(low, high, codes, scales, rows, number, there, LENGTH, FORMAT, TOP, GROUPS, WIDTH, BLOCK, EVEN)


@triton.jit
def _add_up(partial, sums, programs, BLOCK: tl.constexpr):
    """Add partial sums up, [sums, programs] -> [sums], in a fixed order."""
    here = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, programs, BLOCK):
        inside = first + i < programs
        total += zero_outside(tl.load(partial + here * programs + first + i, mask=inside, other=0.0), inside)
    tl.store(sums + here, tl.sum(total, axis=0))
