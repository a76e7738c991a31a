"""Relative error of latents, or of any other arrays: |found − reference| / |reference|, L2 over a sample."""

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
    """[N, ...] of any float dtype -> float64 [N]. Raises SamplesError where a sample of the reference is all zeros."""
    demand_pair("latent", found, reference, "[N, ...]")
    error, length = (np.empty(len(found)) for _ in range(2))
    for i, (a, b) in enumerate(zip(found, reference, strict=True)):  # one by one: the float64 copies stay small
        wide = np.asarray(b, np.float64)
        error[i], length[i] = np.linalg.norm((a - wide).ravel()), np.linalg.norm(wide.ravel())
    if not length.all():
        sample = int(np.argmin(length))
        raise SamplesError(
            "latent: reference", f"sample {sample} is all zeros", "samples with a length to compare with"
        )
    return error / length
