"""Specify ``predict`` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcache.kernels.coding import decode
from diffcache.kernels.formats import format_of


def predict(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    format: str,
    length: int,
    dtype: torch.dtype,
    prescale: Tensor | None = None,
    x: Tensor | None = None,
    kappa: float = 0.0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the prediction (see ``diffcache.kernels.predict``)."""
    how = format_of(format)
    out = torch.zeros((), device=codes[0].device)
    for k, (c, s, w) in enumerate(zip(codes, scales, weights, strict=True)):
        f = decode(c, s, how, length)
        if prescale is not None:
            own = prescale[k]
            f = f * own[1] + own[0]
        out = out + f * w
    if x is not None:
        out = out + x.float() * kappa
    if scale is not None:
        out = (_apart(out, scale) * scale).view_as(out)
    if bias is not None:
        out = (_apart(out, bias) + bias).view_as(out)
    return out.to(dtype, copy=True)


def _apart(values: Tensor, coefficients: Tensor) -> Tensor:
    """Return values [R, L] as [R / C, C, L], for C rows of coefficients."""
    count, length = values.shape
    return values.view(count // len(coefficients), len(coefficients), length)
