"""Add the kept output of a skipped residual branch and apply the normalisation after it, in one pass.

    residual_modulate(x, codes, scales, format, gate=None, shift=None, scale=None, affine=None, eps=1e-6) -> out, y

    out = x + gate ⊙ (affine[0] ⊙ decode(codes, scales) + affine[1])            (kernels/coding.py)
    y   = (1 + scale) ⊙ LayerNorm(out) + shift                                   (adaLN, arXiv 2212.09748)

Args:
    x: [R, L], floating-point, any strides: the residual stream.
    codes: Codes from ``quantize``, contiguous: the branch's output at an earlier step.
    scales: The scales of these codes, contiguous.
    format: A name of FORMATS.
    gate: [S, L], floating-point, any strides. S divides R, and the rows of a sample are consecutive. None: 1.
    shift: [S, L], like ``gate``. None: 0.
    scale: [S, L], like ``gate``. None: 0.
    affine: float32 [2, L], factor and offset of every column. None: 1 and 0.
    eps: The epsilon of the LayerNorm, which has no weights.

Returns:
    out: [R, L] of x's dtype, new and contiguous.
    y: [R, L] of x's dtype, new and contiguous. The LayerNorm is applied to ``out`` after it was rounded.

Sums are computed in float32.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.residual_modulate import twin

SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, str format, Tensor? gate=None, Tensor? shift=None, Tensor? scale=None, "
    "Tensor? affine=None, float eps=1e-6) -> (Tensor, Tensor)"
)


residual_modulate = Operation("residual_modulate", SCHEMA, twin.residual_modulate)
