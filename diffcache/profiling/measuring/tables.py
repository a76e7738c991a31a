"""Tables of a site, summed over samples. Memory does not grow with the number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from diffcache.documents.profile import Tables

TINY = 1e-12  # relative to the largest step; a step below it is not used as a divisor
PIECE = 2**12  # elements of a step that are worked on at a time


@dataclass
class Sums:
    """Sums over samples for one branch of one site. All arrays are float64, with T steps."""

    samples: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, inputs: Tensor, outputs: Tensor, modulated: Tensor | None = None) -> None:
        """Add one sample.

        Args:
            inputs: [T, tokens, channels], of the shape of ``outputs`` or another.
            outputs: [T, tokens, channels].
            modulated: The outputs of the first norm [T, tokens, channels], or None.
        """
        found = _distances("output", outputs)
        found["input_change"] = _change(inputs)
        if inputs.shape[:2] == outputs.shape[:2]:
            both = min(inputs.shape[2], outputs.shape[2])  # condition channels and a learned variance stay out
            residual = _plain(outputs[:, :, :both]) - _plain(inputs[:, :, :both])
            found |= _distances("residual", residual) | {"residual_ratio": _ratio(residual)}
        if modulated is not None:
            found["modulated_change"] = _change(modulated)
        self.merge(Sums(1, found))

    def merge(self, other: Sums) -> None:
        """Add the samples of ``other``. A table that not all samples have is dropped."""
        names = self.arrays.keys() & other.arrays.keys() if self.samples else other.arrays.keys()
        self.arrays = {n: self.arrays[n] + other.arrays[n] if self.samples else other.arrays[n] for n in sorted(names)}
        self.samples += other.samples

    def mean(self, name: str) -> np.ndarray:
        """Return the mean of a table over the samples."""
        return self.arrays[name] / self.samples


def site_tables(branches: list[Sums]) -> dict[str, Any]:
    """Return the fields of a SiteProfile that hold tables, from one ``Sums`` per branch."""

    def stacked(name: str) -> np.ndarray | None:
        return np.stack([b.mean(name) for b in branches]) if all(name in b.arrays for b in branches) else None

    def tables(name: str) -> Tables | None:
        found = {key: stacked(f"{name}/{key}") for key in ("l1", "relative_l1", "gram")}
        return None if any(v is None for v in found.values()) else Tables(**found)  # type: ignore[arg-type]

    return {
        "output": tables("output"),
        "residual": tables("residual"),
        "residual_ratio": stacked("residual_ratio"),
        "input_change": stacked("input_change"),
        "modulated_change": stacked("modulated_change"),
    }


def _distances(name: str, series: Tensor) -> dict[str, np.ndarray]:
    """Return the three tables of distances between steps, for a series [T, …]."""
    steps, elements = len(series), series[0].numel()
    pairs = torch.zeros(steps * (steps - 1) // 2, dtype=torch.double, device=series.device)
    gram = torch.zeros(steps, steps, dtype=torch.double, device=series.device)
    size = torch.zeros(steps, dtype=torch.double, device=series.device)
    for piece in _pieces(series):
        wide = piece.double()  # distances are differences of entries of the Gram table
        gram += wide @ wide.T
        pairs += torch.pdist(piece, p=1)
        size += vector_norm(wide, ord=1, dim=1)
    l1 = np.zeros((steps, steps))
    l1[np.triu_indices(steps, 1)] = pairs.cpu().numpy() / elements
    l1 += l1.T
    table = gram.cpu().numpy() / elements
    relative = l1 / _at_least_tiny(size / elements).cpu().numpy()
    return {f"{name}/l1": l1, f"{name}/relative_l1": relative, f"{name}/gram": (table + table.T) / 2}


def _change(series: Tensor) -> np.ndarray:
    """Return the relative L1 change from the step before, [T]. It is 0 at step 0."""
    moved = torch.zeros(len(series) - 1, dtype=torch.double, device=series.device)
    size = torch.zeros(len(series), dtype=torch.double, device=series.device)
    for piece in _pieces(series):
        moved += vector_norm(piece.diff(dim=0), ord=1, dim=1)
        size += vector_norm(piece, ord=1, dim=1)
    return np.concatenate([[0.0], (moved / _at_least_tiny(size)[:-1]).cpu().numpy()])


def _ratio(residual: Tensor) -> np.ndarray:
    """Return the length of vectors along the channels, relative to the step before, averaged: [T], 1 at step 0."""
    length = vector_norm(residual, dim=-1).double()
    ratio = (length[1:] / _at_least_tiny(length)[:-1]).mean(1)
    return np.concatenate([[1.0], ratio.cpu().numpy()])


def _pieces(series: Tensor) -> Iterator[Tensor]:
    """Yield pieces [T, elements] of a series. On a CPU they are small enough for its cache."""
    size = PIECE if series.device.type == "cpu" else PIECE * 256
    return (_plain(piece) for piece in torch.split(series.flatten(1), size, dim=1))


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider, contiguous."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _at_least_tiny(size: Tensor) -> Tensor:
    """Return sizes with a lower bound, so that they can be divided by."""
    return size.clamp(min=max(float(size.max()) * TINY, 1e-300))
