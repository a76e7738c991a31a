"""Metrics of pairs: one file, one metric; how far each sample lies from the same sample of the full run.

A file holds ``ABOUT`` and ``score(found, reference, *, option=…) -> float64 [N]``, one number per sample. It may hold
``check(*, option=…)`` with the same options, which raises what ``score`` would raise for want of a package, of weights
or of a device: it is called before anything runs. A metric takes one kind of sample:

    pictures  float [N, H, W, 3] in 0..1; or videos [N, F, H, W, 3], scored frame by frame, mean over the frames
    audio     float [N, channels, samples], -1..1 is full scale
    latents   float [N, ...]

It may hold ``RANGE``, the least and the greatest number that ``score`` returns. Scores out of it that are read from a
file are not believed.

The name of the file is the name that users type. Your own is reached as ``"package.module:attribute"``: what stands
there has the same two. What looks at one set of samples only, and at its prompts, is a ``Scorer``.
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
    """What a file of this folder is, and what the address of a foreign metric must lead to."""

    ABOUT: About

    def score(self, found: np.ndarray, reference: np.ndarray, **options: Any) -> np.ndarray: ...


def available() -> tuple[str, ...]:
    """The names of the metrics, sorted."""
    return registry.names(__name__)


def load(name: str) -> Metric:
    """The metric called ``name``, or the one at ``"package.module:attribute"``.

    Raises UnknownName where nothing has that name, or what has it is no metric.
    """
    metric: Any = registry.load(__name__, name)
    if not isinstance(getattr(metric, "ABOUT", None), About) or not callable(getattr(metric, "score", None)):
        raise UnknownName(
            "metric", name, available(), next_step="A metric has ABOUT, an About, and score(), a function."
        )
    found: Metric = metric
    return found


def check(name: str, **options: Any) -> Metric:
    """Return the metric called ``name`` if it can score with these options, before there is anything to score.

    Raises UnknownName for a metric or an option that does not exist, and what ``check`` in the metric's file raises for
    values that it cannot take, packages that are not installed and weights that are missing.
    """
    metric = load(name)
    _check_names(name, metric, options)
    if hasattr(metric, "check"):
        metric.check(**options)
    return metric


def span(name: str) -> tuple[float, float]:
    """Return the least and the greatest value of the metric called ``name``. Raises UnknownName."""
    low, high = getattr(load(name), "RANGE", (-math.inf, math.inf))
    return float(low), float(high)


def score(name: str, found: np.ndarray, reference: np.ndarray, **options: Any) -> np.ndarray:
    """float64 [N] of the metric called ``name``.

    Raises UnknownName for a metric or an option that is not there; SamplesError for arrays that the metric cannot take,
    and for values of a foreign metric that are not one finite number per sample; and what the metric itself raises.
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
