"""Pack tensors of any shape into fewer bytes, with operations that work on rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from diffcache.kernels.dequantize import dequantize
from diffcache.kernels.formats import Format, rows
from diffcache.kernels.library import Backend
from diffcache.kernels.predict import predict
from diffcache.kernels.quantize import quantize

PRESCALE: Final = torch.bfloat16  # dtype of centres and spreads that are kept with the codes
PAYS = 8  # a tensor gets a separate prescale if its codes take at least this many times the bytes of the prescale


@dataclass(frozen=True, slots=True)
class Packed:
    """A floating-point tensor in fewer bytes.

    Attributes:
        codes: [rows, …] of the dtype of the format.
        scales: float32 [rows, groups].
        format: The format.
        shape: The shape of the tensor.
        dtype: The dtype of the tensor.
        prescale: [2, row length] that the tensor was quantised with, or None.
        shared: Whether the prescale belongs to the schedule. Its bytes are not counted then.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: torch.Size
    dtype: torch.dtype
    prescale: Tensor | None = None
    shared: bool = False

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and a prescale that is not shared."""
        own = 0 if self.prescale is None or self.shared else self.prescale.nbytes
        return self.codes.nbytes + self.scales.nbytes + own

    @property
    def device(self) -> torch.device:
        """Return the device of the codes."""
        return self.codes.device

    @property
    def ndim(self) -> int:
        """Return the number of dimensions of the tensor."""
        return len(self.shape)

    @property
    def length(self) -> int:
        """Return the length of a row."""
        return rows(self.shape)[1]

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        """Return True, because only floating-point tensors are packed."""
        return True

    def chunk(self, parts: int) -> list[Packed]:
        """Return equal parts along the first dimension. ``parts`` must divide it."""
        shape = torch.Size((self.shape[0] // parts, *self.shape[1:]))
        halves = zip(self.codes.chunk(parts), self.scales.chunk(parts), strict=True)
        return [Packed(c, s, self.format, shape, self.dtype, self.prescale, self.shared) for c, s in halves]


def pack(
    x: Tensor,
    how: Format,
    *,
    minus: Tensor | None = None,
    prescale: Tensor | None = None,
    backend: Backend = "auto",
) -> Packed:
    """Pack ``x``, or ``x - minus``.

    Args:
        x: A floating-point tensor of any shape and strides.
        how: The format.
        minus: A tensor of the same shape, or None.
        prescale: float32 [2, channels], centre and spread of each channel, for tensors with channels as rows
            (``rows``). None measures it on the tensor if that is worth its bytes (``prescaled``).
        backend: The backend of the operation.
    """
    shape = rows(x.shape)
    flat = x.detach().reshape(shape)
    less = None if minus is None else minus.detach().reshape(shape)
    scale = prescale
    if scale is None and prescaled(x.shape, how):
        scale = channels(flat if less is None else flat - less)
    codes, scales, _ = quantize(flat, how.name, less, scale, backend=backend)
    return Packed(codes, scales, how, x.shape, x.dtype, scale, shared=prescale is not None)


def prescaled(shape: Sequence[int], how: Format) -> bool:
    """Return whether a tensor of this shape is packed with the centre and spread of its channels.

    This is so if the tensor holds tokens, and so many that two numbers per channel take few bytes compared with the
    codes.
    """
    count, _ = rows(shape)
    return bool(how.group) and 2 <= len(shape) <= 3 and count * how.bits >= PAYS * 2 * PRESCALE.itemsize * 8


def packed_bytes(shape: Sequence[int], how: Format, *, scaled: bool = False) -> int:
    """Return the bytes of a packed tensor of this shape.

    Args:
        shape: The shape.
        how: The format.
        scaled: Whether the prescale belongs to the schedule.
    """
    own = 0 if scaled or not prescaled(shape, how) else 2 * PRESCALE.itemsize * shape[-1]
    return how.nbytes(shape) + own


def channels(x: Tensor) -> Tensor:
    """Return the mean and the standard deviation of every column of [R, L]: [2, L].

    They are rounded to the dtype in which they are kept before anything is quantised with them, so the rounding adds no
    error. A mean that is not finite is replaced by 0, and a standard deviation that is 0 or not finite by 1.
    """
    spread, centre = torch.std_mean(x, dim=0, correction=0)
    centre, spread = centre.to(PRESCALE), spread.to(PRESCALE)
    spread = torch.where((spread > 0) & spread.isfinite(), spread, 1)
    return torch.stack([torch.where(centre.isfinite(), centre, 0), spread])


def pack_again(x: Tensor, before: Packed, backend: Backend = "auto") -> tuple[Packed, Tensor]:
    """Pack ``x`` as ``before`` was packed, and compare it with ``before`` in the same pass.

    Returns:
        The packed tensor, and the six sums of ``quantize``: float32 [6].
    """
    flat = x.detach().reshape(rows(x.shape))
    args = None, before.prescale, before.codes, before.scales
    codes, scales, sums = quantize(flat, before.format.name, *args, backend=backend)
    return dataclasses.replace(before, codes=codes, scales=scales), sums[0]


def unpack(packed: Packed, backend: Backend = "auto") -> Tensor:
    """Return a new contiguous tensor of the shape and dtype of the tensor that was packed."""
    affine = None if packed.prescale is None else packed.prescale.flip(0).float()
    args = packed.codes, packed.scales, packed.format.name, packed.length, packed.dtype, affine
    return dequantize(*args, backend=backend).reshape(packed.shape)  # type: ignore[no-any-return]


def from_kept(
    anchors: Sequence[Packed],
    weights: Sequence[float],
    *,
    x: Tensor | None = None,
    kappa: float = 0.0,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Compute equation (1) from packed tensors: scale ⊙ (Σ_k weights[k] · F_k + kappa · x) + bias.

    Args:
        anchors: Packed tensors of one shape and format.
        weights: A weight for each anchor. It is −κ for an input x_0 among the anchors.
        x: A tensor of the same shape, or None.
        kappa: The weight of ``x``.
        scale: A number, or float32 [1, channels] or [channels, 1].
        bias: A number, or float32 [1, channels] or [channels, 1].
        backend: The backend of the operation.

    Returns:
        A new contiguous tensor.
    """
    newest = anchors[0]
    flat = None if x is None or not kappa else x.detach().reshape(-1, newest.length)
    weights = list(weights)
    if isinstance(scale, float):
        weights, kappa, scale_ = [w * scale for w in weights], kappa * scale, None
    else:
        scale_ = scale
    if isinstance(bias, float):
        bias_ = torch.full((1, 1), bias, device=newest.device) if bias else None
    else:
        bias_ = bias
    if len(anchors) == 1 and all(c is None or len(c) == 1 for c in (scale_, bias_)):
        folded = _folded(newest, weights[0], flat, kappa, scale_, bias_)
        if folded is not None:
            out = dequantize(newest.codes, newest.scales, *_as(newest), *folded, backend=backend)
            return out.reshape(newest.shape)  # type: ignore[no-any-return]
    codes, scales, prescale = [a.codes for a in anchors], [a.scales for a in anchors], _prescales(anchors)
    out = predict(codes, scales, weights, *_as(newest), prescale, flat, kappa, scale_, bias_, backend=backend)
    return out.reshape(newest.shape)  # type: ignore[no-any-return]


