"""Read single results from the record of an evaluation: of one method, of the best, and as a table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffcache.errors import BadOption, UnknownName
from diffcache.eval.methods import FULL
from diffcache.eval.requirements import package
from diffcache.text import html_table

Record = Mapping[str, Any]

# Columns of numbers in the tables of a notebook: as many as fit into 390 px. Names of metrics are the longer ones.
FIRST_COLUMNS, LATER_COLUMNS = 5, 4


@dataclass(frozen=True, slots=True, repr=False)
class MethodResult:
    """The results of one method.

    Next to the attributes below, each metric of the evaluation is an attribute that holds the mean over the samples:
    ``result.psnr``, ``result.ssim``.

    Attributes:
        record: All results of the method, as docs/evaluation-record.md describes them.
    """

    record: Record

    @property
    def name(self) -> str:
        """The name of the method."""
        return str(self.record["name"])

    @property
    def computed_steps(self) -> float:
        """The work of the method in full steps of the loop."""
        return float(self.record["computed_steps"])

    @property
    def seconds(self) -> float:
        """The seconds of the sampling loop, the median over the calls."""
        return float(self.record["seconds"]["loop"]["median"])

    @property
    def speedup(self) -> float:
        """The speed-up of the sampling loop, the median over the calls of the ratio to the full run."""
        return float(self.record["speedup"]["loop"])

    @property
    def scores(self) -> dict[str, float]:
        """Metric -> the mean over the samples."""
        return {name: score["mean"] for name, score in self.record["scores"].items() if score["mean"] is not None}

    def __getattr__(self, metric: str) -> float:
        if metric.startswith("_") or metric == "record":  # while the object is copied it has no record yet
            raise AttributeError(metric)
        scores = self.scores
        if metric not in scores:
            known = ", ".join(["name", "computed_steps", "seconds", "speedup", *scores])
            raise AttributeError(f"the result of {self.name!r} has no {metric!r}. It has: {known}.")
        return scores[metric]

    def __dir__(self) -> list[str]:
        return [*super(MethodResult, self).__dir__(), *self.scores]

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        return f"<MethodResult {self.name!r}: {self.seconds:.3g} s, {self.speedup:.2f}x, {scores or 'no scores'}>"


def names(record: Record) -> list[str]:
    """Return the names of the methods."""
    return [method["name"] for method in record["methods"]]


def result_of(record: Record, name: str) -> MethodResult:
    """Return the results of the method called ``name``.

    Raises:
        UnknownName: There is no such method.
    """
    for method in record["methods"]:
        if method["name"] == name:
            return MethodResult(method)
    raise UnknownName("method of this evaluation", str(name), names(record))


def best(record: Record, metric: str | None, min_speedup: float | None) -> MethodResult:
    """Return the method with the best mean of a metric. See ``Evaluation.best``.

    Raises:
        UnknownName: No method but the full run has a score by the metric.
        BadOption: No method is as fast as ``min_speedup``.
    """
    results = [MethodResult(method) for method in record["methods"] if method["name"] != FULL]
    scored = list(dict.fromkeys(name for one in results for name in one.scores))
    if metric is None and scored:
        metric = next((name for name in record["metrics"] if name in scored), scored[0])
    able = [one for one in results if metric in one.scores]
    if metric is None or not able:
        raise UnknownName("metric of the methods of this evaluation", str(metric), scored)
    quick = [one for one in able if min_speedup is None or one.speedup >= min_speedup]
    if not quick:
        fastest = max(one.speedup for one in able)
        raise BadOption("min_speedup", min_speedup, f"up to {fastest:.2f}, the speed-up of the fastest method")
    sign = -1 if record["metrics"][metric]["better"] == "lower" else 1
    return max(quick, key=lambda one: (sign * one.scores[metric], one.speedup))


def to_pandas(record: Record) -> Any:
    """Return a ``pandas.DataFrame`` with one row per method.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    pandas = package("pandas", purpose="Evaluation.to_pandas", install="pandas")
    rows = [_row(method) for method in record["methods"]]
    return pandas.DataFrame(rows, index=pandas.Index(names(record), name="method"))


def _row(method: Record) -> dict[str, Any]:
    one = MethodResult(method)
    about = {"kind": method["kind"], "steps": method["steps"], "computed_steps": one.computed_steps}
    return {**about, "seconds": one.seconds, "speedup": one.speedup, "cache_bytes": method["cache_bytes"], **one.scores}


def to_html(record: Record) -> str:
    """Return tables for a notebook: work, time and means, one row per method.

    The first table has at most two metrics. Further ones are in further tables, which also name the methods.
    """
    metrics = {name: about for name, about in record["metrics"].items() if _scored(record, name)}
    methods = [MethodResult(method) for method in record["methods"]]
    numbers = [
        ("computed steps", [f"{one.computed_steps:g} of {one.record['steps']}" for one in methods]),
        ("seconds (loop)", [f"{one.seconds:.3g}" for one in methods]),
        ("speed-up (loop)", [f"{one.speedup:.2f}×" for one in methods]),
    ]
    for name, about in metrics.items():
        exact = about.get("of_pairs")  # the full run against itself
        scores = [None if exact and one.name == FULL else one.scores.get(name) for one in methods]
        numbers.append((str(about.get("title") or name), ["–" if s is None else f"{s:.4g}" for s in scores]))
    tables = []
    cuts = [0, *range(FIRST_COLUMNS, len(numbers), LATER_COLUMNS), len(numbers)]
    for part in (numbers[begin:end] for begin, end in itertools.pairwise(cuts)):
        heads = [title for title, _ in part]
        rows = [[one.name, *(cells[n] for _, cells in part)] for n, one in enumerate(methods)]
        tables.append(html_table(["method", *heads], rows, right=heads))
    return "".join(tables)


def _scored(record: Record, metric: str) -> bool:
    return any(metric in MethodResult(method).scores for method in record["methods"])
