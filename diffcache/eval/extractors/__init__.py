"""Extractors: networks that describe a picture by a row of numbers. Sets of pictures are compared by these.

One file, one extractor: ``extractor(weights, device) -> Extractor``, under the file's name. Your own is any callable or
nn.Module, [N, 3, H, W] in 0..1 -> [N, D]: see ``custom``, or ``"package.module:attribute"``.

A distance between sets is a number of its extractor. "FID" and "KID" are words for one network alone, the Inception of
Heusel et al. 2017 (arXiv 1706.08500); of all others the distances are called FD-NAME and KD-NAME.
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
from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.requirements import device_named
from diffcache.host.digest import TO_DIGEST, NoDigestError

INCEPTION = "Inception"
RESERVED = ("fid", "kid", "inception", "inceptionv3", "efflite0", "effnetlite0")  # as they read without marks

Features = Callable[[Tensor], Tensor]


class PicturesError(DiffCacheError, ValueError):
    """Pictures that cannot be measured, or features of them that are none."""


@dataclass(frozen=True, slots=True, eq=False)
class Extractor:
    """A network and everything its features depend on.

    name      under which results are reported
    features  float32 [N, 3, H, W] in 0..1, on ``device`` -> [N, D]; brings pictures to the size it wants
    settings  what the features depend on: weights, size, resizing; statistics of other settings are not compared
    device    where it computes
    """

    name: str
    features: Features
    settings: Mapping[str, str]
    device: torch.device

    @property
    def frechet(self) -> str:
        """What the Fréchet distance of these features is called."""
        return frechet_name(self.name)

    @property
    def kernel(self) -> str:
        """What the kernel distance of these features is called."""
        return "KID" if self.name == INCEPTION else f"KD-{self.name}"

    @property
    def digest(self) -> str:
        """sha256 of the name and the settings."""
        text = json.dumps([self.name, dict(self.settings)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Features of ``pictures`` [N, H, W, 3], float in 0..1 or uint8: [N, D] on the CPU, float32, or float64 where
        the network gives that. Raises PicturesError for other pictures, and for features that are no finite numbers.
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
    """ "FID" for the one network that has this name, else FD-NAME."""
    return "FID" if extractor == INCEPTION else f"FD-{extractor}"


def load(name: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """The extractor called ``name``, or at ``"package.module:attribute"``, whose attribute becomes the name.

    ``weights``: the file of a network whose weights come with no package. Raises UnknownName, BadOption,
    MissingPackageError, WeightsError.
    """
    where = device_named(device)
    found: Any = registry.load(__name__, name)
    if ":" not in name:
        loaded: Extractor = found.extractor(weights=weights, device=where)
        return loaded
    if weights is not None:
        raise BadOption("weights", str(weights), "none for an extractor of your own, which brings them itself")
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
    """Your own: ``features`` takes [N, 3, H, W] in 0..1 on ``device`` and returns [N, D].

    ``settings``: what else its features depend on; code, captured values, weights and hooks are added here. A module
    has to be in evaluation mode. Raises BadOption for what cannot be called, for a name that belongs to a known
    network, and for an object that has no digest and comes without settings.
    """
    if not callable(features) or isinstance(features, type):
        raise BadOption("extractor", features, "a callable or an nn.Module, [N, 3, H, W] in 0..1 -> [N, D]")
    plain = "".join(filter(str.isalnum, name)).casefold()
    if not plain or plain in RESERVED:
        raise BadOption("name", name, "a name of its own; FID, KID and the names of known networks mean these alone")
    named = features if hasattr(features, "__qualname__") else type(features)
    known = {"source": f"{named.__module__}.{named.__qualname__}"}
    try:
        known["digest"] = host.digest_of(features)
    except NoDigestError as error:
        if not settings:
            raise BadOption(
                "settings",
                settings,
                f"what the features depend on, for the extractor has {error.what} at {error.where or 'the top'}. "
                f"Or give the object {TO_DIGEST}",
            ) from None
    return Extractor(name, features, known | dict(settings or {}), torch.device(device))


def as_tensor(pictures: np.ndarray | Tensor) -> Tensor:
    """[N, H, W, 3], float in 0..1 or uint8 -> float32 [N, 3, H, W] in 0..1. Raises PicturesError for others."""
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
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # NaN fails too; rounding in a decoder is no fault
        raise PicturesError(
            f"pictures have values from {low:g} to {high:g}. Allowed: float in 0..1, or uint8 in 0..255."
        )
    return batch.clamp(0, 1)
