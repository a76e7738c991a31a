"""``residual_quantize`` in Triton: one program per tile of groups."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels import tiles
from diffcache.kernels.formats import format_of
from diffcache.kernels.residual_quantize import twin
from diffcache.kernels.tiles import columns_of, groups_of_program, load, load_columns, store, store_codes, zero_outside


def launch(
    x: Tensor, f: Tensor, format: str, gate: Tensor | None = None, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel. The arguments and results are those of the plain form."""
    how, (count, length) = format_of(format), x.shape
    if not tiles.compiles(how, x.device):
        return twin.residual_quantize(x, f, format, gate, prescale)
    out = x.new_empty(count, length)
    codes = x.new_empty(count, how.codes(length), dtype=how.dtype)
    scales = x.new_empty(count, how.groups(length), dtype=torch.float32)
    if not x.numel():
        return out, codes, scales
    samples = 1 if gate is None else len(gate)
    tiling = tiles.tiling(how, count // samples, length)
    programs = tiling.programs(count // samples)
    x, f, gate = tiles.by_rows(x), tiles.by_rows(f), tiles.by_rows(gate)
    with tiles.on(x):
        _residual_quantize[programs * samples,](
            x,
            f,
            gate,
            tiles.dense(prescale),
            out,
            codes,
            scales,
            tiles.stride(x),
            tiles.stride(f),
            tiles.stride(gate),
            count // samples,
            programs,
            **tiling.launch,
        )
    return out, codes, scales


@triton.jit
def _add(
    x,
    f,
    gate,
    prescale,
    out,
    x_stride,
    f_stride,
    gate_stride,
    sample,
    rows,
    columns,
    inside,
    LENGTH: tl.constexpr,
):
    """Store the sum, and return the values to quantise, with 0 outside of rows."""
    step = load(f, rows, f_stride, columns, inside)
    kept = step
    if prescale is not None:
        kept = kept - load_columns(prescale, 0, columns, inside, LENGTH)
        kept = tl.div_rn(kept, load_columns(prescale, 1, columns, inside, LENGTH))
    if gate is not None:
        step *= tl.load(gate + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    store(out, rows, columns, inside, load(x, rows, x_stride, columns, inside) + step, LENGTH)
    return zero_outside(kept, inside)


@triton.jit
def _residual_quantize(
    x,
    f,
    gate,
    prescale,
    out,
    codes,
    scales,
    x_stride,
    f_stride,
    gate_stride,
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
    """Add a tile of the branch to the residual stream, and quantise it."""
    sample, rows, number, there = groups_of_program(count, programs, GROUPS, TILE)
    columns, inside = columns_of(number, there, 0, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
    low = _add(x, f, gate, prescale, out, x_stride, f_stride, gate_stride, sample, rows, columns, inside, LENGTH)
    high = low
    if FORMAT == "int4":
        columns, inside = columns_of(number, there, 1, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
        high = _add(x, f, gate, prescale, out, x_stride, f_stride, gate_stride, sample, rows, columns, inside, LENGTH)
    store_codes(low, high, codes, scales, rows, number, there, LENGTH, FORMAT, TOP, GROUPS, WIDTH, BLOCK, EVEN)
