"""Draw the results of ``methods.py``: PSNR over speed-up, with the name of every method at its line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from method_results import AUTO, COSTLY, OURS, PUBLISHED, SEARCHED, Record, Result, records

from diffcache.demo.run import STEPS
from diffcache.documents import files

DPI = 160
INK, MUTED = "#22223b", "#5c606c"
OWN = "#0063a6"
# Name of a method without its variant -> colour and dashes, the same in all panels. Text in each has enough contrast.
STYLES: dict[str, tuple[str, Any]] = {
    "MeanCache": ("#c85200", "-"),
    "LeMiCa": ("#008060", "-"),
    "TaylorSeer": ("#b3202a", "-"),
    "DPCache": ("#5b3fa8", "-"),
    "diffusers": ("#a0568a", "-"),
    "fewer steps": ("#8c6d1f", "-"),
    "MagCache": ("#4d7c0f", (0, (5, 1.5))),
    "ERTACache": ("#0e7490", (0, (3, 1, 1, 1))),
    "CacheQuant": ("#6b6b6b", (0, (5, 1.5))),
    "SmoothCache": ("#be185d", (0, (3, 1, 1, 1))),
    "uniform reuse": ("#22223b", (0, (1, 1))),
    "cache-dit": ("#444444", "-"),
    "diffcache, no fit": ("#2272b4", (0, (3, 1.5))),
    "auto": ("#2272b4", (0, (1, 1))),
    "Spectrum": ("#7a4f01", (0, (5, 1.5))),
    "L2P": ("#9f1239", (0, (1, 1))),
    "ZEUS": ("#166534", (0, (3, 1, 1, 1))),
    "BudCache": ("#4338ca", (0, (5, 1.5))),
    "CEM": ("#9a3412", (0, (3, 1, 1, 1))),
    "OTCache": ("#155e75", (0, (5, 1.5))),
    "DyWeight": ("#86198f", (0, (3, 1, 1, 1))),
    "S4S": ("#365314", (0, (1, 1))),
}
TICKS = (2, 3, 4, 5, 6, 8)
NAMED_AT = (17, 12, 8)  # budgets by which the methods to emphasise are chosen; all budgets where there is none of these
LOW, HIGH = 1.6, 8.8  # speed-ups: what hardly saves anything, and the full run itself, would squeeze the rest
RIGHT = 1.1  # of our largest speed-up: where the lines end, if this is less than HIGH
EARLY = 0.625  # of where the lines end: a line that ends at a lower speed-up has its name at its end, not at the right
NAME_SIZE = 10  # points
COLUMNS = 2  # of panels. With more, the text is too small in a README


def plot(record: Record, path: Path) -> None:
    """Draw fidelity over speed-up of one record."""
    _draw([record], path)


def plot_all(folder: Path) -> None:
    """Draw fidelity over speed-up of all models with a record of 50 steps in ``folder``, next to each other."""
    _draw([record for record in records(folder) if record.steps == STEPS], folder / "fidelity.png")


def _draw(found: Sequence[Record], path: Path) -> None:
    if not found:
        return
    figure = figure_of(found)
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def figure_of(found: Sequence[Record]) -> Any:
    """Return the figure: one panel for each record, in which every line has its name."""
    import matplotlib.figure

    # 1600 px for two panels: at half the size, as in a README, the text is still 11 px high.
    columns, rows = min(COLUMNS, len(found)), -(-len(found) // COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(0.4 + 4.8 * columns, 0.7 + 4.9 * rows), dpi=DPI)
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=1, wspace=0.08, hspace=0.28)
    figure.subplots_adjust(top=1 - 0.39 / figure.get_figheight())
    text = (
        "Band: from the mean down to the worst tenth of held-out pictures. "
        "One line for each paper: its best variant. Packages: their best settings."
    )
    caption = textwrap.fill(text, int(15 * (figure.get_figwidth() - 0.65)))  # 15 characters take an inch
    figure.subplots_adjust(bottom=(0.78 + 0.196 * caption.count("\n")) / figure.get_figheight())
    for axes in panels.flat[len(found) :]:
        axes.remove()
    for n, (axes, record) in enumerate(zip(panels.flat[: len(found)], found, strict=True)):
        _panel(axes, record)
        if n % columns == 0:
            axes.set_ylabel("PSNR against the full run (dB)", fontsize=10.5, color=INK)
    place = 0.6 / figure.get_figwidth(), 0.067 / figure.get_figheight()
    figure.text(*place, caption, fontsize=9.5, color=MUTED, linespacing=1.4)
    return figure


def lines_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each method, and the settings of each package that no other of it beats, by speed-up."""
    groups: dict[str, list[Result]] = {}
    for r in sorted(results, key=lambda r: r.speedup):
        if r.method != "full run":
            groups.setdefault(r.method.partition(": ")[0] if ": " in r.method else r.method, []).append(r)
    for rows in groups.values():
        if ": " in rows[0].method:
            rows[:] = [r for n, r in enumerate(rows) if all(later.psnr_db < r.psnr_db for later in rows[n + 1 :])]
    return groups


