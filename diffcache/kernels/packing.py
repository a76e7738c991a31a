"""Tensors of any shape in fewer bytes: the operations of this room work on rows, callers have tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcache.kernels.dequantize import dequantize
from diffcache.kernels.formats import Format, rows
from diffcache.kernels.library import Backend
from diffcache.kernels.predict import predict
from diffcache.kernels.quantize import quantize


@dataclass(frozen=True, slots=True)
class Packed:
    """A floating-point tensor of this shape and dtype in fewer bytes.

    codes     [rows, ...] of the format's dtype
    scales    float32 [rows, groups]
    prescale  float32 [2, row length] that it was quantised with, or None; belongs to all that share it
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: torch.Size
    dtype: torch.dtype
    prescale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def length(self) -> int:
        """Of a row."""
        return rows(self.shape)[1]

    def chunk(self, parts: int) -> list[Packed]:
        """Equal parts along the first dimension; ``parts`` divides it."""
        shape = torch.Size((self.shape[0] // parts, *self.shape[1:]))
        halves = zip(self.codes.chunk(parts), self.scales.chunk(parts), strict=True)
        return [Packed(c, s, self.format, shape, self.dtype, self.prescale) for c, s in halves]


def pack(
    x: Tensor,
    how: Format,
    *,
    minus: Tensor | None = None,
    prescale: Tensor | None = None,
    backend: Backend = "auto",
) -> Packed:
    """``x`` (less ``minus``), floating-point, of any shape and strides, in this format.

    prescale  float32 [2, channels]: centre and spread; only for tensors whose rows are channels (``rows``)
    """
    shape = rows(x.shape)
    codes, scales, _ = quantize(
        x.detach().reshape(shape),
        how.name,
        None if minus is None else minus.detach().reshape(shape),
        prescale,
        backend=backend,
    )
    return Packed(codes, scales, how, x.shape, x.dtype, prescale)


def unpack(packed: Packed, backend: Backend = "auto") -> Tensor:
    """A new contiguous tensor of the shape and dtype that was packed."""
    affine = None if packed.prescale is None else packed.prescale.flip(0)
    args = packed.codes, packed.scales, packed.format.name, packed.length, packed.dtype, affine
    return dequantize(*args, backend=backend).reshape(packed.shape)  # type: ignore[no-any-return]


def combine(
    anchors: Sequence[Packed],
    weights: Sequence[float],
    *,
    x: Tensor | None = None,
    kappa: float = 0.0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Equation (1) from packed tensors of one shape, format and prescale, as ``predict`` has it; one of several weights
    may be −κ, for an x_0 among them. A new contiguous tensor.

    scale, bias  float32 that broadcast against the anchors, over everything but channels
    """
    newest = anchors[0]
    length = newest.length
    out = predict(
        [a.codes for a in anchors],
        [a.scales for a in anchors],
        list(weights),
        newest.format.name,
        length,
        newest.dtype,
        newest.prescale,
        None if x is None else x.detach().reshape(-1, length),
        kappa,
        scale,
        bias,
        backend=backend,
    )
    return out.reshape(newest.shape)  # type: ignore[no-any-return]
