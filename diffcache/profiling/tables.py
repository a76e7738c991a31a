"""Tables of a site, summed up sample by sample: what is held does not grow with the number of samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from diffcache.profile import Tables

TINY = 1e-12  # of the largest step's: a silent step divides nothing


@dataclass
class Sums:
    """Sums over samples for one branch of one site; ``means`` divides them. All arrays float64, T steps."""

    samples: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, inputs: Tensor | None, outputs: Tensor, modulated: Tensor | None = None) -> None:
        """One sample. ``outputs`` [T, tokens, channels], ``inputs`` of that shape or another or None, ``modulated``."""
        wide = outputs.double()
        found = _tables("output", wide)
        if inputs is not None:
            given = inputs.double()
            found["input_change"] = _change(given)
            if given.shape[:2] == wide.shape[:2]:
                both = min(given.shape[2], wide.shape[2])  # condition channels and a learned variance stay out
                residual = wide[:, :, :both] - given[:, :, :both]
                found |= _tables("residual", residual) | {"residual_ratio": _ratio(residual)}
        if modulated is not None:
            found["modulated_change"] = _change(modulated.double())
        self.merge(Sums(1, found))

    def merge(self, other: Sums) -> None:
        """The samples of ``other`` as well. A table that not all samples have is dropped."""
        names = self.arrays.keys() & other.arrays.keys() if self.samples else other.arrays.keys()
        self.arrays = {n: self.arrays[n] + other.arrays[n] if self.samples else other.arrays[n] for n in sorted(names)}
        self.samples += other.samples

    def mean(self, name: str) -> np.ndarray:
        return self.arrays[name] / self.samples


def site_tables(branches: list[Sums]) -> dict[str, Any]:
    """The fields of a SiteProfile that hold tables, from one ``Sums`` per branch."""

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


def _tables(name: str, series: Tensor) -> dict[str, np.ndarray]:
    flat = series.flatten(1)
    steps, elements = flat.shape
    l1 = np.zeros((steps, steps))
    l1[np.triu_indices(steps, 1)] = torch.pdist(flat, p=1).cpu().numpy() / elements
    l1 += l1.T
    relative = l1 / _size(flat).cpu().numpy()
    gram = (flat @ flat.T).cpu().numpy() / elements
    return {f"{name}/l1": l1, f"{name}/relative_l1": relative, f"{name}/gram": (gram + gram.T) / 2}


def _change(series: Tensor) -> np.ndarray:
    """[T]: relative L1 change from the step before; 0 at step 0."""
    flat = series.flatten(1)
    change = vector_norm(flat.diff(dim=0), ord=1, dim=1) / flat.shape[1] / _size(flat)[:-1]
    return np.concatenate([[0.0], change.cpu().numpy()])


def _ratio(residual: Tensor) -> np.ndarray:
    """[T]: mean over vectors along the channels of their length relative to the step before; 1 at step 0."""
    length = vector_norm(residual, dim=-1)
    ratio = (length[1:] / _at_least_tiny(length)[:-1]).mean(1)
    return np.concatenate([[1.0], ratio.cpu().numpy()])


def _size(flat: Tensor) -> Tensor:
    """[T]: mean of the absolute values; what is divided by."""
    return _at_least_tiny(vector_norm(flat, ord=1, dim=1) / flat.shape[1])


def _at_least_tiny(size: Tensor) -> Tensor:
    return size.clamp(min=max(float(size.max()) * TINY, 1e-300))
