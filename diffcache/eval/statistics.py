"""Compute intervals of means over samples, and verdicts on two methods.

The samples are prompts and seeds. Nothing else varies, because runs are deterministic. The interval is the percentile
bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3): N values are drawn with
replacement, many times; 2.5 % of their means lie below the interval and 2.5 % above. Two methods are compared by their
differences on each sample, because prompts differ more from each other than methods do on one prompt.

With few samples the interval is too narrow. In 1,500 simulated sets, the interval at level 95 % contained the true mean
in this percentage of cases (± 1):

    samples                  4    8   16   32   64  256
    normal values           82   88   93   94   94   94
    log-normal values       67   79   85   87   90   94     far from symmetric: exp of the normal ones

Hence FEW and ENOUGH: below 16 samples the interval is not reliable, and there is no verdict. Below 64 samples there is
a warning.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.metrics import Better

Verdict = Literal["better", "worse", "no difference"]

LEVEL = 0.95
MOST, LEAST = 10_000, 2000  # resamples: the ends of an interval vary by 1 or 2 % of its width between seeds
DRAWS = 20_000_000  # beyond 2000 samples there are fewer resamples, for this many numbers drawn altogether
FEW, ENOUGH = 16, 64  # samples: below FEW there is no verdict, below ENOUGH a warning
AT_ONCE = 1 << 22  # numbers that are drawn at once; this bounds memory to 48 MiB
ROUNDING = 1e-12  # smaller relative differences come from float64 sums, not from methods


class ValuesError(DiffCacheError, ValueError):
    """Values for which no statistics can be computed."""


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


def interval(values: ArrayLike, *, level: float = LEVEL, resamples: int | None = None, seed: int = 0) -> Interval:
    """Return the mean of values, and an interval for the mean over all possible samples.

    The result does not depend on the order of the values. One value, or N equal values, give an interval of width 0;
    see ``enough``.

    Args:
        values: Finite numbers [N], N ≥ 1.
        level: Level of the interval, between 0 and 1.
        resamples: Number of resamples. None: 10,000, or fewer for more than 2000 values.
        seed: Seed of the draws.

    Raises:
        ValuesError: If there are no values, a value is NaN or infinite, or the shape is not [N].
        BadOption: If ``level`` is not between 0 and 1, or ``resamples`` is below 1.
    """
    array = np.sort(_checked("values", values))  # sorted, so that the draws do not depend on the order
    if not 0 < level < 1:
        raise BadOption("level", level, "a number between 0 and 1, such as 0.95")
    if resamples is None:
        resamples = max(LEAST, min(MOST, DRAWS // len(array)))
    if resamples < 1:
        raise BadOption("resamples", resamples, "1 or more")
    tail = (1 - level) / 2
    low, high = np.quantile(_means(array, resamples, seed), (tail, 1 - tail))
    least, most = array[0], array[-1]  # rounding must not move a mean outside the values
    return Interval(*(float(np.clip(x, least, most)) for x in (array.mean(), low, high)))


def paired(
    values: ArrayLike,
    reference_values: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int | None = None,
    seed: int = 0,
) -> Interval:
    """Return the ``interval`` of values − reference_values, sample by sample.

    Raises:
        ValuesError: If ``interval`` raises it, or the numbers of values differ.
        BadOption: If ``interval`` raises it.
    """
    a, b = _checked("values", values), _checked("reference_values", reference_values)
    if len(a) != len(b):
        raise ValuesError(
            f"{len(a)} values and {len(b)} of the reference. Allowed: as many of both, value i of each from the same "
            "prompt and seed."
        )
    difference = a - b
    difference[np.abs(difference) <= ROUNDING * np.maximum(np.abs(a), np.abs(b))] = 0.0
    return interval(difference, level=level, resamples=resamples, seed=seed)


def verdict(
    values: ArrayLike,
    reference_values: ArrayLike,
    better: Better,
    *,
    level: float = LEVEL,
    resamples: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Return whether a method is better or worse than the reference, by values of the same prompts and seeds.

    The verdict is "better" or "worse" only if the paired interval excludes 0 and there are at least FEW samples. "no
    difference" means that none was shown, not that there is none. If there is no difference, a verdict is wrong with a
    probability of about 1 − level: at 95 %, one of twenty.

    Args:
        values: Values of the method, [N].
        reference_values: Values of the reference, [N].
        better: Whether "higher" or "lower" values are better.
        level: Level of the interval.
        resamples: Number of resamples; see ``interval``.
        seed: Seed of the draws.

    Raises:
        ValuesError: If ``paired`` raises it.
        BadOption: If ``better``, ``level`` or ``resamples`` is not valid.
    """
    if better not in get_args(Better):
        raise BadOption("better", better, " or ".join(get_args(Better)))
    found = paired(values, reference_values, level=level, resamples=resamples, seed=seed)
    if np.size(values) < FEW or found.low <= 0 <= found.high:
        return "no difference"
    return "better" if (found.low > 0) == (better == "higher") else "worse"