def reached(groups: dict[str, list[Result]], method: str) -> float:
    """Return the mean over budgets of the best PSNR in dB that a method has in about the time of ours."""
    own = {r.budget: r for r in groups[OURS]}
    budgets = [budget for budget in NAMED_AT if budget in own] or list(own)
    found = [
        max((r.psnr_db for r in groups[method] if r.speedup >= own[budget].speedup / 1.05), default=0.0)
        for budget in budgets
    ]
    return float(np.mean(found)) if found else 0.0


def best_variants(groups: dict[str, list[Result]]) -> dict[str, str]:
    """Return the name of each method without its variant -> its best variant, a key of ``groups``."""
    return {_family(m): m for m in sorted(groups, key=lambda m: reached(groups, m)) if m != OURS}


def named(results: Sequence[Result]) -> list[str]:
    """Return the lines that a plot emphasises: the best of each kind, and the best rule of a second paper."""
    groups = lines_of(results)
    lines = list(best_variants(groups).values())
    rules = [m for m in lines if m in (*PUBLISHED, SEARCHED) and m != "uniform reuse" and "diffcache" not in m]
    packages = [m for m in lines if ": " in groups[m][0].method]
    fewer = [m for m in lines if m.startswith("fewer")]
    best = [(rules, 2), (packages, 1), (fewer, 1)]
    return [m for some, n in best for m in sorted(some, key=lambda m: reached(groups, m), reverse=True)[:n]]


def _family(method: str) -> str:
    """Return the name of a method or package without its variant, a key of ``STYLES``."""
    if "diffcache" in method and method != AUTO:
        return "diffcache, no fit"
    return next(family for family in STYLES if method.startswith(family))


def _short(method: str) -> str:
    """Return a name that fits next to a line."""
    if method.startswith("fewer"):
        return method.replace(" (", ", ").rstrip(")").replace("DPM-Solver++", "DPM++")
    if "diffcache" in method and method != AUTO:
        return "diffcache" if method == "diffcache" else _family(method)
    if _family(method) in ("diffusers", "cache-dit", "auto") or method in COSTLY:
        return _family(method)  # without the version or the note
    return method.removesuffix(" path").removesuffix(" mask")


