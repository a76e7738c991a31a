"""Arguments of ``residual_modulate`` for the contract tests."""

from __future__ import annotations

from diffcache.kernels.examples import Arguments, Tensors

CLOSE = 2**-7, 1e-3  # how near the compiled form and the kernel come to the plain form: relative, absolute
# Sums are in another order, then rounded to bfloat16.


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (
        (t.x, t.codes, t.scales, t.format),
        {"gate": t.gate, "shift": t.gate, "scale": t.gate, "affine": t.pair, "eps": 1e-5},
    )
