"""Measure the cost of keeping a site's outputs in fewer bytes, on whole outputs at a few steps of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.profile import KeptProfile
from diffcache.executor.store import fewer_bytes, kept_bytes
from diffcache.kernels import FORMATS, pack, unpack

AT_STEPS = (0, 8, 24)  # errors differ little from step to step; all of them would cost as much as the tables


@dataclass(slots=True)
class FormatCosts:
    """Sums over the outputs of one site.

    Attributes:
        errors: Format -> sum of the squared errors.
        elements: Number of elements.
        bytes: Format -> size of one output.
        moments: float64 [3, C], number, sum and sum of squares of each channel of the main output. None for pictures.
    """

    errors: dict[str, float] = field(default_factory=dict)
    elements: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    moments: np.ndarray | None = None

    @torch.no_grad()
    def add(self, outputs: Sequence[Tensor], main: int) -> None:
        """Add one output.

        Args:
            outputs: All its tensors.
            main: Index of the tensor that corresponds to the site's input.
        """
        floating = [t for t in outputs if t.is_floating_point()]
        self.elements += sum(t.numel() for t in floating)
        for name, how in FORMATS.items():
            self.bytes[name] = kept_bytes(outputs, how)
            for t in floating:
                lost = unpack(pack(t, how)) - t if fewer_bytes(t, how) else torch.zeros(())
                self.errors[name] = self.errors.get(name, 0.0) + float(lost.double().square().sum())
        if main < len(outputs) and 2 <= outputs[main].ndim <= 3:
            rows = outputs[main].flatten(0, -2).double()
            found = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)]).cpu().numpy()
            same = self.moments is not None and self.moments.shape == found.shape
            self.moments = self.moments + found if same else found

    def profiles(self) -> dict[str, KeptProfile]:
        """Return the cost of each format; nothing for outputs that are empty or not finite."""
        if not self.elements or not np.isfinite(list(self.errors.values())).all():
            return {}
        return {
            name: KeptProfile(bytes=self.bytes[name], error=self.errors[name] / self.elements) for name in self.errors
        }

    def channels(self) -> np.ndarray | None:
        """Return mean and standard deviation of channels, float64 [2, C]. The deviation of a constant channel is 1."""
        if self.moments is None or not np.isfinite(self.moments).all():
            return None
        count, total, squares = self.moments
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return np.stack([mean, np.where(spread > 1e-6 * np.abs(mean), spread, 1.0)])
