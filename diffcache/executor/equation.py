"""Equation (1): every prediction is a linear combination of kept tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def predict(
    anchors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    drift: tuple[Tensor, Tensor] | None = None,
    kappa: float = 0.0,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
) -> Tensor:
    """Compute F̂ = scale ⊙ (Σ_k weights[k] · anchors[k] + kappa · (x − x_0)) + bias.

    Sums are computed in float32 at least.

    Args:
        anchors: Tensors of one shape and dtype, newest first.
        weights: A weight for each anchor.
        drift: (x, x_0) of the same shape.
        kappa: The weight of the drift.
        scale: A number, or a tensor that broadcasts against an anchor.
        bias: A number, or a tensor that broadcasts against an anchor.

    Returns:
        A new tensor of the dtype of the anchors.
    """
    dtype = torch.promote_types(anchors[0].dtype, torch.float32)
    out = anchors[0].to(dtype) * weights[0]
    for anchor, weight in zip(anchors[1:], weights[1:], strict=True):
        out.add_(anchor.to(dtype), alpha=weight)
    if kappa and drift is not None:
        x, x_0 = drift
        out.add_(x.to(dtype) - x_0, alpha=kappa)
    if isinstance(scale, Tensor) or scale != 1.0:
        out.mul_(scale)
    if isinstance(bias, Tensor) or bias != 0.0:
        out.add_(bias)
    return out.to(anchors[0].dtype)
