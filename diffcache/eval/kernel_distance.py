"""The kernel distance (KID, Bińkowski et al. 2018, arXiv 1801.01401), by torchmetrics: the squared maximum mean
discrepancy under the kernel (x·y / D + 1)³, a mean over random subsets. Unbiased: it compares across N, and may come
out below 0."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch

from diffcache.errors import BadOption
from diffcache.eval.extractors import PicturesError
from diffcache.eval.requirements import package

SUBSETS, SUBSET_SIZE = 100, 1000  # of the paper's code


class KernelDistance(NamedTuple):
    """mean over ``subsets`` of ``subset_size`` pictures each; std over them, None of a single one."""

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
    """Between float64 [N, D] and [M, D].

    ``subset_size``: None takes 1000, or all pictures of the smaller set where there are fewer; one subset is drawn, not
    ``subsets``, where it holds all pictures of both. Raises BadOption for a size beyond either set, PicturesError for
    sets of fewer than 2, MissingPackageError without torchmetrics.
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
        warnings.simplefilter("ignore", UserWarning)  # that it keeps features in memory: they are there anyway
        metric = kid.KernelInceptionDistance(
            torch.nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std) if subsets > 1 else None, subsets, size)
