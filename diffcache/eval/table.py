"""The record of an evaluation as a Markdown table, to be pasted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffcache import text as texts
from diffcache.documents.schedule import decibels

NOTHING = "–"
LINK = {"better": "than", "worse": "than", "no difference": "from"}


def markdown(record: Mapping[str, Any]) -> str:
    """One row per method of ``record`` (format "diffcache.evaluation"), in its order; below it, floors and a warning.

    Seconds are of the sampling loop: the median, and the spread of the runs in brackets. A metric's brackets hold the
    interval of its mean. Columns that no method fills are left out; a single empty cell is a dash.
    """
    methods: Sequence[Mapping[str, Any]] = record.get("methods") or []
    metrics = {
        name: about
        for name, about in (record.get("metrics") or {}).items()
        if any((score_of(m, name) or {}).get("mean") is not None for m in methods)
    }
    columns = {
        "method": [text(m["name"]) for m in methods],
        "computed steps": [steps(m) for m in methods],
        "speed-up (loop)": [speedup(m) for m in methods],
        "seconds (loop)": [seconds(m) for m in methods],
        **{
            text(heading(about, name)): [
                NOTHING if with_itself(m, about) else interval(score_of(m, name)) for m in methods
            ]
            for name, about in metrics.items()
        },
        "promised / measured (state, dB)": [promise(m) for m in methods],
        "cache (MB)": [megabytes(m.get("cache_bytes")) for m in methods],
        "verdict": [verdicts(m, metrics) for m in methods],
    }
    kept = {head: cells for head, cells in columns.items() if head == "method" or set(cells) - {NOTHING}}
    lines = [
        _row(kept),
        _row("---" if head in ("method", "verdict") else "---:" for head in kept),
        *(_row(cells) for cells in zip(*kept.values(), strict=True)),
    ]
    below = [line for line in (foot(metrics), text(record.get("warning") or "")) if line]
    return "\n\n".join(["\n".join(lines), *below])


def foot(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """What each metric with a floor gives for two sets that differ by chance alone; "" where none has a floor."""
    floors = [
        f"{text(about.get('title') or name)} {number(about['floor'])}{unit(about)}"
        for name, about in metrics.items()
        if finite(about.get("floor"))
    ]
    return f"Floors (parts of the reference against each other): {', '.join(floors)}." if floors else ""


def score_of(method: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (method.get("scores") or {}).get(metric)
    return found


def with_itself(method: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """The full run's score by a metric of pairs with the full run: the best value there is, and it says nothing."""
    return method.get("kind") == "full" and bool(about.get("of_pairs"))


def heading(about: Mapping[str, Any], name: str) -> str:
    """Title, unit and which way is better: "PSNR (dB) ↑"."""
    inside = f" ({about['unit']})" if about.get("unit") else ""
    return f"{about.get('title') or name}{inside} {'↓' if about.get('better') == 'lower' else '↑'}"


def unit(about: Mapping[str, Any]) -> str:
    return f" {text(about['unit'])}" if about.get("unit") else ""


def number(value: float, digits: int = 4) -> str:
    """Four significant digits, without exponents where the number allows it."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def steps(method: Mapping[str, Any]) -> str:
    computed, every = method.get("computed_steps"), method.get("steps")
    return f"{round(float(computed or 0), 1):g} of {every}" if finite(computed) and every else NOTHING


def speedup(method: Mapping[str, Any]) -> str:
    """A method that is slower than the full run says so."""
    value: Any = (method.get("speedup") or {}).get("loop")
    if not finite(value):
        return NOTHING
    return f"{value:.2f}×" + (" (slower)" if value < 0.995 and method.get("kind") != "full" else "")


def seconds(method: Mapping[str, Any]) -> str:
    clock = (method.get("seconds") or {}).get("loop") or {}
    return _between(clock.get("median"), clock.get("low"), clock.get("high"), digits=3)


def interval(score: Mapping[str, Any] | None) -> str:
    score = score or {}
    return _between(score.get("mean"), score.get("low"), score.get("high"))


def promise(method: Mapping[str, Any]) -> str:
    """Return the state PSNR that a schedule promises, and the one that was measured."""
    promised, measured = method.get("promised") or {}, (score_of(method, "state") or {}).get("mean")
    if not finite(promised.get("mean_db")):
        return NOTHING
    values: tuple[Any, ...] = promised["mean_db"], measured
    shown = [decibels(db).removesuffix(" dB") if finite(db) else NOTHING for db in values]
    return " / ".join(shown)


def megabytes(size: object) -> str:
    return f"{size / 1e6:.1f}" if finite(size) else NOTHING  # type: ignore[operator]


def verdicts(method: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics with one verdict together, losses first: "worse (than FORA): PSNR, SSIM; no difference: CLIP score"."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, about in metrics.items():
        for one in (score_of(method, name) or {}).get("verdicts") or []:
            found.setdefault((str(one["verdict"]), str(one["against"])), []).append(text(about.get("title") or name))
    parts = []
    for (verdict, against), names in sorted(found.items(), key=lambda item: item[0][0] != "worse"):
        parts.append(f"{text(verdict)} ({LINK.get(verdict, 'against')} {text(against)}): {', '.join(names)}")
    return "; ".join(parts) or NOTHING


def text(value: object) -> str:
    """Foreign text as one cell."""
    return texts.markdown(value)


def _between(middle: Any, low: Any, high: Any, digits: int = 4) -> str:
    if not finite(middle):
        return NOTHING
    if not finite(low) or not finite(high):
        return number(middle, digits)
    return f"{number(middle, digits)} ({number(low, digits)} to {number(high, digits)})"


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
