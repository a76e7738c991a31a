"""The Fréchet distance between two sets of features, taken as Gaussians (Dowson and Landau 1982; Heusel et al. 2017,
arXiv 1706.08500, equation 6):

    |m₁ − m₂|² + tr(C₁) + tr(C₂) − 2 tr((C₁ C₂)^½)                                                       (1)

The last trace is computed as the sum of the singular values of R₁ R₂ᵀ, where Rᵢᵀ Rᵢ = Cᵢ. It is the same number, but
exact to rounding where there are fewer pictures than features: eigenvalues of C₁ C₂ that should be zero come out as
1e-16, their roots as 1e-8 each, and there are hundreds of them. That is what a root of the product gives (scipy's
sqrtm, torchmetrics): 5e-8 of the value with 60 pictures and 300 features, and 1e-5 between equal sets, here 0.

Numbers of pictures matter: of N pictures the distance comes out too large, by about a share of 1 / N. Values compare at
the same N only; ``floor`` is what pictures of the reference itself would get.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffcache.errors import BadOption
from diffcache.eval.extractors import PicturesError

LEVEL = 0.95
RESAMPLES = 50


class Moments(NamedTuple):
    """mean float64 [D], covariance float64 [D, D] (unbiased, over N − 1)."""

    mean: np.ndarray
    covariance: np.ndarray


class Spread(NamedTuple):
    """How far the distance would move with other pictures.

    low, high  of the interval
    bias       by how much resamples lie above the value on average, which the interval leaves out
    drawn      the distance of every resample. Sets of as many rows are resampled alike: row i of one counts as often as
               row i of the other
    """

    low: float
    high: float
    bias: float
    drawn: tuple[float, ...]


class Floor(NamedTuple):
    """The distance between two parts of the reference, of ``samples`` and ``against`` pictures."""

    value: float
    samples: int
    against: int


def moments(features: np.ndarray) -> Moments:
    """Of ``features`` [N, D]. Raises PicturesError for fewer than 2 rows."""
    if len(features) < 2:
        raise PicturesError(f"{len(features)} picture was given. Allowed: 2 or more, a covariance needs them.")
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1))


def distance(a: Moments, b: Moments) -> float:
    """Equation (1), in float64; 0 or more."""
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance).T, compute_uv=False).sum()
    return _sum(a.mean - b.mean, np.trace(a.covariance) + np.trace(b.covariance), cross)


def spread(
    features: np.ndarray, reference: Moments, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Spread:
    """The interval of the distance of ``features`` [N, D] from ``reference``: the bootstrap over pictures.

    N rows are drawn with replacement, ``resamples`` times. A resample repeats rows, so it lies too far away, by about
    as much again as N pictures do; the percentiles are moved by the mean difference. What is left is the scatter at
    this N, not the distance at endless N. The reference stays as it is. Raises BadOption.
    """
    if resamples < 2:
        raise BadOption("resamples", resamples, "2 or more")
    if not 0 < level < 1:
        raise BadOption("level", level, "a number between 0 and 1, such as 0.95")
    random = np.random.default_rng(seed)
    centred = features - features.mean(axis=0)  # moves nothing but rounding
    offset = features.mean(axis=0) - reference.mean
    projected = centred @ _root(reference.covariance).T
    total = float(np.trace(reference.covariance))
    n = len(features)

    def of(counts: np.ndarray) -> float:
        rows = np.flatnonzero(counts)
        share = counts[rows] / n
        scale = np.sqrt(counts[rows] / (n - 1))[:, None]
        mean = share @ centred[rows]
        variance = np.square((centred[rows] - mean) * scale).sum()
        cross = _nuclear((projected[rows] - share @ projected[rows]) * scale)
        return _sum(mean + offset, total + float(variance), cross)

    value = of(np.ones(n, int))
    drawn = np.array([of(np.bincount(random.integers(n, size=n), minlength=n)) for _ in range(resamples)])
    bias = float(drawn.mean()) - value
    tail = (1 - level) / 2
    low, high = (float(x) - bias for x in np.quantile(drawn, (tail, 1 - tail)))
    return Spread(max(low, 0.0), high, bias, tuple(drawn.tolist()))


def floor(features: np.ndarray, samples: int, *, seed: int = 0) -> Floor | None:
    """What pictures of the reference itself would get: the distance between two parts of it, ``features`` [M, D].

    One part is as large as the set that is measured, or half the reference where that is less; the other is the rest.
    None where there are fewer than 4 rows.
    """
    if len(features) < 4:
        return None
    size = max(2, min(samples, len(features) // 2))
    order = np.random.default_rng(seed).permutation(len(features))
    value = distance(moments(features[order[:size]]), moments(features[order[size:]]))
    return Floor(value, size, len(features) - size)


def _sum(difference: np.ndarray, traces: float, cross: float) -> float:
    return max(0.0, float(difference @ difference + traces - 2 * cross))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [r, D] with Rᵀ R = covariance, r its rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(np.sqrt(values[kept])[:, None] * vectors[:, kept].T)


def _nuclear(matrix: np.ndarray) -> float:
    """Sum of the singular values, by the smaller Gram matrix: quicker, and as good as an interval needs."""
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum())
