"""Specify ``residual_quantize`` in plain torch."""

from __future__ import annotations

from torch import Tensor

from diffcache.kernels.coding import encode
from diffcache.kernels.formats import format_of


def residual_quantize(
    x: Tensor, f: Tensor, format: str, gate: Tensor | None = None, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum, and the codes and scales of ``f`` (see ``diffcache.kernels.residual_quantize``)."""
    step = f.float()
    kept = step if prescale is None else (step - prescale[0]) / prescale[1]
    codes, scales = encode(kept, format_of(format))
    if gate is not None:
        step = (step.view(len(gate), len(f) // len(gate), f.shape[1]) * gate.float().unsqueeze(1)).view_as(step)
    return (x.float() + step).to(x.dtype, copy=True), codes, scales
