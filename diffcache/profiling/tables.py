"""Tables of a site, summed up sample by sample: what is held does not grow with the number of samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.profile import Tables

TINY = 1e-12  # of the largest step's: a silent step divides nothing


@dataclass
class Sums:
    """Sums over samples for one branch of one site; ``means`` divides them. All arrays float64, T steps."""

    samples: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, inputs: Tensor | None, outputs: Tensor, modulated: Tensor | None = None) -> None:
        """One sample. ``outputs`` [T, tokens, channels], ``inputs`` of that shape or another or None, ``modulated``."""
        found = _tables("output", outputs)
        if inputs is not None:
            found["input_change"] = _change(inputs)
            if inputs.shape == outputs.shape:
                residual = outputs.double() - inputs.double()
                found |= _tables("residual", residual) | {"residual_ratio": _ratio(residual)}
        if modulated is not None:
            found["modulated_change"] = _change(modulated)
        self.samples += 1
        for name, array in found.items():
            self.arrays[name] = self.arrays[name] + array if name in self.arrays else array

    def merge(self, other: Sums) -> None:
        """The samples of ``other`` as well."""
        self.samples += other.samples
        for name, array in other.arrays.items():
            self.arrays[name] = self.arrays[name] + array if name in self.arrays else array

    def mean(self, name: str) -> np.ndarray:
        return self.arrays[name] / self.samples


def site_tables(branches: list[Sums]) -> dict[str, Any]:
    """The fields of a SiteProfile that hold tables, from one ``Sums`` per branch."""

    def stacked(name: str) -> np.ndarray | None:
        return np.stack([b.mean(name) for b in branches]) if name in branches[0].arrays else None

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
    flat = series.double().flatten(1)
    l1 = torch.cdist(flat, flat, p=1) / flat.shape[1]
    l1 = ((l1 + l1.T) / 2).fill_diagonal_(0)
    size = flat.abs().mean(1)
    gram = flat @ flat.T / flat.shape[1]
    return {
        f"{name}/l1": l1.cpu().numpy(),
        f"{name}/relative_l1": (l1 / _at_least_tiny(size)).cpu().numpy(),
        f"{name}/gram": ((gram + gram.T) / 2).cpu().numpy(),
    }


def _change(series: Tensor) -> np.ndarray:
    """[T]: relative L1 change from the step before; 0 at step 0."""
    flat = series.double().flatten(1)
    size = _at_least_tiny(flat.abs().mean(1))
    change = (flat[1:] - flat[:-1]).abs().mean(1) / size[:-1]
    return np.concatenate([[0.0], change.cpu().numpy()])


def _ratio(residual: Tensor) -> np.ndarray:
    """[T]: mean over vectors along the last axis of their length relative to the step before; 1 at step 0."""
    length = residual.norm(dim=-1).flatten(1)
    ratio = (length[1:] / _at_least_tiny(length)[:-1]).mean(1)
    return np.concatenate([[1.0], ratio.cpu().numpy()])


def _at_least_tiny(size: Tensor) -> Tensor:
    return size.clamp(min=max(float(size.max()) * TINY, 1e-300))
