"""Read and write the statistics of a set of pictures, which the Fréchet distance uses as a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffcache.documents import checks, files
from diffcache.documents.checks import put, refuse
from diffcache.documents.document import Document
from diffcache.errors import DiffCacheError
from diffcache.eval import frechet
from diffcache.eval.extractors import INCEPTION, Extractor

SYMMETRY = 1e-6  # relative to the largest variance, because other programs sum in float32
SUFFIXES = (".safetensors", ".npz")


class MixedExtractorsError(DiffCacheError):
    """Features of two networks, or of one network with two settings, which have no distance."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceStatistics(Document):
    """The mean and the covariance of the features of a set of pictures.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], symmetric, over N − 1.
        samples: The number N of pictures. None if the file does not state it.
        extractor: Name of the network.
        settings: sha256 of the extractor's name and settings.
        floor: Distance between two halves of these pictures. None if it is not known.
        floor_samples: Number of pictures in the first half. None if there is no floor.

    Raises:
        DocumentError: If a field is not valid.
    """

    FORMAT: ClassVar[str] = "diffcache.reference"
    VERSION: ClassVar[int] = 1
    FILENAME: ClassVar[str] = "reference.safetensors"

    mean: np.ndarray
    covariance: np.ndarray
    samples: int | None
    extractor: str
    settings: str
    floor: float | None = None
    floor_samples: int | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, mean=checks.array(me, "mean", self.mean, np.float64, feature=None))
        width = len(self.mean)
        put(
            self,
            covariance=checks.array(me, "covariance", self.covariance, np.float64, feature=width, other=width),
        )
        checks.text(me, "extractor", self.extractor)
        checks.sha256(me, "settings", self.settings)
        if self.samples is not None:
            put(self, samples=checks.count(me, "samples", self.samples, least=2))
        if (self.floor is None) != (self.floor_samples is None):
            refuse(me, "floor_samples", f"found {self.floor_samples!r}", "a number if there is a floor, else None")
        if self.floor is not None:
            put(self, floor=checks.real(me, "floor", self.floor, least=0))
            put(self, floor_samples=checks.count(me, "floor_samples", self.floor_samples, least=2))
        variances = np.diagonal(self.covariance)
        if variances.min() < 0:
            refuse(me, "covariance", f"found the variance {variances.min():g}", "0 or more on the diagonal")
        if np.abs(self.covariance - self.covariance.T).max() > SYMMETRY * max(variances.max(), 1e-300):
            refuse(me, "covariance", "found an array that is not symmetric", "a symmetric one")

    @property
    def moments(self) -> frechet.Moments:
        """The mean and the covariance."""
        return frechet.Moments(self.mean, self.covariance)

    @classmethod
    def of(cls, features: np.ndarray, extractor: Extractor, *, seed: int = 0) -> ReferenceStatistics:
        """Return the statistics of features.

        Args:
            features: float64 [N, D].
            extractor: The extractor that computed the features.
            seed: Seed of the division into halves.

        Raises:
            PicturesError: If there are fewer than 2 pictures.
        """
        mean, covariance = frechet.moments(features)
        floor = frechet.floor(features, len(features), seed=seed)
        return cls(
            mean=mean,
            covariance=covariance,
            samples=len(features),
            extractor=extractor.name,
            settings=extractor.digest,
            floor=floor.value if floor else None,
            floor_samples=floor.samples if floor else None,
        )

    def demand(self, extractor: Extractor) -> None:
        """Raise MixedExtractorsError unless the statistics were made with ``extractor``, with the same settings."""
        if (self.extractor, self.settings) == (extractor.name, extractor.digest):
            return
        if self.extractor != extractor.name:
            found = f"of {self.extractor}, the pictures are to be described by {extractor.name}"
        else:
            found = f"of {self.extractor} with other weights or another size than are in use now"
        raise MixedExtractorsError(
            f"the statistics are {found}. Allowed: one extractor, with one set of settings, for both. Choose it with "
            "--extractor, or compute the statistics again from the pictures."
        )


def read(path: Path, extractor: Extractor) -> ReferenceStatistics:
    """Return the statistics in a file that ``save`` or pytorch-fid (``.npz``) wrote.

    Raises:
        DocumentError: If the file is not valid.
        MixedExtractorsError: If the statistics were made with another extractor.
    """
    found = _pytorch_fid(path, extractor) if path.suffix == ".npz" else ReferenceStatistics.load(path)
    found.demand(extractor)
    return found


def _pytorch_fid(path: Path, extractor: Extractor) -> ReferenceStatistics:
    """Return the statistics in a file of pytorch-fid: ``mu`` [2048] and ``sigma`` [2048, 2048] of the same network.

    pytorch-fid resizes with PyTorch's bilinear filter. The filter of TensorFlow, which is used here, is shifted by a
    fraction of a pixel. The values therefore differ slightly, and more for pictures of a size far from 299 pixels.
    """
    where = str(path)
    if extractor.name != INCEPTION:
        raise MixedExtractorsError(
            f"{where} holds statistics of FID's Inception network, as pytorch-fid writes them; the pictures are to be "
            f"described by {extractor.name}. Allowed: --extractor inception."
        )
    found = files.read_arrays(path)
    for name in ("mu", "sigma"):
        if name not in found or found[name].dtype.kind not in "fiu":
            refuse(where, name, f"found {', '.join(found)!r:.80}", "an .npz of numbers, mu and sigma")
    mean, covariance = (found[name].astype(np.float64) for name in ("mu", "sigma"))
    width = int(extractor.settings.get("features", 0))
    if mean.shape != (width,):
        refuse(where, "mu", f"found shape {list(mean.shape)}", f"[{width}], the features that FID is about")
    return ReferenceStatistics(
        mean=mean, covariance=covariance, samples=None, extractor=extractor.name, settings=extractor.digest
    )
