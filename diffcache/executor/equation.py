"""Equation (1): every prediction of this library is a linear combination of kept tensors."""

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
    """F̂ = scale ⊙ (Σ_k weights[k] · anchors[k] + kappa · (x − x_0)) + bias, as a new tensor.

    anchors  tensors of one shape and dtype, newest first; ``drift`` = (x, x_0) of that shape
    scale, bias  numbers, or tensors that broadcast against an anchor

    Sums run in float32 at least; the result has the anchors' dtype.
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
