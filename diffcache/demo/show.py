"""The demo's table and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffcache.demo.rows import Row

COLUMNS = 8
SCALE = 2
MARGIN, GAP, TITLE = 190, 6, 30
INK, QUIET = (24, 24, 27), (113, 113, 122)


def table(rows: Sequence[Row]) -> str:
    """Markdown: fidelity to the full run on held-out subjects and seeds."""
    lines = [
        "| method | computed steps | sampling speed-up | PSNR (dB) | SSIM |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        name = f"**{r.method}**" if r.method == "diffcache" else r.method
        exact = r.method == "full run"
        psnr, similar = ("–", "–") if exact else (f"{r.psnr_db:.1f}", f"{r.ssim:.4f}")
        lines.append(f"| {name} | {r.computed_steps} of {r.total_steps} | {r.speedup:.2f}x | {psnr} | {similar} |")
    return "\n".join(lines)


def grid(pictures: Mapping[tuple[str, int], np.ndarray], budget: int, subjects: Sequence[str], path: Path) -> None:
    """One row per method (the full run and those of ``budget``), one column per subject and seed."""
    chosen = {k: v for k, v in pictures.items() if k[0] == "full run" or k[1] == budget}
    count = min(COLUMNS, len(subjects))
    cell = SCALE * next(iter(chosen.values())).shape[1]
    canvas = Image.new("RGB", (MARGIN + count * (cell + GAP), TITLE + len(chosen) * (cell + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    small, plain = ImageFont.load_default(13), ImageFont.load_default(16)
    for column, subject in enumerate(subjects[:count]):
        label = subject if len(subject) <= 20 else subject[:19] + "…"
        draw.text((MARGIN + column * (cell + GAP), 8), label, QUIET, small)
    for row, ((method, steps), images) in enumerate(chosen.items()):
        top = TITLE + row * (cell + GAP)
        draw.text((8, top + cell // 2 - 22), method.replace(" (", "\n("), INK, plain)
        draw.text((8, top + cell // 2 + 20), f"{steps} computed steps", QUIET, small)
        for column in range(count):
            picture = Image.fromarray((np.clip(images[column], 0, 1) * 255).round().astype(np.uint8))
            large = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(large, (MARGIN + column * (cell + GAP), top))
    canvas.save(path)
