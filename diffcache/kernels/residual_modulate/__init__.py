"""A skipped residual branch, and the normalisation that comes after it, in one pass over the residual stream.

residual_modulate(x, codes, scales, format, gate=None, shift=None, scale=None, affine=None, eps=1e-6) -> out, y

    out = x + gate ⊙ (affine[0] ⊙ decode(codes, scales) + affine[1])            (kernels/coding.py)
    y   = (1 + scale) ⊙ LayerNorm(out) + shift                                   (adaLN, arXiv 2212.09748)

x                [R, L], floating-point, any strides: the residual stream
codes, scales    as ``quantize`` gave them, contiguous: the branch's output at an earlier step
gate             [S, L], floating-point, any strides; S divides R, rows of a sample lie together; None: 1
shift, scale     [S, L], as gate; None: 0
affine           float32 [2, L]: factor and offset of every column; None: 1 and 0
eps              of the LayerNorm, which has no weights

out, y           [R, L] of x's dtype, new and contiguous; LayerNorm sees ``out`` as it was rounded

Sums run in float32.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.residual_modulate import twin

SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, str format, Tensor? gate=None, Tensor? shift=None, Tensor? scale=None, "
    "Tensor? affine=None, float eps=1e-6) -> (Tensor, Tensor)"
)


residual_modulate = Operation("residual_modulate", SCHEMA, twin.residual_modulate)
