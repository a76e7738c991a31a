"""Specify ``quantize`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcache.kernels.coding import decode, encode
from diffcache.kernels.formats import format_of


def quantize(
    x: Tensor,
    format: str,
    minus: Tensor | None = None,
    prescale: Tensor | None = None,
    previous_codes: Tensor | None = None,
    previous_scales: Tensor | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and sums (see ``diffcache.kernels.quantize``)."""
    how = format_of(format)
    d = x.float() if minus is None else x.float() - minus.float()
    codes, scales = encode(d if prescale is None else (d - prescale[0]) / prescale[1], how)
    if previous_codes is None or previous_scales is None:
        return codes, scales, d.new_empty(0, 6)
    p = decode(previous_codes, previous_scales, how, x.shape[1])
    if prescale is not None:
        p = p * prescale[1] + prescale[0]
    d, p = d.reshape(samples, -1), p.reshape(samples, -1)
    e = d - p
    sums = (e.abs(), p.abs(), e * e, p * p, d * p, d * d)
    return codes, scales, torch.stack([s.sum(1) for s in sums], dim=1)
