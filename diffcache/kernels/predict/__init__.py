"""Equation (1) straight from what is kept: K quantised tensors in, the prediction out, in one pass.

predict(codes, scales, weights, format, length, dtype, prescale=None, x=None, kappa=0.0, scale=None, bias=None)
    -> out [R, length] of dtype

    F_k = prescale[k, 1] ⊙ decode(codes[k], scales[k]) + prescale[k, 0]          (kernels/coding.py)
    out = scale ⊙ ( Σ_k weights[k] · F_k + kappa · x ) + bias

codes, scales    K ≥ 1 of each, as ``quantize`` gave them, contiguous. An input x_0 that κ refers to is one more of
                 them, with the weight −κ
weights          K numbers
prescale         floating-point [K, 2, length], as they were quantised with
x                [R, length], floating-point, any strides
scale, bias      float32 [1, length], a number for every column, or [C, 1], for every row; the rows after the first C
                 begin again (C divides R)

Sums run in float32. ``out`` is new and contiguous.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.predict import twin

SCHEMA = (
    "(Tensor[] codes, Tensor[] scales, float[] weights, str format, int length, ScalarType dtype, "
    "Tensor? prescale=None, Tensor? x=None, float kappa=0.0, Tensor? scale=None, Tensor? bias=None) -> Tensor"
)


predict = Operation("predict", SCHEMA, twin.predict)
