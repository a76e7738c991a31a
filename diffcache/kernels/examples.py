"""Tensors from which each kernel's ``example.py`` makes the arguments of its contract tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcache.kernels.quantize import quantize

ROWS, LENGTH = 4, 261  # two groups of unequal length

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # as few as the operation takes, and all others by name


@dataclass(frozen=True, slots=True)
class Tensors:
    """Random tensors of ROWS rows of LENGTH columns, and a kept one.

    Attributes:
        format: A name of FORMATS.
        x: bfloat16 [ROWS, LENGTH].
        f: float32 [ROWS, LENGTH].
        gate: float32 [2, LENGTH], a factor for each half of the rows.
        pair: float32 [2, LENGTH], an offset and a positive factor of every column.
        codes: The codes of ``f`` in ``format``.
        scales: The scales of ``f`` in ``format``.
    """

    format: str
    x: Tensor
    f: Tensor
    gate: Tensor
    pair: Tensor
    codes: Tensor
    scales: Tensor

    @classmethod
    def drawn(cls, format: str, device: str = "cpu") -> Tensors:
        """Draw the tensors from torch's global generators."""
        x = torch.randn(ROWS, LENGTH, dtype=torch.bfloat16, device=device)
        f, gate = torch.randn(ROWS, LENGTH, device=device), torch.randn(2, LENGTH, device=device)
        pair = torch.stack([torch.randn(LENGTH), torch.rand(LENGTH) + 0.5]).to(device)
        codes, scales, _ = quantize(f, format, backend="torch")
        return cls(format, x, f, gate, pair, codes, scales)
