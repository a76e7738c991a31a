"""PSNR of the final state, the quantity in which a schedule states its ``expected`` fidelity.

The peak is the range of the full run's final state, sample by sample.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import demand_pair

ABOUT = About(
    "state PSNR",
    "dB",
    "higher",
    "PSNR of the final state against the full run's, whose range is the peak: what a schedule's expected fidelity is "
    "stated in. It is another number than the PSNR of the decoded picture.",
    on_states=True,
)
RANGE = (-math.inf, 980.0)  # the range of float32 over LEAST
LEAST = 1e-20  # least mean squared error, also for equal states


def score(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the PSNR in dB, float64 [N], of two arrays [N, ...] of any float dtype.

    Raises:
        SamplesError: If the arrays are not valid.
    """
    demand_pair("state", found, reference, "[N, ...]")
    psnr = np.empty(len(found))
    for i, (a, b) in enumerate(zip(found, reference, strict=True)):  # one by one, so that the float64 copies stay small
        wide = np.asarray(b, np.float64)
        error = max(float(np.square(np.asarray(a, np.float64) - wide).mean()), LEAST)
        psnr[i] = 10 * np.log10(max(float(np.ptp(wide)), LEAST) ** 2 / error)
    return psnr
