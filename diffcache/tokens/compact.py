"""Keep the keys or the values of one layer in fewer bytes, with rows that are written by position.

Keys are quantised with the centre and the spread of each channel, because a few channels are much larger than others
(KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079). Values are quantised token by token. Both are taken when every
position is computed; rows that are written later are quantised with them. Each row of a batch has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffcache.kernels import Format
from diffcache.kernels.dequantize import dequantize
from diffcache.kernels.library import Backend
from diffcache.kernels.quantize import quantize
from diffcache.tokens.rows import gathered, grown


@dataclass(frozen=True, slots=True)
class CompactRows:
    """Rows [B, heads, N, head_dim] in fewer bytes. A row of codes holds all heads of a token.

    Attributes:
        codes: [B, N, …] of the dtype of the format.
        scales: float32 [B, N, groups].
        format: The format.
        heads: The number of heads.
        length: The number of channels of a token, over all heads.
        dtype: The dtype of the rows.
        channels: bfloat16 [2, B, 1, channels], the centre and the spread of each channel. None for values.
        backend: What runs the operations.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    heads: int
    length: int
    dtype: torch.dtype
    channels: Tensor | None
    backend: Backend

    @classmethod
    def of(
        cls, rows: Tensor, how: Format, *, by_channel: bool, backend: Backend, real: Tensor | None = None
    ) -> CompactRows:
        """Return the rows of all positions in fewer bytes.

        Args:
            rows: [B, heads, N, head_dim].
            how: The format.
            by_channel: Whether the channels are centred and scaled first.
            backend: What runs the operations.
            real: bool [B, N], the rows that count for the channels; the others repeat one of them. None: all count.
        """
        flat = _flat(rows)
        channels = None
        if by_channel and how.group:
            spread, centre = _spread_and_centre(flat.float(), real)
            channels = torch.stack([centre, torch.where(spread > 0, spread, 1)]).to(torch.bfloat16)
        codes, scales = _encoded(flat, how, channels, backend)
        return cls(codes, scales, how, rows.shape[1], flat.shape[-1], rows.dtype, channels, backend)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and channels."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.channels is None else self.channels.nbytes)

    def written(self, rows: Tensor, index: Tensor, size: int) -> CompactRows:
        """Return the rows with others at some positions.

        Args:
            rows: [B, heads, n, head_dim].
            index: int64 [B, n], their positions.
            size: The number of positions, N. Positions beyond the kept ones are among ``index``.
        """
        codes, scales = _encoded(_flat(rows), self.format, self.channels, self.backend)
        kept = grown(self.codes, 1, size), grown(self.scales, 1, size)
        put = [_scattered(old, index, new) for old, new in zip(kept, (codes, scales), strict=True)]
        return replace(self, codes=put[0], scales=put[1])

    def like(self, rows: Tensor) -> CompactRows:
        """Return other rows, [B, heads, n, head_dim], with the channels of these."""
        codes, scales = _encoded(_flat(rows), self.format, self.channels, self.backend)
        return replace(self, codes=codes, scales=scales)

    def where(self, keep: Tensor, old: CompactRows, slots: Tensor) -> CompactRows:
        """Return these rows, or rows of ``old`` where ``keep`` is True.

        Args:
            keep: bool [B, n].
            old: Rows of the same format.
            slots: int64 [B, n], the row of ``old`` that takes the place of each one.
        """
        made = []
        for new, kept in ((self.codes, old.codes), (self.scales, old.scales)):
            kind = torch.uint8 if new.dtype.itemsize == 1 else new.dtype  # torch cannot gather float8
            taken = gathered(kept.view(kind), slots.clamp(max=kept.shape[1] - 1))
            made.append(torch.where(keep[..., None], taken, new.view(kind)).view(new.dtype))
        return replace(self, codes=made[0], scales=made[1])

    def read(self) -> Tensor:
        """Return the rows of all positions, [B, heads, N, head_dim], approximately."""
        batch, size = self.codes.shape[:2]
        codes, scales = self.codes.flatten(0, 1), self.scales.flatten(0, 1)
        how = self.format.name, self.length, torch.float32
        flat = dequantize(codes, scales, *how, backend=self.backend).view(batch, size, self.length)
        if self.channels is not None:
            centre, spread = self.channels.float()
            flat = flat * spread + centre
        rows: Tensor = flat.to(self.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return rows


def _scattered(old: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Return [B, N, …] with the rows ``new`` at ``index``. torch cannot scatter float8, so its bytes are."""
    kind = torch.uint8 if old.dtype.itemsize == 1 else old.dtype
    where = index[..., None].expand(-1, -1, new.shape[-1])
    return old.view(kind).scatter(1, where, new.view(kind)).view(old.dtype)


def _spread_and_centre(flat: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the standard deviation and the mean of each channel, [B, 1, channels], over the rows that are real."""
    if real is None:
        spread, centre = torch.std_mean(flat, dim=1, keepdim=True, correction=0)
        return spread, centre
    weight = real[..., None].float() / real.sum(1).clamp(min=1)[:, None, None]
    centre = (flat * weight).sum(1, keepdim=True)
    return ((flat - centre) ** 2 * weight).sum(1, keepdim=True).sqrt(), centre


def _flat(rows: Tensor) -> Tensor:
    """Return [B, n, heads · head_dim]."""
    return rows.detach().transpose(1, 2).flatten(2)


def _encoded(flat: Tensor, how: Format, channels: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of rows [B, n, channels], each [B, n, …]."""
    batch, n, length = flat.shape
    if channels is not None:
        centre, spread = channels.float()
        flat = (flat.float() - centre) / spread
    codes, scales, _ = quantize(flat.reshape(batch * n, length), how.name, backend=backend)
    return codes.view(batch, n, -1), scales.view(batch, n, -1)
