"""Load extractors: networks that compute a row of features from a picture, by which sets of pictures are compared.

Each file of this folder is an extractor under the file's name. It defines ``extractor(weights, device) -> Extractor``.
A custom extractor is any callable or nn.Module that maps [N, 3, H, W] in 0..1 to [N, D]; see ``custom``, or pass
``"package.module:attribute"``.

A distance between sets depends on its extractor. Only distances by the Inception network of Heusel et al. 2017 (arXiv
1706.08500) are called FID and KID. Distances by other networks are called FD-NAME and KD-NAME.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache import host, registry
from diffcache.errors import BadOption, DiffCacheError, Unusable
from diffcache.eval.requirements import device_named
from diffcache.host.digest import TO_DIGEST, NoDigestError

INCEPTION = "Inception"
RESERVED = ("fid", "kid", "inception", "inceptionv3", "efflite0", "effnetlite0")  # letters and digits, in lower case

Features = Callable[[Tensor], Tensor]


class PicturesError(DiffCacheError, ValueError):
    """Pictures that cannot be measured, or features that are not finite numbers of the right shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Extractor:
    """A network, and everything that its features depend on.

    Attributes:
        name: The name in results.
        features: Maps float32 [N, 3, H, W] in 0..1 on ``device`` to [N, D]. It resizes the pictures as the network
            requires.
        settings: Weights, size, resizing and everything else that the features depend on. Statistics with other
            settings are not compared.
        device: The device on which the network runs.
    """

    name: str
    features: Features
    settings: Mapping[str, str]
    device: torch.device

    @property
    def frechet(self) -> str:
        """The name of the Fréchet distance by these features."""
        return frechet_name(self.name)

    @property
    def kernel(self) -> str:
        """The name of the kernel distance by these features."""
        return "KID" if self.name == INCEPTION else f"KD-{self.name}"

    @property
    def digest(self) -> str:
        """The sha256 digest of the name and the settings."""
        text = json.dumps([self.name, dict(self.settings)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Return the features of pictures.

        Args:
            pictures: [N, H, W, 3], float in 0..1 or uint8.

        Returns:
            [N, D] on the CPU: float64 if the network returns float64, else float32.

        Raises:
            PicturesError: If the pictures are not valid, the network is in training mode, or the features are not a
                tensor [N, D] of finite numbers.
        """
        batch = as_tensor(pictures).to(self.device)
        if isinstance(self.features, nn.Module) and self.features.training:
            raise PicturesError(
                f"extractor {self.name!r} is in training mode: features would depend on the batch. Call .eval() first."
            )
        with torch.no_grad():
            found = self.features(batch)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(batch) or not found.shape[1]:
            shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise PicturesError(f"extractor {self.name!r} gave {shape}. Allowed: a tensor [{len(batch)}, D].")
        found = found.detach().cpu()
        found = found if found.dtype == torch.float64 else found.float()
        if not bool(found.isfinite().all()):
            raise PicturesError(
                f"extractor {self.name!r} gave NaN or Inf. Allowed: finite numbers. Do the pictures hold any?"
            )
        return found


def frechet_name(extractor: str) -> str:
    """Return the name of the Fréchet distance by an extractor: "FID" for the Inception network of FID, else FD-NAME."""
    return "FID" if extractor == INCEPTION else f"FD-{extractor}"


def load(name: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor called ``name``, or the one at ``"package.module:attribute"``.

    Args:
        name: Name of a file of this folder, or an address. The attribute of an address becomes the extractor's name.
        weights: File of the network's weights, for an extractor with weights that are not installed as a package.
        device: The device on which the network runs.

    Raises:
        UnknownName: If there is no such extractor.
        BadOption: If ``weights`` or ``device`` is not valid for this extractor.
        MissingPackageError: If a package that the extractor needs is not installed.
        WeightsError: If the weights are missing or belong to another network.
    """
    where = device_named(device)
    found: Any = registry.load(__name__, name)
    if ":" not in name:
        loaded: Extractor = found.extractor(weights=weights, device=where)
        return loaded
    if weights is not None:
        raise Unusable(
            "weights", "your own extractor loads its weights itself", "Leave out weights, or name a built-in extractor"
        )
    if isinstance(found, nn.Module):
        found = found.to(where)
    return custom(found, name=name.rpartition(":")[2], settings={"address": name}, device=where)


def custom(
    features: Features,
    *,
    name: str,
    settings: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """Return an extractor that uses the callable or module ``features``.

    Args:
        features: Maps [N, 3, H, W] in 0..1 on ``device`` to [N, D]. A module must be in evaluation mode.
        name: The name in results.
        settings: Settings that the features depend on, in addition to the code, captured values, weights and hooks,
            which are recorded here.
        device: The device on which ``features`` runs.

    Raises:
        BadOption: If ``features`` is not callable, the name belongs to a known network, or ``features`` has no digest
            and no settings are given.
    """
    if not callable(features) or isinstance(features, type):
        raise BadOption("extractor", features, "a callable or an nn.Module, [N, 3, H, W] in 0..1 -> [N, D]")
    plain = "".join(filter(str.isalnum, name)).casefold()
    if not plain or plain in RESERVED:
        raise BadOption("name", name, "any text, except FID, KID and the names of known networks")
    named = features if hasattr(features, "__qualname__") else type(features)
    known = {"source": f"{named.__module__}.{named.__qualname__}"}
    try:
        known["digest"] = host.digest_of(features)
    except NoDigestError as error:
        if not settings:
            raise Unusable(
                f"settings={settings!r}",
                f"the extractor has {error.what} at {error.where or 'the top'}, which a later run cannot recognise",
                f"Pass the settings on which the features depend, or give the object {TO_DIGEST}",
            ) from None
    return Extractor(name, features, known | dict(settings or {}), torch.device(device))


def as_tensor(pictures: np.ndarray | Tensor) -> Tensor:
    """Return pictures [N, H, W, 3], float in 0..1 or uint8, as float32 [N, 3, H, W] in 0..1.

    Raises:
        PicturesError: If the shape, the dtype or the values are not valid.
    """
    batch = (
        torch.from_numpy(np.require(pictures, requirements=("C", "W")))
        if isinstance(pictures, np.ndarray)
        else pictures
    )
    shape = list(batch.shape)
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise PicturesError(f"pictures have the shape {shape}. Allowed: [N, H, W, 3], nothing empty.")
    batch = batch.detach().permute(0, 3, 1, 2)
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    if not batch.is_floating_point():
        raise PicturesError(f"pictures are {batch.dtype}. Allowed: float in 0..1, or uint8.")
    batch = batch.float()
    low, high = (float(x) for x in batch.aminmax())
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # NaN fails too; the tolerance is for rounding in a decoder
        raise PicturesError(
            f"pictures have values from {low:g} to {high:g}. Allowed: float in 0..1, or uint8 in 0..255."
        )
    return batch.clamp(0, 1)
