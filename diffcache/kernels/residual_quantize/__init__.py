"""Add a residual branch's output to the residual stream and quantise it, in one pass that reads the output once.

    residual_quantize(x, f, format, gate=None, prescale=None) -> out, codes, scales

    out = x + gate ⊙ f
    codes, scales = encode((f − prescale[0]) / prescale[1])      (kernels/coding.py)

Args:
    x: [R, L], floating-point, any strides: the residual stream.
    f: [R, L], floating-point, any strides: the output of the attention or the feed-forward.
    format: A name of FORMATS.
    gate: [S, L], floating-point, any strides. S divides R, and the rows of a sample are consecutive. None: 1.
    prescale: Floating-point [2, L], centre and spread of every column. None: 0 and 1.

Returns:
    out: [R, L] of x's dtype, new and contiguous.
    codes: As from ``quantize``.
    scales: As from ``quantize``.

Sums are computed in float32.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.residual_quantize import twin

SCHEMA = "(Tensor x, Tensor f, str format, Tensor? gate=None, Tensor? prescale=None) -> (Tensor, Tensor, Tensor)"


residual_quantize = Operation("residual_quantize", SCHEMA, twin.residual_quantize)
