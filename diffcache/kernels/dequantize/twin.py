"""Specify ``dequantize`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcache.kernels.coding import decode
from diffcache.kernels.formats import format_of


def dequantize(
    codes: Tensor,
    scales: Tensor,
    format: str,
    length: int,
    dtype: torch.dtype,
    affine: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Return the dequantised tensor (see ``diffcache.kernels.dequantize``)."""
    out = decode(codes, scales, format_of(format), length)
    if affine is not None:
        out = out * affine[0] + affine[1]
    if add is not None:
        out = out + add.float()
    return out.to(dtype, copy=True)