def _panel(axes: Any, record: Record) -> None:
    """Draw the lines of one record, each with its name."""
    results, about = record.rows, record.about
    groups = lines_of(results)
    emphasised = named(results)
    speeds = [r.speedup for r in groups[OURS]]
    high = max(min(HIGH, RIGHT * max(speeds)), RIGHT * min(speeds))  # with one of our results at least
    own = [r for r in groups[OURS] if r.speedup < high]
    lines = {m: [r for r in groups[m] if LOW < r.speedup < high] for m in best_variants(groups).values()}
    lines = {m: rows for m, rows in lines.items() if rows}
    shown = [r for rows in (*lines.values(), own) for r in rows]
    bottom, top = min(r.psnr_db for r in shown) - 1.5, max(r.psnr_db for r in own) + 2
    bottom -= (top - bottom) / 25  # a name below the lowest end
    axes.set(xscale="log", xlim=(LOW, 3.3 * high), ylim=(bottom, top))
    ends = [("diffcache", OWN, own[-1])]
    for method, rows in lines.items():
        strong = method in emphasised
        colour, dashes = STYLES[_family(method)]
        axes.plot(
            [r.speedup for r in rows], [r.psnr_db for r in rows], color=colour, linestyle="-" if strong else dashes,
            marker="o", linewidth=1.9 if strong else 1, markersize=4.5 if strong else 2, zorder=3 if strong else 1,
            label=_short(method),
        )  # fmt: skip
        if rows[-1].speedup < EARLY * high:
            axes.annotate(
                _short(method), (rows[-1].speedup, rows[-1].psnr_db), (0, -4), textcoords="offset points",
                color=colour, fontsize=NAME_SIZE, va="top", ha="left" if rows[-1].speedup < TICKS[0] else "center",
            )  # fmt: skip
        else:
            ends.append((method, colour, rows[-1]))
    speeds = [r.speedup for r in own]
    axes.fill_between(
        speeds, [r.psnr_low_db for r in own], [r.psnr_db for r in own], color=OWN, alpha=0.13, lw=0, zorder=0
    )
    axes.plot(
        speeds, [r.psnr_db for r in own], "o-", color=OWN, linewidth=2.8, markersize=6, zorder=4, label="diffcache"
    )
    ticks = [t for t in TICKS if t < high]
    axes.set_xticks(ticks, [f"{t}x" for t in ticks], minor=False)
    axes.minorticks_off()
    axes.tick_params(labelsize=10.5, color=MUTED, labelcolor=INK, length=3)
    axes.set_xlabel("speed-up of the sampling loop", fontsize=10.5, color=INK, loc="left")
    sampler = about.sampler if record.steps == STEPS else f"{about.sampler}, {record.steps} steps"
    axes.set_title(f"{about.title}, {about.guidance_words} ({sampler})", loc="left", fontsize=12, color=INK)
    axes.grid(axis="y", color="#ecedf1", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    _names(axes, ends, (top - bottom) / 26, high)


def _names(axes: Any, ends: list[tuple[str, str, Result]], apart: float, high: float) -> None:
    """Write the names of lines right of ``high``, ``apart`` dB or more from each other, each with a line to its end."""
    ends.sort(key=lambda end: end[2].psnr_db)
    lowest, highest = axes.get_ylim()
    heights = spread([end[2].psnr_db for end in ends], apart, lowest + apart / 2, highest - apart / 2)
    for (method, colour, last), height in zip(ends, heights, strict=True):
        weight = "bold" if method == "diffcache" else "normal"
        at = [last.speedup, high * 0.99, high * 1.22, high * 1.25]
        axes.plot(at, [last.psnr_db, last.psnr_db, height, height], color=colour, lw=0.8, ls=":", label="_leader")
        axes.text(high * 1.27, height, _short(method), color=colour, fontsize=NAME_SIZE, va="center", weight=weight)


def spread(wanted: Sequence[float], apart: float, lowest: float, highest: float) -> list[float]:
    """Return the heights nearest to ``wanted``, in ascending order, that differ by at least ``apart``.

    Args:
        wanted: Heights in ascending order.
        apart: Least distance.
        lowest: Least height.
        highest: Largest height. It yields to ``lowest`` and ``apart``.
    """
    # Without the distances, neighbours in the wrong order share their mean: an isotonic regression.
    groups: list[tuple[float, int]] = []
    for n, height in enumerate(wanted):
        groups.append((height - n * apart, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (second, count), (first, before) = groups.pop(), groups.pop()
            groups.append(((first * before + second * count) / (before + count), before + count))
    flat = [height for height, count in groups for _ in range(count)]
    most = highest - (len(wanted) - 1) * apart
    return [max(min(height, most), lowest) + n * apart for n, height in enumerate(flat)]
