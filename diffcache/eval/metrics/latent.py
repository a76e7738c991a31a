"""Relative L2 error of latents or other arrays: |found − reference| / |reference| for each sample."""

from __future__ import annotations

import math

import numpy as np

from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import SamplesError, demand_pair

RANGE = (0.0, math.inf)
ABOUT = About(
    "latent error",
    "",
    "lower",
    "How far the final latents lie from the full run's, as a share of their length (relative L2): 0 is identical, 1 is "
    "as far as no latents at all.",
    on_states=True,
)


def score(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the relative error, float64 [N], of two arrays [N, ...] of any float dtype.

    Raises:
        SamplesError: If the arrays are not valid, or a sample of the reference is all zeros.
    """
    demand_pair("latent", found, reference, "[N, ...]")
    error, length = (np.empty(len(found)) for _ in range(2))
    for i, (a, b) in enumerate(zip(found, reference, strict=True)):  # one by one, so that the float64 copies stay small
        wide = np.asarray(b, np.float64)
        error[i], length[i] = np.linalg.norm((a - wide).ravel()), np.linalg.norm(wide.ravel())
    if not length.all():
        sample = int(np.argmin(length))
        raise SamplesError(
            "latent: reference", f"sample {sample} is all zeros", "samples with a length to compare with"
        )
    return error / length