def _as(packed: Packed) -> tuple[str, int, torch.dtype]:
    """Return the name of the format, the length of a row and the dtype, as arguments of the operations."""
    return packed.format.name, packed.length, packed.dtype


def _prescales(anchors: Sequence[Packed]) -> Tensor | None:
    """Return the prescales of all anchors, [K, 2, length], or None if they have none."""
    found = [a.prescale for a in anchors if a.prescale is not None]
    return torch.stack(found) if found else None


def _folded(
    anchor: Packed, weight: float, x: Tensor | None, kappa: float, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return a prediction from one anchor as an affine function of its codes, and the tensor that is added to it.

    Returns:
        float32 [2, length] (None for factor 1 and offset 0), and the tensor (or None). The result is None if the input
        would have to be scaled.
    """
    if x is not None and (kappa != 1.0 or scale is not None):
        return None
    if weight == 1.0 and anchor.prescale is None and scale is None and bias is None:
        return None, x
    if anchor.prescale is None:
        factor = torch.full((anchor.length,), weight, device=anchor.device)
        offset = torch.zeros_like(factor)
    else:
        offset, factor = anchor.prescale.float() * weight
    if scale is not None:
        factor, offset = factor * scale[0], offset * scale[0]
    if bias is not None:
        offset = offset + bias[0]
    return torch.stack([factor, offset.expand_as(factor)]), x
