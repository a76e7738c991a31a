"""Measure the distance of every method's pictures, as a set, from real pictures or from those of the full run.

All methods have the same resamples, so that the difference of two methods also has an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcache.errors import Unusable
from diffcache.eval import folders
from diffcache.eval import reference as references
from diffcache.eval.distribution import Distance, Distribution
from diffcache.eval.extractors import Extractor
from diffcache.eval.methods import Method
from diffcache.eval.plausible import Part
from diffcache.eval.saved_parts import EvaluationFolder

AT_ONCE = 64  # pictures that are read at once


@dataclass(frozen=True, slots=True)
class Sets:
    """An extractor and a reference, by which sets of pictures are compared.

    Attributes:
        extractor: The network that computes the features.
        real: A folder of pictures, or a file of statistics. None: the reference is the full run's pictures.
    """

    extractor: Extractor
    real: Path | None = None

    def check(self) -> None:
        """Raise the errors of reading the reference, before there is anything to compare with it."""
        if self.real is None:
            return
        if self._of_statistics(self.real):
            references.read(self.real, self.extractor)
        else:
            folders.pictures(self.real)

    @staticmethod
    def _of_statistics(real: Path) -> bool:
        return real.suffix in references.SUFFIXES or real.is_file()

    def measured(
        self, methods: Sequence[Method], parts: Sequence[Part], folder: EvaluationFolder
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Distance]]]:
        """Return the distances of all methods, measured from the pictures in the folder.

        Returns:
            Metric -> its description, and method -> metric -> distance.

        Raises:
            BadOption: If a method has no pictures.
        """
        (full,) = [m for m in methods if m.kind == "full"]
        found: dict[str, Distance] = {}
        pictures = {
            m.name: [folder.path / path for p in parts if p["method"] == m.name for path in p["pictures"]]
            for m in methods
        }
        if not all(pictures.values()):
            raise Unusable("extractor", "the outputs are not pictures", "Leave out the extractor")
        distribution = self._with_reference(pictures[full.name])
        for method in methods:
            if self.real is None and method is full:
                continue
            distribution.reset()
            for batch in folders.batches(pictures[method.name], AT_ONCE):
                distribution.add(batch)
            found[method.name] = distribution.compute()
        if not found:
            return {}, {}
        one = next(iter(found.values()))
        against = "real pictures" if self.real else "the full run's pictures of the same prompts and seeds"
        floor = one.floor
        halves = f" Floor: {floor.samples} pictures of the reference against {floor.against}." if floor else ""
        about = {
            one.name: {
                "title": one.name,
                "unit": "",
                "better": "lower",
                "about": f"Fréchet distance of {one.features} features from {against}, {one.samples} pictures.{halves}",
                "floor": floor.value if floor else None,
                "of_pairs": False,
            }
        }
        return about, {name: {one.name: distance} for name, distance in found.items()}

    def _with_reference(self, full: Sequence[Path]) -> Distribution:
        if self.real is not None and self._of_statistics(self.real):
            return Distribution(self.extractor, references.read(self.real, self.extractor), in_order=True)
        distribution = Distribution(self.extractor, in_order=True)
        for batch in folders.batches(folders.pictures(self.real) if self.real else full, AT_ONCE):
            distribution.add(batch, real=True)
        return distribution


def sets_of(extractor: Extractor | str | None, real: str | Path | None) -> Sets | None:
    """Return the extractor and the reference of sets, after checking them; None if sets are not compared.

    Raises:
        BadOption: If real pictures are given without an extractor.
        DiffCacheError: If the extractor or the reference cannot be loaded.
    """
    if extractor is None:
        if real is not None:
            raise Unusable(
                "real", "real pictures are compared only with an extractor", "Pass an extractor, or leave out real"
            )
        return None
    if isinstance(extractor, str):
        import torch

        from diffcache.eval import extractors

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractor = extractors.load(extractor, device=device)
    sets = Sets(extractor, None if real is None else Path(real))
    sets.check()
    return sets
