"""Intervals of means over samples, and what may be said of two methods.

Samples here are prompts and seeds: the only thing that varies, for a run is exact. The interval is the percentile
bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3): the mean of N values drawn with
replacement, many times; 2.5 % of these means lie below it and 2.5 % above. Two methods are compared sample by
sample, on the differences: prompts differ more among each other than methods do on the same prompt.

Few samples make it too narrow. Meant to hold the true mean in 95 of 100 cases, it held it in so many of 1,500 simulated
sets, in percent (give or take 1):

    samples                  4    8   16   32   64  256
    normal values           82   88   93   94   94   94
    log-normal values       67   79   85   87   90   94     far from symmetric: exp of the normal ones

Hence FEW and ENOUGH: below 16 samples an interval is a guess and no verdict is drawn from it; below 64 a warning.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.metrics import Better

Verdict = Literal["better", "worse", "no difference"]

LEVEL = 0.95
MOST, LEAST = 10_000, 2000  # resamples: the ends of an interval wander by 1 or 2 % of its width from seed to seed
DRAWS = 20_000_000  # beyond 2000 samples there are fewer resamples, for this many numbers drawn altogether
FEW, ENOUGH = 16, 64  # samples: below the first no verdict is given, below the second it comes with a warning
AT_ONCE = 1 << 22  # numbers drawn in one go: a bound on memory, 48 MiB
ROUNDING = 1e-12  # differences smaller than this share of the values are those of float64 sums, not of methods


class ValuesError(DiffCacheError, ValueError):
    """Values that no statistics can be made of."""


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: ArrayLike, *, level: float = LEVEL, resamples: int | None = None, seed: int = 0) -> Interval:
    """The mean of ``values`` [N], and between which two numbers the mean over all possible samples lies.

    The same values give the same interval, in whatever order they come. One value, or N equal ones, give an interval of
    no width: see ``enough``. ``resamples``: 10,000, fewer where there are more than 2000 values.

    Raises ValuesError for none, NaN, Inf or another shape; BadOption for a level not within 0..1, or no resamples.
    """
    array = np.sort(_checked("values", values))  # sorted: the order must not choose what is drawn
    if not 0 < level < 1:
        raise BadOption("level", level, "a number between 0 and 1, such as 0.95")
    if resamples is None:
        resamples = max(LEAST, min(MOST, DRAWS // len(array)))
    if resamples < 1:
        raise BadOption("resamples", resamples, "1 or more")
    tail = (1 - level) / 2
    low, high = np.quantile(_means(array, resamples, seed), (tail, 1 - tail))
    least, most = array[0], array[-1]  # rounding must not carry a mean beyond the values
    return Interval(*(float(np.clip(x, least, most)) for x in (array.mean(), low, high)))


def paired(
    values: ArrayLike,
    reference_values: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int | None = None,
    seed: int = 0,
) -> Interval:
    """The ``interval`` of values − reference_values, sample by sample.

    Raises what ``interval`` raises, and ValuesError where there are not as many of one as of the other.
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
    """Is a method better or worse than the reference, by values of the same prompts and seeds?

    Only where the paired interval excludes 0, and from FEW samples on: fewer cannot show a difference. "no difference"
    means that none was shown, not that there is none. Each verdict by itself is wrong in about (1 − level) of the cases
    where there is no difference; of twenty such verdicts one is.

    Raises what ``paired`` raises, and BadOption for another ``better``.
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
    """Is a set of pictures better or worse than another of the same prompts and seeds, by a distance of whole sets?

    ``drawn`` and ``reference_drawn`` [R]: their distances in the same R resamples. The interval of the difference is
    ±1.96 standard deviations of it over the resamples (Efron and Tibshirani 1993, section 13.2): ends of percentiles
    would need more resamples than distances of sets can be taken in.

    Raises ValuesError for other numbers of resamples, BadOption for another ``better``.
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
    """A warning where ``n`` samples are too few, or "" from ENOUGH on."""
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
            f"{name}: {array[index]} at sample {index}. Allowed: finite numbers. Leave no sample out of the mean "
            "silently: find out why it has none."
        )
    return array.astype(np.float64)


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [resamples]: means of as many values, drawn with replacement."""
    generator = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // len(values))
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(values), size=(min(rows, resamples - start), len(values)), dtype=np.int32)
        parts.append(values[drawn].mean(axis=1))
    return np.concatenate(parts)
