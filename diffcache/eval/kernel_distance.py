"""Compute the kernel distance (KID, Bińkowski et al. 2018, arXiv 1801.01401) with torchmetrics.

It is the squared maximum mean discrepancy under the kernel (x·y / D + 1)³, as a mean over random subsets. It is
unbiased: values for different numbers of pictures are comparable, and values below 0 are possible.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch

from diffcache.errors import BadOption
from diffcache.eval.extractors import PicturesError
from diffcache.eval.requirements import package

SUBSETS, SUBSET_SIZE = 100, 1000  # the values in the paper's code


class KernelDistance(NamedTuple):
    """A kernel distance.

    Attributes:
        mean: Mean over the subsets.
        std: Standard deviation over the subsets. None if there is one subset.
        subsets: Number of subsets.
        subset_size: Number of pictures in a subset.
    """

    mean: float
    std: float | None
    subsets: int
    subset_size: int


def kernel_distance(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Return the kernel distance between two sets of features.

    Args:
        features: float64 [N, D].
        reference: float64 [M, D].
        subsets: Number of subsets. One subset is used if it contains all pictures of both sets.
        subset_size: Number of pictures in a subset. None: 1000, or the size of the smaller set if that is less.
        seed: Seed of the draws.

    Raises:
        BadOption: If a subset is larger than either set, or ``subsets`` is below 1.
        PicturesError: If a set has fewer than 2 pictures.
        MissingPackageError: If torchmetrics is not installed.
    """
    least = min(len(features), len(reference))
    if least < 2:
        raise PicturesError(f"{len(features)} and {len(reference)} pictures were given. Allowed: 2 or more of each.")
    if subset_size is not None and not 2 <= subset_size <= least:
        raise BadOption("subset_size", subset_size, f"2 to {least}, the pictures of the smaller set")
    if subsets < 1:
        raise BadOption("subsets", subsets, "1 or more")
    size = min(SUBSET_SIZE, least) if subset_size is None else subset_size
    if size == len(features) == len(reference):
        subsets = 1  # every subset would be the same
    kid = package("torchmetrics.image.kid", purpose="the kernel distance", install="'diffcache[eval]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns that it keeps features in memory
        metric = kid.KernelInceptionDistance(
            torch.nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std) if subsets > 1 else None, subsets, size)
