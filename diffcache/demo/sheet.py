"""Draw the pictures of the demo in one grid."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffcache.documents import files
from diffcache.eval.evaluation import Evaluation

COLUMNS = 8
SCALE = 2
MARGIN, GAP, TITLE = 190, 6, 30
INK, QUIET = (24, 24, 27), (113, 113, 122)


def _read(found: Evaluation, name: str) -> Image.Image:
    return Image.open(io.BytesIO(files.read_bytes(found.folder / name, inside=found.folder)))


def grid(found: Evaluation, budget: int, path: Path) -> None:
    """Write a grid with one row per method and one column per subject and seed.

    Args:
        found: The evaluation.
        budget: Computed steps of the methods that are shown, in addition to the full run.
        path: The file, a PNG.
    """
    chosen = [m for m in found.record["methods"] if m["kind"] == "full" or round(m["computed_steps"]) == budget]
    samples = found.record["samples"][:COLUMNS]
    images = {m["name"]: [_read(found, m["pictures"][s["id"]]) for s in samples] for m in chosen}
    cell = SCALE * next(iter(images.values()))[0].width
    canvas = Image.new("RGB", (MARGIN + len(samples) * (cell + GAP), TITLE + len(chosen) * (cell + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    small, plain = ImageFont.load_default(13), ImageFont.load_default(16)
    for column, sample in enumerate(samples):
        subject = sample["prompt"]
        label = subject if len(subject) <= 20 else subject[:19] + "…"
        draw.text((MARGIN + column * (cell + GAP), 8), label, QUIET, small)
    for row, method in enumerate(chosen):
        top = TITLE + row * (cell + GAP)
        draw.text((8, top + cell // 2 - 22), method["name"].replace(", ", ",\n"), INK, plain)
        draw.text((8, top + cell // 2 + 20), f"{method['computed_steps']:g} computed steps", QUIET, small)
        for column, picture in enumerate(images[method["name"]]):
            large = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(large, (MARGIN + column * (cell + GAP), top))
    files.write(path, lambda file: canvas.save(file, format="PNG"))
