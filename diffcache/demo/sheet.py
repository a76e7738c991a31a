"""Draw pictures of an evaluation as a sheet: a row for each method, a column for each sample."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffcache.documents import files
from diffcache.eval.report.pictures import ranked

FACTORS = (16, 8, 4, 2, 1)  # by which differences are multiplied
UNCLIPPED = 0.98  # share of the differences that the factor leaves below white
KINDS = ("full", "fewer steps", "reuse", "peer", "ours")  # from top to bottom


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Sizes in pixels and colours of a sheet."""

    cell: int = 128
    gap: int = 6
    text: int = 17
    small: int = 14
    label: int = 220  # width of the labels of rows
    paper: str = "#ffffff"
    ink: str = "#18181b"
    quiet: str = "#5c606c"
    accent: str = "#0063a6"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a sheet: its pictures, and its label as lines of text."""

    pictures: Sequence[Image.Image]
    lines: Sequence[str] = ()
    ours: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The content of a sheet.

    Attributes:
        headings: For each column the subject, and the place of the sample among all: "best", "median", "worst" or "".
        rows: The rows.
        notes: Lines below the rows.
    """

    headings: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default=())


def draw(
    record: Mapping[str, Any],
    folder: Path,
    computed: int,
    path: Path,
    *,
    columns: int = 8,
    differences: bool = True,
    seconds: bool = True,
    style: Style | None = None,
) -> None:
    """Write a sheet of the full run and of all methods that compute ``computed`` steps.

    The columns are samples at even distances from the best to the worst, in the order of the PSNR of our method. The
    median is among them.

    Args:
        record: The record of an evaluation with PSNR and pictures.
        folder: The folder to which the paths of pictures are relative.
        computed: Computed steps of the methods that are shown.
        path: The file, a PNG.
        columns: The most columns.
        differences: Whether a row of amplified differences from the full run follows each method.
        seconds: Whether labels state the measured speed-up.
        style: Sizes and colours.
    """
    sheet = content(record, folder, computed, columns=columns, differences=differences, seconds=seconds)
    canvas = drawn(sheet, style or Style())
    files.write(path, lambda file: canvas.save(file, format="PNG", optimize=True))


