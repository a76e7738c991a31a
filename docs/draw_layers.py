"""Draw ``layers.svg``: the packages of diffcache by layer, from the table that ``tests/helpers/layers.py`` holds.

    python docs/draw_layers.py

The words in a box are the first sentence of the package's docstring.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from layers import INNER, LAYERS, LIGHT  # noqa: E402

OUT = ROOT / "docs" / "layers.svg"
WIDTH, MARGIN, GAP, RANK_WIDTH = 1200, 24, 10, 40
LINE, HEAD, PAD = 15, 20, 9
CHARACTER = 6.3  # mean width at 12 px

STYLE = """\
text { font-family: -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; font-size: 12px; fill: #4b5563; }
.name { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; font-weight: 600; fill: #1f2937; }
.rank { font-weight: 700; fill: #6b7280; text-anchor: middle; }
.note { fill: #6b7280; }
.light { fill: #fdf1dc; stroke: #dcab5a; }
.torch { fill: #e4eefb; stroke: #84a9d8; }"""


def about(package: str) -> str:
    """Return the first sentence of the docstring of a package."""
    path = ROOT / "diffcache" / package / "__init__.py"
    path = path if path.is_file() else ROOT / "diffcache" / f"{package}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".").replace("``", "")


def boxes(layer: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Return the packages of a layer, each with its wrapped words."""
    shown = [package for package in layer if not package.startswith("__")] or list(layer[:1])
    width = (WIDTH - 2 * MARGIN - RANK_WIDTH - GAP * (len(shown) - 1)) / len(shown)
    found = []
    for package in shown:
        words = textwrap.wrap(about(package), int((width - 2 * PAD) / CHARACTER))
        if package in INNER:
            words += textwrap.wrap("in order: " + ", ".join(INNER[package]), int((width - 2 * PAD) / CHARACTER))
        found.append(("diffcache" if package == "__init__" else package, words))
    return found


def drawn() -> str:
    """Return the picture."""
    parts, y = [], MARGIN
    for rank in reversed(range(len(LAYERS))):
        row = boxes(LAYERS[rank])
        height = HEAD + PAD + LINE * max(len(words) for _, words in row) + 4
        width = (WIDTH - 2 * MARGIN - RANK_WIDTH - GAP * (len(row) - 1)) / len(row)
        parts.append(f'<text class="rank" x="{MARGIN + 12}" y="{y + height / 2 + 4:.0f}">{rank}</text>')
        for n, (name, words) in enumerate(row):
            x = MARGIN + RANK_WIDTH + n * (width + GAP)
            kind = "light" if name in LIGHT else "torch"
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="6"/>')
            parts.append(f'<text class="name" x="{x + PAD:.1f}" y="{y + HEAD}">{escape(name)}</text>')
            for line, text in enumerate(words):
                parts.append(f'<text x="{x + PAD:.1f}" y="{y + HEAD + LINE * (line + 1) + 2}">{escape(text)}</text>')
        y += height + GAP
    note = "A package imports packages of lower layers only. Orange: numpy, without torch. Blue: torch."
    parts.append(f'<text class="note" x="{MARGIN + RANK_WIDTH}" y="{y + 14}">{note}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 32}" role="img" aria-label="{note}">\n'
        f'<style>\n{STYLE}\n</style>\n<rect width="{WIDTH}" height="{y + 32}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(drawn(), encoding="utf-8")
