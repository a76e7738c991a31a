"""Find the main result: for each budget, our best method and the best other method that takes no more time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffcache.documents.schedule import decibels
from diffcache.eval.statistics import verdict
from diffcache.eval.table import finite, number, score_of

OTHERS = ("fewer steps", "reuse", "peer")
KEPT = 0.5  # dB below a promise that still count as kept


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one budget.

    Attributes:
        ours: The best method of kind "ours" at this budget.
        other: The best other method that takes no more time. None if there is none.
        gain: Difference in the metric's unit, positive if ours is better. None if there is no other method.
        clear: Whether the difference is clear: the interval of the differences over samples excludes 0, or, if there
            are no values of samples, the two intervals do not overlap. False if there are neither.
    """

    ours: Mapping[str, Any]
    other: Mapping[str, Any] | None
    gain: float | None
    clear: bool


def main_metric(record: Mapping[str, Any]) -> str | None:
    """Return the first of the metrics that score most methods, counting those that score both ours and others first.

    Returns:
        The name of the metric; None if no metric scores a method.
    """
    ours, others = _kind(record, ("ours",)), _kind(record, OTHERS)
    counted = {
        name: (min(_scored(ours, name), 1) + min(_scored(others, name), 1), _scored(ours, name) + _scored(others, name))
        for name in record.get("metrics") or {}
    }
    best = max(counted, key=lambda name: counted[name], default=None)
    return best if best is not None and counted[best][0] else None


def findings(record: Mapping[str, Any], metric: str) -> list[Finding]:
    """Return one finding for each whole number of computed steps that methods of kind "ours" take, in falling order.

    The time is that of the sampling loop. Another method counts as no slower if its median is at most the upper end of
    the spread of ours. Methods with indistinguishable times are thus compared in favour of the other method.
    """
    better = record["metrics"][metric].get("better")
    budgets: dict[int, list[Mapping[str, Any]]] = {}
    for method in _kind(record, ("ours",)):
        if _mean(method, metric) is not None and _loop(method) is not None:
            budgets.setdefault(round(method.get("computed_steps") or 0), []).append(method)
    found = []
    for _, members in sorted(budgets.items(), reverse=True):
        ours = _best(members, metric, better)
        clock = ours["seconds"]["loop"]
        limit = clock["high"] if finite(clock.get("high")) else clock["median"]
        rivals = [m for m in _kind(record, OTHERS) if _mean(m, metric) is not None and (_loop(m) or limit + 1) <= limit]
        other = _best(rivals, metric, better) if rivals else None
        found.append(_compared(ours, other, metric, better))
    return found


def sentence(record: Mapping[str, Any], metric: str | None) -> str:
    """Return the findings as one sentence of plain text, including the budgets at which ours is worse."""
    if metric is None:
        return "No method of diffcache was measured here, so there is nothing to compare."
    about = record["metrics"][metric]
    name, unit = about.get("title") or metric, about.get("unit") or ""
    every = findings(record, metric)
    if not every:
        return "No method of diffcache was both timed and scored here, so there is nothing to compare."
    met = [f for f in every if f.gain is not None]
    if not met:
        return "No other method ran in the time of diffcache, so there is nothing to compare at equal time."
    won = [f for f in met if f.clear and (f.gain or 0) > 0]
    lost = [f for f in met if f.clear and (f.gain or 0) < 0]
    even = len(met) - len(won) - len(lost)
    parts = [
        f"{word}{_count(len(some), len(met), first)} ({_by(some, unit)})" if some else ""
        for word, some, first in (("better", won, True), ("worse", lost, not won))
    ]
    if even:
        parts.append(f"not clearly different{_count(even, len(met), not won and not lost)}")
    said = [part for part in parts if part]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"In {name}, against the best other method of the same time, diffcache is {listed}."


def promises(record: Mapping[str, Any]) -> str:
    """Return one sentence that compares the state PSNR that schedules promise with the measured one.

    Returns:
        Plain text; "" if no schedule states its expected fidelity, or none was measured.
    """
    kept = []
    for method in _kind(record, ("ours",)):
        promised, measured = (method.get("promised") or {}).get("mean_db"), _mean(method, "state")
        if promised is not None and finite(promised) and measured is not None:
            shown = [decibels(db).removesuffix(" dB") for db in (promised, measured)]
            kept.append((measured - promised, f"{shown[1]} against {shown[0]} dB ({method['name']})"))
    if not kept:
        return ""
    below = sum(gap < -KEPT for gap, _ in kept)
    if below:
        said = "this promise is" if len(kept) == 1 else f"{below} of {len(kept)} promises are"
        said += f" missed by more than {KEPT:g} dB"
    else:
        said = "the promise is kept" if len(kept) == 1 else f"all {len(kept)} promises are kept"
    return f"Measured against promised state PSNR: {', '.join(text for _, text in kept)}; {said}."


def _count(some: int, every: int, first: bool) -> str:
    """Return " at 2 of 3 budgets", or " at 1" if the number of budgets was stated before."""
    if every == 1:
        return ""
    if not first:
        return f" at {some}"
    if some < every:
        return f" at {some} of {every} budgets"
    return " at both budgets" if every == 2 else f" at all {every} budgets"


def _by(some: Sequence[Finding], unit: str) -> str:
    gains = sorted(abs(f.gain or 0) for f in some)
    low, high = number(gains[0], 3), number(gains[-1], 3)
    return f"by {low if low == high else f'{low} to {high}'} {unit}".rstrip()


def _compared(ours: Mapping[str, Any], other: Mapping[str, Any] | None, metric: str, better: str) -> Finding:
    if other is None:
        return Finding(ours, None, None, False)
    a, b = score_of(ours, metric) or {}, score_of(other, metric) or {}
    gain = (a["mean"] - b["mean"]) * (-1 if better == "lower" else 1)
    return Finding(ours, other, gain, _apart(a, b, better))


def _apart(a: Mapping[str, Any], b: Mapping[str, Any], better: str) -> bool:
    mine, theirs = a.get("values") or [], b.get("values") or []
    if len(mine) == len(theirs) > 1 and all(map(finite, [*mine, *theirs])):
        return verdict(mine, theirs, "lower" if better == "lower" else "higher") != "no difference"
    ends = [s.get(k) for s in (a, b) for k in ("low", "high")]
    return all(map(finite, ends)) and bool(a["low"] > b["high"] or a["high"] < b["low"])


def _best(methods: Sequence[Mapping[str, Any]], metric: str, better: str) -> Mapping[str, Any]:
    sign = -1 if better == "lower" else 1
    return max(methods, key=lambda m: sign * (_mean(m, metric) or 0.0))


def _kind(record: Mapping[str, Any], kinds: Sequence[str]) -> list[Mapping[str, Any]]:
    return [m for m in record.get("methods") or [] if m.get("kind") in kinds]


def _scored(methods: Sequence[Mapping[str, Any]], metric: str) -> int:
    return sum(_mean(m, metric) is not None for m in methods)


def _mean(method: Mapping[str, Any], metric: str) -> float | None:
    value = (score_of(method, metric) or {}).get("mean")
    return float(value) if value is not None and finite(value) else None


def _loop(method: Mapping[str, Any]) -> float | None:
    value = ((method.get("seconds") or {}).get("loop") or {}).get("median")
    return float(value) if value is not None and finite(value) else None
