"""Quantise a tensor, and bring it back: per group of neighbours in a row, symmetric about zero.

int8   code = round(x / scale), half away from zero; scale = max|x| / 127; |x − x̂| ≤ scale / 2
fp8    code = x / scale as e4m3 (four significant bits); scale = max|x| / 448
int4   code = floor(x / scale + 8.5), 1 to 15; scale = max|x| / 7; |x − x̂| ≤ scale / 2; the first half of a group lies
       in the low four bits of its bytes, the second half in the high ones

Groups as in SageAttention (arXiv 2410.02367) and torchao's blockwise formats. What is not finite makes its group's
scale NaN, and the whole group when it is unpacked: it is seen, and does not spread further.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcache.kernels.formats import Format, rows


@dataclass(frozen=True, slots=True)
class Packed:
    """A floating-point tensor in fewer bytes.

    codes   [rows, length], or for int4 [rows, groups, half a group]
    scales  float32 [rows, groups]
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def pack(x: Tensor, how: Format) -> Packed:
    """``x``, floating-point, of any shape and strides, in this format."""
    count, length = rows(x.shape)
    size, groups = how.group_of(length), how.groups(length)
    flat = x.detach().reshape(count, length).float()
    grouped = F.pad(flat, (0, groups * size - length)).view(count, groups, size)
    largest = grouped.abs().amax(-1) if grouped.numel() else flat.new_zeros(count, groups)
    scales = (largest / how.top).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    codes = _codes(grouped * scales.reciprocal().unsqueeze(-1), how)
    if how.bits != 4:
        codes = codes.view(count, groups * size)[:, :length].contiguous()
    return Packed(codes, scales, how, x.shape, x.dtype)


def unpack(packed: Packed) -> Tensor:
    """A new contiguous tensor of the shape and dtype that was packed."""
    how, (count, groups) = packed.format, packed.scales.shape
    length = rows(packed.shape)[1]
    size = how.group_of(length)
    if how.bits == 4:
        halves = (packed.codes & 15, packed.codes >> 4)
        values = torch.cat(halves, dim=-1).float() - 8
    else:
        values = F.pad(packed.codes.float(), (0, groups * size - length)).view(count, groups, size)
    found = (values * packed.scales.unsqueeze(-1)).view(count, groups * size)[:, :length]
    return found.to(packed.dtype).reshape(packed.shape)


def _codes(z: Tensor, how: Format) -> Tensor:
    """[rows, groups, size] in units of the scale -> codes."""
    if how.name == "int8":
        return (z.nan_to_num(0.0) + torch.copysign(torch.tensor(0.5), z)).to(torch.int8)  # the cast cuts off
    if how.name == "fp8":
        return z.clamp(-how.top, how.top).to(how.dtype)
    biased = (z.nan_to_num(0.0) + 8.5).floor().to(torch.uint8)
    low, high = biased.chunk(2, dim=-1)
    return low | high << 4
