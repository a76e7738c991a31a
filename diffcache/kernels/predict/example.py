"""Arguments of ``predict`` for the contract tests."""

from __future__ import annotations

import torch

from diffcache.kernels.examples import Arguments, Tensors

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (
        ([t.codes, t.codes.clone()], [t.scales, t.scales.clone()], [1.5, -0.5], t.format, t.x.shape[1], torch.float32),
        {
            "prescale": torch.stack([t.pair, t.pair]),
            "x": t.x,
            "kappa": 0.3,
            "scale": t.gate[:1],
            "bias": t.f[:2, :1],
        },
    )
