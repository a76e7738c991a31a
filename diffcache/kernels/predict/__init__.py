"""Compute equation (1) from quantised tensors in one pass.

    predict(codes, scales, weights, format, length, dtype, prescale=None, x=None, kappa=0.0, scale=None, bias=None)
        -> out

    F_k = prescale[k, 1] ⊙ decode(codes[k], scales[k]) + prescale[k, 0]          (kernels/coding.py)
    out = scale ⊙ ( Σ_k weights[k] · F_k + kappa · x ) + bias

Args:
    codes: K ≥ 1 tensors of codes from ``quantize``, contiguous. An input x_0 that κ refers to is one more of them, with
        the weight −κ.
    scales: K tensors of scales from ``quantize``, contiguous.
    weights: K numbers.
    format: A name of FORMATS.
    length: The length of a row.
    dtype: The dtype of the result.
    prescale: Floating-point [K, 2, length], the prescales of the tensors. None: 0 and 1.
    x: [R, length], floating-point, any strides, or None.
    kappa: The weight of ``x``.
    scale: float32 [1, length], one number per column, or [C, 1], one number per row. Row r uses entry r mod C, and C
        divides R. None: 1.
    bias: Like ``scale``. None: 0.

Returns:
    out: [R, length] of ``dtype``, new and contiguous. Sums are computed in float32.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.predict import twin

SCHEMA = (
    "(Tensor[] codes, Tensor[] scales, float[] weights, str format, int length, ScalarType dtype, "
    "Tensor? prescale=None, Tensor? x=None, float kappa=0.0, Tensor? scale=None, Tensor? bias=None) -> Tensor"
)


predict = Operation("predict", SCHEMA, twin.predict)
