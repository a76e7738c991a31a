"""Measure how far a set of pictures lies from a reference set, by the Fréchet distance and the kernel distance.

The number of pictures is not bounded by memory, because only features are kept.

    found = Distribution(extractors.load("efflite0"))
    for pictures in real: found.add(pictures, real=True)      # or Distribution(extractor, ReferenceStatistics.load(…))
    for pictures in made: found.add(pictures)
    found.compute().line()

Under torch.distributed, every process adds its own share, and all processes call ``compute``. Each gets the result that
one process with all pictures would get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diffcache.errors import BadOption, Unusable
from diffcache.eval import frechet
from diffcache.eval.extractors import Extractor, PicturesError
from diffcache.eval.features import BATCH, FeatureSet
from diffcache.eval.frechet import Floor, Spread
from diffcache.eval.kernel_distance import SUBSETS, KernelDistance, kernel_distance
from diffcache.eval.reference import ReferenceStatistics


@dataclass(frozen=True, slots=True)
class Distance:
    """The distances of a set of pictures from a reference set.

    Attributes:
        name: Name of the Fréchet distance: FID, or FD-EXTRACTOR.
        value: The Fréchet distance.
        spread: The interval of the Fréchet distance over the pictures. None if no resamples were requested.
        samples: Number of pictures in the measured set.
        reference_samples: Number of pictures in the reference set. None if the file of the reference does not state it.
        features: Number of features of a picture.
        floor: The distance of pictures of the reference from other pictures of the reference. None if it is not known.
        kernel_name: Name of the kernel distance: KID, or KD-EXTRACTOR.
        kernel: The kernel distance. None if only statistics of the reference are known.
    """

    name: str
    value: float
    spread: Spread | None
    samples: int
    reference_samples: int | None
    features: int
    floor: Floor | None
    kernel_name: str
    kernel: KernelDistance | None

    def line(self) -> str:
        """Return one line of text with the names, the values, the numbers of pictures and the floor."""
        text = f"{self.name} {self.value:.6g}"
        if self.spread:
            text += f" [{self.spread.low:.6g}, {self.spread.high:.6g}]"
        known = "an unknown number" if self.reference_samples is None else str(self.reference_samples)
        text += f"  N {self.samples} against {known}"
        if self.floor:
            text += (
                f"  floor {self.floor.value:.6g} (reference alone, {self.floor.samples} against {self.floor.against})"
            )
        else:
            text += "  floor unknown (no pictures of the reference)"
        if self.kernel:
            text += f"  {self.kernel_name} {self.kernel.mean:.4g}"
            text += "" if self.kernel.std is None else f" ± {self.kernel.std:.2g}"
        return text

    def tree(self) -> dict[str, Any]:
        """Return the distances as an object that JSON can hold."""
        return {
            "name": self.name,
            "value": self.value,
            "samples": self.samples,
            "reference_samples": self.reference_samples,
            "features": self.features,
            "interval": {"low": self.spread.low, "high": self.spread.high} if self.spread else None,
            "floor": self.floor._asdict() if self.floor else None,
            "kernel": {"name": self.kernel_name, **self.kernel._asdict()} if self.kernel else None,
        }


class Distribution:
    """Two sets of pictures, of which only the features are kept.

    Args:
        extractor: The network that computes the features.
        reference: Statistics that replace real pictures. None: real pictures are added with ``real=True``.
        batch_size: Number of pictures that the extractor takes at once.
        resamples: Number of resamples for the interval. 0: no interval.
        subsets: Number of subsets for ``kernel_distance``.
        subset_size: Size of a subset for ``kernel_distance``.
        seed: Seed of all random draws.
        in_order: Whether picture i of every measured set has the same prompt and seed. Sets are then resampled alike,
            so that ``statistics.verdict_of_sets`` can compare them. This works in one process only.

    Raises:
        MixedExtractorsError: If the statistics were made with another extractor.
        BadOption: If the batch size or the number of resamples is not valid.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: ReferenceStatistics | None = None,
        *,
        batch_size: int = BATCH,
        resamples: int = frechet.RESAMPLES,
        subsets: int = SUBSETS,
        subset_size: int | None = None,
        seed: int = 0,
        in_order: bool = False,
    ) -> None:
        if batch_size < 1:
            raise BadOption("batch_size", batch_size, "1 or more")
        if resamples < 0 or resamples == 1:
            raise BadOption("resamples", resamples, "2 or more, or 0 for no interval")
        if reference is not None:
            reference.demand(extractor)
        self.extractor, self.reference = extractor, reference
        self.resamples, self.subsets, self.subset_size, self.seed = resamples, subsets, subset_size, seed
        self._found = FeatureSet(extractor, batch_size=batch_size, in_order=in_order)
        self._real = FeatureSet(extractor, batch_size=batch_size)

    def add(self, pictures: np.ndarray | Tensor, *, real: bool = False) -> None:
        """Add pictures to the measured set, or to the reference set.

        Args:
            pictures: [N, H, W, 3], float in 0..1 or uint8.
            real: Whether the pictures belong to the reference set.

        Raises:
            PicturesError: If the pictures are not valid.
            BadOption: If ``real`` is true and the reference was given as statistics.
        """
        if real and self.reference is not None:
            raise Unusable(
                "real=True", "the reference was given as statistics", "Add generated pictures only, with real=False"
            )
        (self._real if real else self._found).add(pictures)

    def reset(self, *, real: bool = False) -> None:
        """Remove the pictures of the measured set, and those of the reference set if ``real`` is true."""
        self._found.reset()
        if real:
            self._real.reset()

    def statistics(self) -> ReferenceStatistics:
        """Return the statistics of the reference set, which can be saved.

        If there are several processes, all must call this method.
        """
        if self.reference is not None:
            return self.reference
        return ReferenceStatistics.of(self._real.gathered(), self.extractor, seed=self.seed)

    def compute(self) -> Distance:
        """Return the distances of the measured set from the reference set.

        If there are several processes, all must call this method.

        Raises:
            PicturesError: If either set has fewer than 2 pictures, or the sets have different numbers of features.
        """
        features = self._found.gathered()
        real = None if self.reference is not None else self._real.gathered()
        kernel = None
        if real is None:
            assert self.reference is not None  # there is either a reference or a set of real pictures
            target, many = self.reference.moments, self.reference.samples
            floor = _known_floor(self.reference)
        else:
            _same_width(features, len(real[0]))
            target, many = frechet.moments(real), len(real)
            floor = frechet.floor(real, len(features), seed=self.seed)
            kernel = kernel_distance(features, real, subsets=self.subsets, subset_size=self.subset_size, seed=self.seed)
        _same_width(features, len(target.mean))
        own = frechet.moments(features)
        spread = None
        if self.resamples:
            spread = frechet.spread(features, target, resamples=self.resamples, seed=self.seed)
        return Distance(
            self.extractor.frechet,
            frechet.distance(own, target),
            spread,
            len(features),
            many,
            features.shape[1],
            floor,
            self.extractor.kernel,
            kernel,
        )


def _same_width(features: np.ndarray, width: int) -> None:
    if features.shape[1] != width:
        raise PicturesError(
            f"the reference has {width} features, the pictures have {features.shape[1]}: not one network."
        )


def _known_floor(reference: ReferenceStatistics) -> Floor | None:
    if reference.floor is None or reference.floor_samples is None or reference.samples is None:
        return None
    return Floor(reference.floor, reference.floor_samples, reference.samples - reference.floor_samples)
