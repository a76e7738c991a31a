"""Quantise a tensor in one pass, and compare it with an earlier one in the same pass.

    quantize(x, format, minus=None, prescale=None, previous_codes=None, previous_scales=None, samples=1)
        -> codes, scales, sums

    d = x − minus
    codes, scales = encode((d − prescale[0]) / prescale[1])      (kernels/coding.py)

Args:
    x: [R, L], floating-point, any strides.
    format: A name of FORMATS.
    minus: [R, L], floating-point. The difference x − minus is quantised. None: 0.
    prescale: Floating-point [2, L], centre and spread of every column. None: 0 and 1.
    previous_codes: Codes of the same format and prescale that ``sums`` compares with, or None.
    previous_scales: The scales of these codes, or None.
    samples: S, which divides R. The rows of a sample are consecutive.

Returns:
    codes: [R, codes] of the format's dtype, contiguous.
    scales: float32 [R, groups], contiguous.
    sums: float32 [S, 6], the sums Σ|d−p|, Σ|p|, Σ(d−p)², Σp², Σdp, Σd² over each sample, where p is decoded from the
        previous codes. [0, 6] without previous codes. The relative L1 distance is sums[0] / sums[1], the cosine
        sums[4] / √(sums[3] sums[5]).

Sums of values that are not finite are not finite. A criterion that compares them with a threshold then computes the
step.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.quantize import twin

SCHEMA = (
    "(Tensor x, str format, Tensor? minus=None, Tensor? prescale=None, Tensor? previous_codes=None, "
    "Tensor? previous_scales=None, int samples=1) -> (Tensor, Tensor, Tensor)"
)


quantize = Operation("quantize", SCHEMA, twin.quantize)
