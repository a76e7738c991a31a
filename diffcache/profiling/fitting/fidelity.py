"""How near an accelerated run ends to the full run."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr_db(state: Tensor, reference: Tensor) -> Tensor:
    """Compute the PSNR of each sample in dB. The peak is the range of the reference sample.

    Args:
        state: Final states [N, ...].
        reference: Final states of the full run [N, ...].

    Returns:
        float64 [N], on the CPU.
    """
    a, b = state.double().flatten(1), reference.double().flatten(1)
    mse = (a - b).square().mean(1).clamp(min=1e-20)
    peak = b.amax(1) - b.amin(1)
    return (10 * torch.log10(peak**2 / mse)).cpu()