def content(
    record: Mapping[str, Any], folder: Path, computed: int, *, columns: int, differences: bool, seconds: bool
) -> Sheet:
    """Return the content of the sheet; see :func:`draw`."""
    methods = [m for m in record["methods"] if m["kind"] == "full" or round(m["computed_steps"]) == computed]
    methods.sort(key=lambda m: KINDS.index(m["kind"]))  # stable: the own noise scheduler stays before the better one
    judged, worst_first = ranked({**record, "methods": methods})
    best_first = [*worst_first[::-1]] or [s["id"] for s in record["samples"]]
    places = spread(len(best_first), columns)
    chosen = [best_first[place] for place in places]
    words = {0: "best", len(best_first) // 2: "median", len(best_first) - 1: "worst"} if judged else {}
    subjects = {s["id"]: str(s.get("prompt") or f"seed {s.get('seed')}") for s in record["samples"]}
    pictures = {m["name"]: [_read(folder, m["pictures"][s]) for s in chosen] for m in methods}
    full = pictures[methods[0]["name"]]
    apart = {name: [_apart(a, b) for a, b in zip(found, full, strict=True)] for name, found in pictures.items()}
    factor = _factor([a for found in apart.values() for a in found])
    rows = []
    for method in methods:
        name = method["name"]
        rows.append(Row(pictures=pictures[name], lines=_label(method, seconds), ours=method["kind"] == "ours"))
        if differences and method["kind"] != "full":
            amplified = [Image.fromarray(np.clip(a * factor, 0, 255).astype(np.uint8)) for a in apart[name]]
            words_of_row = ["difference", f"from the full run, {factor} x" if factor > 1 else "from the full run"]
            rows.append(Row(pictures=amplified, lines=words_of_row))
    count = len(best_first)
    notes = [
        f"PSNR: mean over {count} held-out samples, against the full run with the same seed.",
        f"Columns: evenly spaced ranks, from the best to the worst of the {count} by the PSNR of diffcache."
        if judged
        else f"Columns: the first {len(chosen)} of {count} held-out samples.",
    ]
    headings = [(subjects[s], words.get(place, "")) for s, place in zip(chosen, places, strict=True)]
    return Sheet(headings=headings, rows=rows, notes=notes)


def spread(count: int, columns: int) -> list[int]:
    """Return at most ``columns`` places out of ``count``, evenly spaced, with the first, the middle and the last."""
    places = [round(p) for p in np.linspace(0, count - 1, min(count, columns))]
    middle = count // 2
    if middle not in places and len(places) > 2:
        places[1 + min(range(len(places) - 2), key=lambda n: abs(places[n + 1] - middle))] = middle
    return places


def drawn(sheet: Sheet, style: Style) -> Image.Image:
    """Return the sheet as a picture."""
    text, small = ImageFont.load_default(style.text), ImageFont.load_default(style.small)
    step, line = style.cell + style.gap, round(1.35 * style.small)
    head = 2 * line + style.gap + 4
    columns = len(sheet.headings)
    width = style.label + columns * step
    notes = [part for note in sheet.notes for part in _wrapped(note, small, width - 2 * style.gap)]
    foot = line * len(notes) + 2 * style.gap if notes else style.gap
    canvas = Image.new("RGB", (width, head + len(sheet.rows) * step + foot), style.paper)
    pen = ImageDraw.Draw(canvas)
    for n, (subject, place) in enumerate(sheet.headings):
        left = style.label + n * step
        pen.text((left, head - style.gap - line), _cut(subject, small, style.cell), style.quiet, small)
        pen.text((left, head - style.gap - 2 * line), place, style.accent, small)
    for n, row in enumerate(sheet.rows):
        top = head + n * step
        first = round(1.3 * style.text)
        y = top + (style.cell - first - line * (len(row.lines) - 1)) // 2
        for k, words in enumerate(row.lines):
            leading = k == 0 and words != "difference"
            ink = style.accent if row.ours else style.ink if leading else style.quiet
            pen.text((2 * style.gap, y), words, ink, text if leading else small)
            y += first if leading else line
        for k, picture in enumerate(row.pictures):
            large = picture.resize((style.cell, style.cell), Image.Resampling.BICUBIC)
            canvas.paste(large, (style.label + k * step, top))
    for k, note in enumerate(notes):
        pen.text((2 * style.gap, canvas.height - foot + style.gap + k * line), note, style.quiet, small)
    return canvas


def _label(method: Mapping[str, Any], seconds: bool) -> list[str]:
    title = method["name"].rpartition(", ")
    if method["kind"] == "full":
        return ["full run", f"{method['steps']} steps"]
    name = title[2] if method["kind"] == "fewer steps" else title[0] or method["name"]
    steps = f"{method['computed_steps']:g} of {method['steps']} steps"
    if method["kind"] == "fewer steps":
        steps = f"{method['steps']} steps"
    speed = (method.get("speedup") or {}).get("loop")
    scores = [f"{method['scores']['psnr']['mean']:.1f} dB"]
    if seconds and speed is not None:
        scores.insert(0, f"{speed:.1f} x as fast")
    return [name, steps, *scores]


def _read(folder: Path, name: str) -> Image.Image:
    return Image.open(io.BytesIO(files.read_bytes(folder / name, inside=folder))).convert("RGB")


def _apart(a: Image.Image, b: Image.Image) -> np.ndarray:
    """Return |a − b|, int16 [h, w, 3]."""
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))


def _factor(apart: Sequence[np.ndarray]) -> int:
    top = float(np.quantile(np.concatenate([a.ravel() for a in apart]), UNCLIPPED))
    return next((factor for factor in FACTORS if factor * top <= 255), 1)


def _cut(words: str, font: Any, width: float) -> str:
    """Return ``words``, shortened until they are at most ``width`` pixels wide."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "…") > width:
        words = words[:-1]
    return words.rstrip() + "…"


def _wrapped(words: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
