"""How far a set of pictures lies from a reference set: Fréchet and kernel distance, of any number of pictures.

    found = Distribution(extractors.load("efflite0"))
    for pictures in real: found.add(pictures, real=True)      # or Distribution(extractor, ReferenceStatistics.load(…))
    for pictures in made: found.add(pictures)
    found.compute().line()

Under torch.distributed every process adds its own share and all call ``compute``; each gets what one process with all
pictures would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diffcache.errors import BadOption
from diffcache.eval import frechet
from diffcache.eval.extractors import Extractor, PicturesError
from diffcache.eval.features import BATCH, FeatureSet
from diffcache.eval.frechet import Floor, Spread
from diffcache.eval.kernel_distance import SUBSETS, KernelDistance, kernel_distance
from diffcache.eval.reference import ReferenceStatistics


@dataclass(frozen=True, slots=True)
class Distance:
    """What was found.

    name               of the Fréchet distance: FID, or FD-EXTRACTOR
    value              of it
    spread             its interval over the pictures, None if not asked for
    samples            pictures that were measured
    reference_samples  pictures of the reference, None if its file does not say
    features           numbers that describe a picture
    floor              what pictures of the reference itself get, None if not known
    kernel_name        of the kernel distance: KID, or KD-EXTRACTOR
    kernel             None where only statistics of the reference are known
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
        """For people: value, name, N, floor."""
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
        """For programs: what JSON can hold."""
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
    """Two sets of pictures, of which features alone are kept.

    extractor    that describes them
    reference    statistics in the place of real pictures; None: add them with ``real=True``
    resamples    for the interval, 0 for none
    subsets      and ``subset_size``: of ``kernel_distance``
    seed         of everything that is drawn
    in_order     picture i of every set that is measured is of the same prompt and seed: then sets are resampled alike,
                 and ``statistics.verdict_of_sets`` can tell them apart. For one process

    Raises MixedExtractorsError for statistics of another extractor, BadOption.
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
        """``pictures`` [N, H, W, 3], float in 0..1 or uint8. Raises PicturesError; BadOption for real pictures beside
        statistics of a reference."""
        if real and self.reference is not None:
            raise BadOption("real", True, "False: the reference was given as statistics")
        (self._real if real else self._found).add(pictures)

    def reset(self, *, real: bool = False) -> None:
        """Forget the pictures that were measured; those of the reference too if ``real``."""
        self._found.reset()
        if real:
            self._real.reset()

    def statistics(self) -> ReferenceStatistics:
        """Of the reference, to be saved. Of several processes, all have to call it."""
        if self.reference is not None:
            return self.reference
        return ReferenceStatistics.of(self._real.gathered(), self.extractor, seed=self.seed)

    def compute(self) -> Distance:
        """Of several processes, all have to call it. Raises PicturesError for fewer than 2 pictures of either set."""
        features = self._found.gathered()
        real = None if self.reference is not None else self._real.gathered()
        kernel = None
        if real is None:
            assert self.reference is not None  # one of the two is there
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
