"""Load, dequantise, correct per channel and add, in one pass.

dequantize(codes, scales, format, length, dtype, affine=None, add=None) -> out [R, length] of dtype

    out = affine[0] ⊙ decode(codes, scales) + affine[1] + add                    (kernels/coding.py)

codes, scales    as ``quantize`` gave them, contiguous
affine           float32 [2, length]: factor and offset of every column; None: 1 and 0. CacheQuant's correction
                 (arXiv 2503.01323) folds into it with the prescale: factor a·spread, offset a·centre + b
add              [R, length], floating-point, any strides: the residual stream that the kept difference belongs to

Sums run in float32. ``out`` is new and contiguous.
"""

from __future__ import annotations

from diffcache.kernels.dequantize import twin
from diffcache.kernels.library import Operation

SCHEMA = (
    "(Tensor codes, Tensor scales, str format, int length, ScalarType dtype, Tensor? affine=None, Tensor? add=None) "
    "-> Tensor"
)


dequantize = Operation("dequantize", SCHEMA, twin.dequantize)
