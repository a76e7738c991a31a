"""Encode and decode values row by row: the arithmetic that all operations share, and its specification.

* bf16: the values, rounded to bfloat16.
* int8: code = round(x / scale), half away from zero; scale = max|x| / 127; |x − x̂| ≤ scale / 2.
* fp8: code = x / scale as e4m3 (four significant bits); scale = max|x| / 448.
* int4: code = floor(x / scale + 8.5), 1 to 15; scale = max|x| / 7; |x − x̂| ≤ scale / 2. The first half of a group is
  stored in the low four bits of its bytes, the second half in the high four bits.

x / scale is computed as x times the rounded reciprocal of scale, and max|x| / 127 in the same way. Groups are those of
SageAttention (arXiv 2410.02367) and of torchao's blockwise formats. A value that is not finite makes its group's scale
NaN, and with it the whole decoded group. The fault is visible and does not spread to other groups. (bf16 keeps values
that are not finite.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcache.kernels.formats import Format

SMALLEST = torch.finfo(torch.float32).tiny  # the smallest scale, which a group of zeros is divided by


def encode(x: Tensor, how: Format) -> tuple[Tensor, Tensor]:
    """Encode float32 [R, L].

    Args:
        x: The values.
        how: The format.

    Returns:
        Codes [R, how.codes(L)] of how.dtype, and scales, float32 [R, how.groups(L)].
    """
    count, length = x.shape
    if not how.group:
        return x.to(how.dtype, copy=True), x.new_empty(count, 0)
    size, groups = how.group_of(length), how.groups(length)
    padded = F.pad(x, (0, groups * size - length))
    largest = padded.view(count, groups, size).abs().amax(-1) if padded.numel() else x.new_zeros(count, groups)
    scales = (largest * (1 / how.top)).clamp_min(SMALLEST)  # a division would give other bits on a GPU
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    z = _times(padded if how.bits == 4 else x, scales.reciprocal(), size).nan_to_num(0.0)
    if how.bits == 4:
        biased = (z + 8.5).floor().to(torch.uint8).view(count, groups, size)
        low, high = biased.chunk(2, dim=-1) if biased.numel() else (biased, biased)
        return (low | high << 4).reshape(count, how.codes(length)), scales
    if how.dtype == torch.int8:
        return (z + torch.where(z >= 0, 0.5, -0.5)).to(torch.int8), scales  # the cast rounds towards zero
    return z.clamp(-how.top, how.top).to(how.dtype), scales


def decode(codes: Tensor, scales: Tensor, how: Format, length: int) -> Tensor:
    """Decode to approximately the encoded values.

    Args:
        codes: [R, how.codes(length)].
        scales: float32 [R, how.groups(length)].
        how: The format.
        length: The length of a row.

    Returns:
        float32 [R, length].
    """
    count = len(codes)
    if not how.group:
        return codes.float()
    size, groups = how.group_of(length), how.groups(length)
    if how.bits == 4:
        bytes_ = codes.view(count, groups, size // 2)
        values = torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1).float().view(count, groups * size)[:, :length] - 8
    else:
        values = codes.float()
    return _times(values, scales, size)


def _times(values: Tensor, of_groups: Tensor, size: int) -> Tensor:
    """Multiply each value by the number of its group.

    Args:
        values: [R, L].
        of_groups: [R, groups].
        size: The number of values in every group but the last.
    """
    (count, length), groups = values.shape, of_groups.shape[1]
    if length == groups * size:
        return (values.view(count, groups, size) * of_groups.unsqueeze(-1)).view(count, length)
    # By index: torch 2.15 compiles an expanded tensor for CPUs so that a shorter last group reads wrong numbers.
    return values * of_groups[:, torch.arange(length, device=of_groups.device) // size]
