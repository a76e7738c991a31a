"""A residual branch's end, and its storing, in one pass: the branch's output is read once.

residual_quantize(x, f, format, gate=None, prescale=None) -> out, codes, scales

    out = x + gate ⊙ f;  codes, scales = encode((f − prescale[0]) / prescale[1])      (kernels/coding.py)

x                [R, L], floating-point, any strides: the residual stream
f                [R, L], floating-point, any strides: what attention or feed-forward returned
gate             [S, L], floating-point, any strides; S divides R, rows of a sample lie together; None: 1
prescale         floating-point [2, L]: centre and spread of every column; None: 0 and 1

out              [R, L] of x's dtype, new and contiguous
codes, scales    as of ``quantize``

Sums run in float32.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.residual_quantize import twin

SCHEMA = "(Tensor x, Tensor f, str format, Tensor? gate=None, Tensor? prescale=None) -> (Tensor, Tensor, Tensor)"


residual_quantize = Operation("residual_quantize", SCHEMA, twin.residual_quantize)
