"""Arguments of ``dequantize`` for the contract tests."""

from __future__ import annotations

import torch

from diffcache.kernels.examples import Arguments, Tensors

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.codes, t.scales, t.format, t.x.shape[1], torch.bfloat16), {"affine": t.pair, "add": t.x}
