"""Arguments of ``residual_quantize`` for the contract tests."""

from __future__ import annotations

from diffcache.kernels.examples import Arguments, Tensors

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.x, t.f, t.format), {"gate": t.gate, "prescale": t.pair}
