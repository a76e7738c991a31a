"""Specify ``residual_modulate`` in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffcache.kernels.coding import decode
from diffcache.kernels.formats import format_of


def residual_modulate(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    affine: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the sum and its modulated normalisation (see ``diffcache.kernels.residual_modulate``)."""
    length = x.shape[1]
    f = decode(codes, scales, format_of(format), length)
    if affine is not None:
        f = f * affine[0] + affine[1]
    if gate is not None:
        f = _over_samples(f, gate)
    out = (x.float() + f).to(x.dtype, copy=True)
    y = F.layer_norm(out.float(), (length,), eps=eps)
    if scale is not None:
        y = _over_samples(y, 1 + scale.float())
    if shift is not None:
        y = (_apart(y, shift) + shift.float().unsqueeze(1)).view_as(y)
    return out, y.to(x.dtype, copy=True)


def _over_samples(values: Tensor, factors: Tensor) -> Tensor:
    """Return values [R, L] times factors [S, L]. The rows of a sample are consecutive."""
    return (_apart(values, factors) * factors.float().unsqueeze(1)).view_as(values)


def _apart(values: Tensor, factors: Tensor) -> Tensor:
    """Return values [R, L] as [S, R / S, L]."""
    samples, (count, length) = len(factors), values.shape
    return values.view(samples, count // samples, length)