def verdict_of_sets(
    value: float, reference: float, drawn: ArrayLike, reference_drawn: ArrayLike, better: Better
) -> Verdict:
    """Return whether a set of pictures is better or worse than another of the same prompts and seeds.

    The value is a distance of whole sets. The interval of the difference is ±1.96 standard deviations over the
    resamples (Efron and Tibshirani 1993, section 13.2). Percentiles would need more resamples than is practical for
    distances of sets.

    Args:
        value: Distance of the set.
        reference: Distance of the other set.
        drawn: Distances of the set in R resamples, [R].
        reference_drawn: Distances of the other set in the same resamples, [R].
        better: Whether "higher" or "lower" values are better.

    Raises:
        ValuesError: If the numbers of resamples differ, or are below 2.
        BadOption: If ``better`` is not "higher" or "lower".
    """
    if better not in get_args(Better):
        raise BadOption("better", better, " or ".join(get_args(Better)))
    a, b = _checked("drawn", drawn), _checked("reference_drawn", reference_drawn)
    if len(a) != len(b) or len(a) < 2:
        raise ValuesError(f"{len(a)} and {len(b)} resamples. Allowed: as many of both, 2 or more, drawn alike.")
    difference, wide = value - reference, 1.96 * float(np.std(a - b, ddof=1))
    if abs(difference) <= wide:
        return "no difference"
    return "better" if (difference > 0) == (better == "higher") else "worse"


def enough(n: int) -> str:
    """Return a warning if ``n`` samples are too few; "" from ENOUGH on.

    Raises:
        BadOption: If ``n`` is below 1.
    """
    if n < 1:
        raise BadOption("n", n, "1 sample or more")
    if n >= ENOUGH:
        return ""
    counted = f"{n} sample{'' if n == 1 else 's'}"
    if n < FEW:
        return (
            f"Only {counted}: intervals of fewer than {FEW} are much too narrow, and no verdict is drawn from them. "
            f"Take {ENOUGH} or more."
        )
    return (
        f"Only {counted}: intervals of fewer than {ENOUGH} are somewhat too narrow, and verdicts weak. Take {ENOUGH} "
        "or more before relying on one."
    )


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.ndim != 1 or not len(array):
        raise ValuesError(
            f"{name}: {array.dtype} of shape {list(array.shape)}. Allowed: numbers, one per sample, 1 or more."
        )
    if not np.isfinite(array).all():
        index = int(np.argmax(~np.isfinite(array)))
        raise ValuesError(
            f"{name}: {array[index]} at sample {index}. Allowed: finite numbers. Find out why this sample has no "
            "valid value; do not leave it out of the mean."
        )
    return array.astype(np.float64)


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the means of ``resamples`` draws with replacement, of as many values as there are: float64 [resamples]."""
    generator = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // len(values))
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(values), size=(min(rows, resamples - start), len(values)), dtype=np.int32)
        parts.append(values[drawn].mean(axis=1))
    return np.concatenate(parts)
