"""Quantise and store, in one pass over the tensor; with it the difference to another, and how far it is from the last.

quantize(x, format, minus=None, prescale=None, previous_codes=None, previous_scales=None, samples=1)
    -> codes, scales, sums

    d = x − minus;  codes, scales = encode((d − prescale[0]) / prescale[1])      (kernels/coding.py)

x                [R, L], floating-point, any strides
format           a name of FORMATS
minus            [R, L], floating-point; what is kept is the difference
prescale         floating-point [2, L]: centre and spread of every column; None: 0 and 1
previous_*       codes and scales of the same format and prescale, that the sums compare with
samples          S, divides R: rows of a sample lie together

codes            [R, codes] of the format's dtype;  scales  float32 [R, groups];  both contiguous
sums             float32 [S, 6] over each sample: Σ|d−p|, Σ|p|, Σ(d−p)², Σp², Σdp, Σd², p being what was kept before;
                 [0, 6] without it. Relative L1 is sums[0] / sums[1], the cosine sums[4] / √(sums[3] sums[5])

Sums of what is not finite are not finite: a host that compares them with a threshold computes.
"""

from __future__ import annotations

from diffcache.kernels.library import Operation
from diffcache.kernels.quantize import twin

SCHEMA = (
    "(Tensor x, str format, Tensor? minus=None, Tensor? prescale=None, Tensor? previous_codes=None, "
    "Tensor? previous_scales=None, int samples=1) -> (Tensor, Tensor, Tensor)"
)


quantize = Operation("quantize", SCHEMA, twin.quantize)
