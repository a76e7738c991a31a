"""Dequantise a tensor, correct it per column and add another, in one pass.

    dequantize(codes, scales, format, length, dtype, affine=None, add=None) -> out

    out = affine[0] ⊙ decode(codes, scales) + affine[1] + add                    (kernels/coding.py)

Args:
    codes: Codes from ``quantize``, contiguous.
    scales: Scales from ``quantize``, contiguous.
    format: A name of FORMATS.
    length: The length of a row.
    dtype: The dtype of the result.
    affine: float32 [2, length], factor and offset of every column. None: 1 and 0. CacheQuant's correction (arXiv
        2503.01323) can be combined with the prescale: factor a · spread, offset a · centre + b.
    add: [R, length], floating-point, any strides: the residual stream to which a kept difference is added. None: 0.

Returns:
    out: [R, length] of ``dtype``, new and contiguous. Sums are computed in float32.
"""

from __future__ import annotations

from diffcache.kernels.dequantize import twin
from diffcache.kernels.library import Operation

SCHEMA = (
    "(Tensor codes, Tensor scales, str format, int length, ScalarType dtype, Tensor? affine=None, Tensor? add=None) "
    "-> Tensor"
)


dequantize = Operation("dequantize", SCHEMA, twin.dequantize)
