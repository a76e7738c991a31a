"""Write the record of an evaluation as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffcache import text as texts
from diffcache.documents.schedule import decibels

NOTHING = "–"
LINK = {"better": "than", "worse": "than", "no difference": "from"}


def markdown(record: Mapping[str, Any]) -> str:
    """Return a table with one row per method of a record, followed by the floors and a warning.

    Seconds are those of the sampling loop: the median, and the spread of the runs in brackets. The brackets of a metric
    hold the interval of its mean. Columns without values are left out; an empty cell is a dash.

    Args:
        record: A record of the format "diffcache.evaluation".
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
    """Return the floors of the metrics, the values for two sets that differ by chance alone; "" if there are none."""
    floors = [
        f"{text(about.get('title') or name)} {number(about['floor'])}{unit(about)}"
        for name, about in metrics.items()
        if finite(about.get("floor"))
    ]
    return f"Floors (parts of the reference against each other): {', '.join(floors)}." if floors else ""


def score_of(method: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """Return the score of a method by a metric; None if there is none."""
    found: Mapping[str, Any] | None = (method.get("scores") or {}).get(metric)
    return found


def with_itself(method: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Return whether the score compares the full run with itself, which has no meaning."""
    return method.get("kind") == "full" and bool(about.get("of_pairs"))


def heading(about: Mapping[str, Any], name: str) -> str:
    """Return the title, the unit and the better direction, such as "PSNR (dB) ↑"."""
    inside = f" ({about['unit']})" if about.get("unit") else ""
    return f"{about.get('title') or name}{inside} {'↓' if about.get('better') == 'lower' else '↑'}"


def unit(about: Mapping[str, Any]) -> str:
    """Return the unit of a metric after a space; "" if there is none."""
    return f" {text(about['unit'])}" if about.get("unit") else ""


def number(value: float, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits, without an exponent if its size allows it."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def finite(value: object) -> bool:
    """Return whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def steps(method: Mapping[str, Any]) -> str:
    """Return the computed steps of a method out of all its steps."""
    computed, every = method.get("computed_steps"), method.get("steps")
    return f"{round(float(computed or 0), 1):g} of {every}" if finite(computed) and every else NOTHING


def speedup(method: Mapping[str, Any]) -> str:
    """Return the speed-up of the sampling loop, marked if the method is slower than the full run."""
    value: Any = (method.get("speedup") or {}).get("loop")
    if not finite(value):
        return NOTHING
    return f"{value:.2f}×" + (" (slower)" if value < 0.995 and method.get("kind") != "full" else "")


def seconds(method: Mapping[str, Any]) -> str:
    """Return the seconds of the sampling loop, with their spread."""
    clock = (method.get("seconds") or {}).get("loop") or {}
    return _between(clock.get("median"), clock.get("low"), clock.get("high"), digits=3)


def interval(score: Mapping[str, Any] | None) -> str:
    """Return the mean of a score, with its interval."""
    score = score or {}
    return _between(score.get("mean"), score.get("low"), score.get("high"))


def promise(method: Mapping[str, Any]) -> str:
    """Return the state PSNR that a schedule states, and the measured one."""
    promised, measured = method.get("promised") or {}, (score_of(method, "state") or {}).get("mean")
    if not finite(promised.get("mean_db")):
        return NOTHING
    values: tuple[Any, ...] = promised["mean_db"], measured
    shown = [decibels(db).removesuffix(" dB") if finite(db) else NOTHING for db in values]
    return " / ".join(shown)


def megabytes(size: object) -> str:
    """Return a number of bytes in MB."""
    return f"{size / 1e6:.1f}" if finite(size) else NOTHING  # type: ignore[operator]


def verdicts(method: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the verdicts on a method, with the metrics of each verdict together and "worse" first.

    Example: "worse (than FORA): PSNR, SSIM; no difference (from FORA): CLIP score".
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, about in metrics.items():
        for one in (score_of(method, name) or {}).get("verdicts") or []:
            found.setdefault((str(one["verdict"]), str(one["against"])), []).append(text(about.get("title") or name))
    parts = []
    for (verdict, against), names in sorted(found.items(), key=lambda item: item[0][0] != "worse"):
        parts.append(f"{text(verdict)} ({LINK.get(verdict, 'against')} {text(against)}): {', '.join(names)}")
    return "; ".join(parts) or NOTHING


def text(value: object) -> str:
    """Return text from a record as one cell of a Markdown table."""
    return texts.markdown(value)


def _between(middle: Any, low: Any, high: Any, digits: int = 4) -> str:
    if not finite(middle):
        return NOTHING
    if not finite(low) or not finite(high):
        return number(middle, digits)
    return f"{number(middle, digits)} ({number(low, digits)} to {number(high, digits)})"


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
