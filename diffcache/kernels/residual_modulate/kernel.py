"""``residual_modulate`` in Triton: one program per row."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# (Triton interprets the annotations of its functions: only constexpr is allowed there.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels import tiles
from diffcache.kernels.formats import format_of
from diffcache.kernels.residual_modulate import twin
from diffcache.kernels.tiles import (
    columns_of,
    decode,
    groups_of_program,
    load,
    load_codes,
    load_columns,
    store,
    total,
    zero_outside,
)

LONGEST = 16384  # the longest row that a program holds in registers


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    affine: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. The arguments and results are those of the plain form."""
    how, (count, length) = format_of(format), x.shape
    if length > LONGEST or not tiles.compiles(how, x.device):
        return twin.residual_modulate(x, codes, scales, format, gate, shift, scale, affine, eps)
    out, y = x.new_empty(count, length), x.new_empty(count, length)
    if not x.numel():
        return out, y
    tiling = tiles.tiling(how, 1, length, whole_rows=True)
    x, gate, shift, scale = tiles.by_rows(x), tiles.by_rows(gate), tiles.by_rows(shift), tiles.by_rows(scale)
    with tiles.on(codes):
        _residual_modulate[count,](
            x,
            tiles.dense(codes),
            tiles.dense(scales),
            gate,
            shift,
            scale,
            tiles.dense(affine),
            out,
            y,
            tiles.stride(x),
            *(0 if of is None else tiles.stride(of) for of in (gate, shift, scale)),
            *(0 if of is None else count // len(of) for of in (gate, shift, scale)),
            float(eps),
            **tiling.launch,
        )
    return out, y


@triton.jit
def _its_row(of, stride, rows_of_sample):
    """Return the pointer to the numbers of the sample of this program's row."""
    return of + (tl.program_id(0) // rows_of_sample).to(tl.int64) * stride


@triton.jit
def _of_sample(of, columns, inside):
    """Load the numbers of a sample as float32."""
    return tl.load(of + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add(x, f, affine, gate, out, x_stride, rows, columns, inside, LENGTH: tl.constexpr):
    """Store the sum of the residual stream and the branch, and return it after rounding, with 0 outside of rows."""
    if affine is not None:
        f = f * load_columns(affine, 0, columns, inside, LENGTH) + load_columns(affine, 1, columns, inside, LENGTH)
    if gate is not None:
        f *= _of_sample(gate, columns, inside)
    v = (load(x, rows, x_stride, columns, inside) + f).to(out.dtype.element_ty)
    store(out, rows, columns, inside, v, LENGTH)
    return zero_outside(v.to(tl.float32), inside)


@triton.jit
def _modulate(v, mean, inverse, shift, scale, y, rows, columns, inside, LENGTH: tl.constexpr):
    """Store the modulated normalisation of a part."""
    v = (v - mean) * inverse
    if scale is not None:
        v *= 1.0 + _of_sample(scale, columns, inside)
    if shift is not None:
        v += _of_sample(shift, columns, inside)
    store(y, rows, columns, inside, v, LENGTH)


@triton.jit
def _squares(v, mean, inside):
    """Return the sum of squared deviations from the mean."""
    return total(zero_outside((v - mean) * (v - mean), inside))


@triton.jit
def _residual_modulate(
    x,
    codes,
    scales,
    gate,
    shift,
    scale,
    affine,
    out,
    y,
    x_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    gate_rows,
    shift_rows,
    scale_rows,
    eps,
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
    """Add the branch to one row of the residual stream, and normalise and modulate the row."""
    if gate is not None:
        gate = _its_row(gate, gate_stride, gate_rows)
    if shift is not None:
        shift = _its_row(shift, shift_stride, shift_rows)
    if scale is not None:
        scale = _its_row(scale, scale_stride, scale_rows)
    _, rows, number, there = groups_of_program(1, 1, GROUPS, TILE)
    found, of_groups = load_codes(codes, scales, rows, number, there, LENGTH, FORMAT, GROUPS, WIDTH, BLOCK, EVEN)
    columns, inside = columns_of(number, there, 0, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
    f = decode(found, of_groups, 0, FORMAT)
    low = _add(x, f, affine, gate, out, x_stride, rows, columns, inside, LENGTH)
    mean = total(low)
    if FORMAT == "int4":
        columns_1, inside_1 = columns_of(number, there, 1, LENGTH, GROUP, WIDTH, BLOCK, EVEN)
        f_1 = decode(found, of_groups, 1, FORMAT)
        high = _add(x, f_1, affine, gate, out, x_stride, rows, columns_1, inside_1, LENGTH)
        mean += total(high)
    mean = mean * (1.0 / LENGTH)
    squares = _squares(low, mean, inside)
    if FORMAT == "int4":
        squares += _squares(high, mean, inside_1)
    inverse = tl.div_rn(tl.full([1], 1.0, tl.float32), tl.sqrt_rn(squares * (1.0 / LENGTH) + eps))[:, None]
    _modulate(low, mean, inverse, shift, scale, y, rows, columns, inside, LENGTH)
    if FORMAT == "int4":
        _modulate(high, mean, inverse, shift, scale, y, rows, columns_1, inside_1, LENGTH)
