"""Pictures of coloured squares, an extractor that sees their colours, and features from no picture at all."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.linalg
from torch import Tensor
from torch.nn import functional as F

from diffcache.eval import Distribution, extractors
from diffcache.eval.distribution import Distance
from diffcache.eval.extractors import Extractor
from diffcache.eval.frechet import Moments


def corners(pictures: Tensor) -> Tensor:
    """Twelve features: the mean colours of four quarters."""
    return F.adaptive_avg_pool2d(pictures, 2).flatten(1)


def small(name: str = "Corners", **settings: str) -> Extractor:
    return extractors.custom(corners, name=name, settings=settings)


def pictures(n: int, seed: int = 0, noise: float = 0.0, size: int = 24) -> np.ndarray:
    """uint8 [n, size, size, 3]: squares of random colours, and noise."""
    random = np.random.default_rng(seed)
    squares = np.kron(random.uniform(0, 1, (n, 4, 4, 3)), np.ones((1, size // 4, size // 4, 1)))
    return (np.clip(squares + random.normal(0, 1, squares.shape) * noise, 0, 1) * 255).round().astype(np.uint8)


def measured(extractor: Extractor, found: np.ndarray, real: np.ndarray, **options: Any) -> Distance:
    distribution = Distribution(extractor, **({"resamples": 0} | options))
    distribution.add(real, real=True)
    distribution.add(found)
    return distribution.compute()


def by_roots(a: Moments, b: Moments) -> float:
    """The formula as it stands in papers, by scipy's root of the product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # fewer pictures than features: it is less exact
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance + b.covariance - 2 * root.real))


def gaussian(n: int, width: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """float64 [n, width], correlated."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return np.asarray(random.normal(size=(n, width)) @ mix * scale + seed * 0.1)
