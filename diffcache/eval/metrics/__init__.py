"""Metrics that compare each sample with the same sample of the full run. Each file of this folder is a metric.

A file defines ``ABOUT`` and ``score(found, reference, *, option=…) -> float64 [N]``, with one number per sample. It may
define ``check(*, option=…)`` with the same options. ``check`` runs before anything else and raises the errors of
``score`` for missing packages, weights or devices. A metric takes one kind of sample:

    pictures  float [N, H, W, 3] in 0..1; or videos [N, F, H, W, 3], scored frame by frame, mean over the frames
    audio     float [N, channels, samples], -1..1 is full scale
    latents   float [N, ...]

A file may define ``RANGE``, the least and the greatest number that ``score`` returns. Saved scores outside this range
are rejected.

The name of the file is the name that users type. A custom metric is given as ``"package.module:attribute"``; the
attribute has the same members. A function of one set of samples and its prompts is a ``Scorer``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from diffcache import registry
from diffcache.errors import UnknownName
from diffcache.eval.metrics._about import About, Better
from diffcache.eval.metrics._checks import SamplesError, one_per_sample
from diffcache.eval.metrics._scorers import Scorer, class_accuracy, scorer

__all__ = [
    "About",
    "Better",
    "Metric",
    "SamplesError",
    "Scorer",
    "available",
    "check",
    "class_accuracy",
    "load",
    "score",
    "scorer",
    "span",
]


class Metric(Protocol):
    """The members of a file of this folder, and of the object at the address of a custom metric."""

    ABOUT: About

    def score(self, found: np.ndarray, reference: np.ndarray, **options: Any) -> np.ndarray: ...


def available() -> tuple[str, ...]:
    """Return the names of the metrics, sorted."""
    return registry.names(__name__)


def load(name: str) -> Metric:
    """Return the metric called ``name``, or the one at ``"package.module:attribute"``.

    Raises:
        UnknownName: If there is nothing of that name, or it is not a metric.
    """
    metric: Any = registry.load(__name__, name)
    if not isinstance(getattr(metric, "ABOUT", None), About) or not callable(getattr(metric, "score", None)):
        raise UnknownName(
            "metric", name, available(), next_step="A metric has ABOUT, an About, and score(), a function."
        )
    found: Metric = metric
    return found


def check(name: str, **options: Any) -> Metric:
    """Return the metric called ``name`` if it can score with these options, before there are samples.

    Raises:
        UnknownName: If there is no such metric or option.
        DiffCacheError: If the metric's own ``check`` raises it, for a wrong value, a missing package or missing
            weights.
    """
    metric = load(name)
    _check_names(name, metric, options)
    if hasattr(metric, "check"):
        metric.check(**options)
    return metric


def span(name: str) -> tuple[float, float]:
    """Return the least and the greatest value of the metric called ``name``.

    Raises:
        UnknownName: If there is no such metric.
    """
    low, high = getattr(load(name), "RANGE", (-math.inf, math.inf))
    return float(low), float(high)


def score(name: str, found: np.ndarray, reference: np.ndarray, **options: Any) -> np.ndarray:
    """Return the scores of the metric called ``name``.

    Args:
        name: Name or address of a metric.
        found: The samples of a method, of the kind that the metric takes.
        reference: The samples of the full run, of the same shape.
        **options: Options of the metric.

    Returns:
        float64 [N], one number per sample.

    Raises:
        UnknownName: If there is no such metric or option.
        SamplesError: If the metric cannot compare the arrays, or does not return one finite number per sample.
        DiffCacheError: If the metric itself raises it.
    """
    metric = load(name)
    _check_names(name, metric, options)
    return one_per_sample(name, metric.score(found, reference, **options), len(found))


def _check_names(name: str, metric: Metric, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(metric.score).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in known:
                raise UnknownName(f"option of {name!r}", option, known)
