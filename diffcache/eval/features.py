"""Collect the features of a set of pictures batch by batch, in one process or several, without keeping the pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from diffcache.eval.extractors import Extractor, PicturesError
from diffcache.eval.requirements import package

BATCH = 32


class FeatureSet:
    """The features of the pictures that were added: N × D numbers in memory.

    Args:
        extractor: The network that computes the features.
        batch_size: Number of pictures that the extractor takes at once.
        in_order: Whether rows stay in the order in which the pictures were added. This works in one process only.
    """

    def __init__(self, extractor: Extractor, *, batch_size: int = BATCH, in_order: bool = False) -> None:
        self.extractor, self.batch_size, self.in_order = extractor, batch_size, in_order
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        """Return the number of pictures added in this process."""
        return sum(map(len, self._rows))

    def add(self, pictures: np.ndarray | Tensor) -> None:
        """Add the features of pictures.

        Args:
            pictures: [N, H, W, 3], float in 0..1 or uint8.

        Raises:
            PicturesError: If ``Extractor.of`` raises it, or the number of features differs between batches.
        """
        made = [self.extractor.of(batch) for batch in _split(pictures, self.batch_size)]
        widths = {rows.shape[1] for rows in [*self._rows[:1], *made]}
        if len(widths) > 1:
            raise PicturesError(
                f"extractor {self.extractor.name!r} gave rows of {' and '.join(map(str, sorted(widths)))} features. "
                "Allowed: as many for every picture."
            )
        self._rows += made

    def reset(self) -> None:
        """Remove all features of this process."""
        self._rows.clear()

    def gathered(self) -> np.ndarray:
        """Return the features of the pictures of all processes.

        The rows are sorted unless ``in_order`` is set, so that the array does not depend on how the pictures were
        distributed over the processes. If there are several processes, all must call it after all have added their
        pictures. A process may have none.

        Returns:
            float64 [N, D].

        Raises:
            PicturesError: If no process has pictures, or the processes have different numbers of features.
        """
        mine = torch.cat(self._rows).double() if self._rows else torch.empty(0, 0, dtype=torch.float64)
        if dist.is_available() and dist.is_initialized() and not self.in_order:
            mine = _from_all(mine)
        if not len(mine):
            raise PicturesError("no pictures were added. Call add(pictures) first.")
        rows = mine.numpy()
        if self.in_order:
            return rows
        return np.asarray(rows[np.lexsort((rows[:, 0], rows.sum(axis=1)))])


def _split(pictures: np.ndarray | Tensor, size: int) -> list[np.ndarray | Tensor]:
    if pictures.ndim < 1 or not len(pictures):
        return [pictures]  # the extractor raises the error
    return [pictures[n : n + size] for n in range(0, len(pictures), size)]


def _from_all(mine: Tensor) -> Tensor:
    """Return the rows of all processes, concatenated, in every process.

    The number of rows may differ between processes.
    """
    gather = package(
        "torchmetrics.utilities.distributed", purpose="gathering features", install="'diffcache[eval]'"
    ).gather_all_tensors
    widths: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(widths, mine.shape[1])
    width = max(widths)
    if any(w not in (0, width) for w in widths):  # all processes have the same list, so all raise
        raise PicturesError(f"processes have rows of {widths} features. Allowed: the same extractor in all.")
    if not len(mine):
        mine = mine.new_empty(0, width)
    where = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return torch.cat([rows.cpu() for rows in gather(mine.to(where))])
