"""Arguments of ``quantize`` for the contract tests."""

from __future__ import annotations

from diffcache.kernels.examples import Arguments, Tensors

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.x, t.format), {
        "minus": t.f,
        "prescale": t.pair,
        "previous_codes": t.codes,
        "previous_scales": t.scales,
        "samples": 2,
    }
