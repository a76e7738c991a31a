"""``predict`` in Triton: one program per tile of groups, which reads all anchors."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels import tiles
from diffcache.kernels.formats import format_of
from diffcache.kernels.predict import twin
from diffcache.kernels.tiles import columns_of, decode, groups_of_program, load, load_codes, load_columns, store

MOST = 8  # the most anchors; the kernel has a pointer for each


def launch(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    format: str,
    length: int,
    dtype: torch.dtype,
    prescale: Tensor | None = None,
    x: Tensor | None = None,
    kappa: float = 0.0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Launch the kernel. The arguments and results are those of the plain form."""
    how, count = format_of(format), len(codes[0])
    coefficients = [c for c in (scale, bias) if c is not None]
    if (
        len(codes) > MOST
        or any(len(c) > 1 < c.shape[1] for c in coefficients)
        or not tiles.compiles(how, codes[0].device)
    ):
        return twin.predict(codes, scales, weights, format, length, dtype, prescale, x, kappa, scale, bias)
    out = codes[0].new_empty(count, length, dtype=dtype)
    if not out.numel():
        return out
    # With coefficients per row, a sample has as many rows as there are coefficients, and the row in the sample is the
    # index of its coefficient.
    own = math.lcm(*map(len, coefficients))
    rows = own if own > 1 else count
    tiling = tiles.tiling(how, rows, length)
    programs = tiling.programs(rows)
    x = tiles.by_rows(x)
    absent = [None] * (MOST - len(codes))
    with tiles.on(codes[0]):
        _predict[programs * (count // rows),](
            *map(tiles.dense, codes),
            *absent,
            *map(tiles.dense, scales),
            *absent,
            *map(float, weights),
            *absent,
            tiles.dense(prescale),
            x,
            float(kappa),
            _laid_out(scale, own, length),
            _laid_out(bias, own, length),
            out,
            tiles.stride(x),
            rows,
            programs,
            ANCHORS=len(codes),
            SCALE_OF_ROWS=_of_rows(scale),
            BIAS_OF_ROWS=_of_rows(bias),
            **tiling.launch,
        )
    return out


def _of_rows(coefficients: Tensor | None) -> bool:
    """Return whether there is one coefficient per row."""
    return coefficients is not None and len(coefficients) > 1


def _laid_out(coefficients: Tensor | None, own: int, length: int) -> Tensor | None:
    """Return coefficients as one for each row of a sample, or one for each column; None without coefficients."""
    if coefficients is None:
        return None
    if _of_rows(coefficients):
        return coefficients.repeat(own // len(coefficients), 1)
    return coefficients.expand(1, length).contiguous()


@triton.jit
def _coefficients(of, rows, columns, inside, there, OF_ROWS: tl.constexpr):
    """Load the coefficients of a tile."""
    if OF_ROWS:
        values = tl.load(of + rows, mask=there, other=0.0)[:, None]
    else:
        values = tl.load(of + columns, mask=inside, other=0.0)
    return values


@triton.jit
def _predict(
    codes_0,
    codes_1,
    codes_2,
    codes_3,
    codes_4,
    codes_5,
    codes_6,
    codes_7,
    scales_0,
    scales_1,
    scales_2,
    scales_3,
    scales_4,
    scales_5,
    scales_6,
    scales_7,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    weight_5,
    weight_6,
    weight_7,
    prescale,
    x,
    kappa,
    scale,
    bias,
    out,
    x_stride,
    count,
    programs,
    ANCHORS: tl.constexpr,
    SCALE_OF_ROWS: tl.constexpr,
    BIAS_OF_ROWS: tl.constexpr,
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
    """Predict a tile from all anchors."""
    sample, rows, number, there = groups_of_program(count, programs, GROUPS, TILE)
    low = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    high = low
    codes = (codes_0, codes_1, codes_2, codes_3, codes_4, codes_5, codes_6, codes_7)
    scales = (scales_0, scales_1, scales_2, scales_3, scales_4, scales_5, scales_6, scales_7)
    weights = (weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
    for k in tl.static_range(ANCHORS):
        found, groups = load_codes(codes[k], scales[k], rows, number, there, LENGTH, FORMAT, GROUPS, WIDTH, BLOCK, EVEN)
        for part in tl.static_range(2 if FORMAT == "int4" else 1):
            f = decode(found, groups, part, FORMAT)
            if prescale is not None:
                columns, inside = columns_of(number, there, part, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
                mine = prescale + k * 2 * LENGTH
                f = f * load_columns(mine, 1, columns, inside, LENGTH) + load_columns(mine, 0, columns, inside, LENGTH)
            if part == 0:
                low += f * weights[k]
            else:
                high += f * weights[k]
    own = rows - sample * count
    for part in tl.static_range(2 if FORMAT == "int4" else 1):
        columns, inside = columns_of(number, there, part, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
        v = low if part == 0 else high
        if x is not None:
            v += load(x, rows, x_stride, columns, inside) * kappa
        if scale is not None:
            v *= _coefficients(scale, own, columns, inside, there, SCALE_OF_ROWS)
        if bias is not None:
            v += _coefficients(bias, own, columns, inside, there, BIAS_OF_ROWS)
        store(out, rows, columns, inside, v, LENGTH)
