"""Draw docs/hero.png and docs/hero-dark.png, the first picture of README.md, from the folder that the demo wrote.

diffcache demo --model dit --out diffcache-demo
python docs/draw_hero.py --from diffcache-demo
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from diffcache.demo import sheet
from diffcache.documents import files
from diffcache.eval.record import read

COLUMNS = 8
NEAR = 8  # of 255 in every channel
LIGHT = sheet.Style(cell=136, gap=8, text=26, small=20, label=236)
DARK = replace(LIGHT, paper="#0d1117", ink="#f0f6fc", quiet="#9198a1", accent="#4aa8f0")  # GitHub's dark background


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--from", dest="folder", type=Path, default=Path("diffcache-demo"), help="folder of the demo")
    args.add_argument("--computed", type=int, default=8, help="computed steps of the methods that are shown")
    args.add_argument("--rows", type=int, nargs="+", help="indices of the rows to draw; all if not given")
    args.add_argument("--name", default="hero", help="of the pictures: NAME.png and NAME-dark.png")
    args.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    o = args.parse_args()
    record = read(o.folder / "record.json")
    # No speed-ups: those of one run of the demo depend on what else the machine does. benchmarks/ measures them.
    drawn = sheet.content(record, o.folder, o.computed, columns=COLUMNS, differences=False, seconds=False)
    notes = [f"{record['title']}. Same classes, same seeds.", *drawn.notes]
    rows = drawn.rows if o.rows is None else [drawn.rows[i] for i in o.rows]
    drawn = replace(drawn, notes=notes, rows=rows)
    for name, style in ((f"{o.name}.png", LIGHT), (f"{o.name}-dark.png", DARK)):
        canvas = reduced(sheet.drawn(drawn, style), style.paper)
        files.write(o.out / name, lambda file, c=canvas: c.save(file, format="PNG", optimize=True))
        print(f"{o.out / name}: {canvas.width} x {canvas.height}")
    for row in drawn.rows:
        print(", ".join(row.lines))


def reduced(picture: Image.Image, paper: str) -> Image.Image:
    """Return a picture of 256 colours with dithering, whose file is less than half as large.

    White and the paper stay exact: colours next to them are replaced by them.
    """
    colours = np.array(picture.quantize(254).getpalette(), np.int16).reshape(-1, 3)
    exact = np.array([(255, 255, 255), ImageColor.getrgb(paper)], np.int16)
    for colour in exact:
        colours[np.abs(colours - colour).max(axis=1) <= NEAR] = colour
    palette = Image.new("P", (1, 1))
    palette.putpalette([*colours.ravel().tolist(), *exact.ravel().tolist()])
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


if __name__ == "__main__":
    main()
