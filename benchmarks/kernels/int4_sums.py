"""Is ``quantize`` right at every row length? Its codes, scales and drift sums against the plain form on the CPU.

    python benchmarks/kernels/int4_sums.py [--quick] [--lengths N …] [--formats NAME …] [--out FILE]

Every row is one length with one choice of previous codes, prescale and ``minus``. Half a group of int4 is one part of a
tile, whose width decides how many masked codes a thread loads at once: rows of 256 values mask none, of 260 and 130 one
by one, of 261 and 131 two, of 1,000 eight. On a GPU the kernel runs there, without one in Triton's interpreter. Writes
a Markdown table and JSON beside it; the exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which chooses then

from measuring import circumstances, in_words, results, this_device, write
from operations import RETURNED, apart

from diffcache.kernels import FORMATS
from diffcache.kernels.quantize import kernel, twin

LENGTHS = (256, 260, 261, 130, 131, 1000)
QUICK = (256, 261)
ROWS, SAMPLES = 4, 2


@dataclass(frozen=True, slots=True)
class Row:
    """``found``: for codes, scales and sums "same", or what differs; "–" for sums that are not asked for."""

    format: str
    length: int
    previous: bool
    prescale: bool
    minus: bool
    found: dict[str, str]

    @property
    def right(self) -> bool:
        return all(said in ("same", "–") for said in self.found.values())

    def cells(self) -> list[str]:
        given = ["yes" if choice else "no" for choice in (self.previous, self.prescale, self.minus)]
        return [self.format, str(self.length), *given, *self.found.values()]


def compared(format: str, length: int, *, previous: bool, prescale: bool, minus: bool, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(length)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, length, generator=generator)

    x, earlier, less, centre, spread = normal(ROWS).bfloat16(), normal(ROWS), normal(ROWS), normal(1), normal(1)
    codes, scales, _ = twin.quantize(earlier, format)
    given = {
        "minus": less if minus else None,
        "prescale": torch.cat([centre, spread.abs() + 0.5]) if prescale else None,
        "previous_codes": codes if previous else None,
        "previous_scales": scales if previous else None,
    }
    expected = twin.quantize(x, format, **given, samples=SAMPLES)
    there = {name: None if value is None else value.to(device) for name, value in given.items()}
    with np.errstate(invalid="ignore"):  # of masked lanes, in the interpreter
        result = kernel.launch(x.to(device), format, **there, samples=SAMPLES)
    found = {
        name: apart(name, format, right, ours.cpu()) or ("same" if right.numel() else "–")
        for name, right, ours in zip(RETURNED["quantize"], expected, result, strict=True)
    }
    return Row(format, length, previous, prescale, minus, found)


def markdown(rows: list[Row], device: torch.device) -> str:
    wrong = sum(not row.right for row in rows)
    where = "on the GPU" if device.type == "cuda" else "in Triton's interpreter; no GPU was there"
    lines = [
        "| format | values in a row | previous codes | prescale | minus | codes | scales | sums |",
        "|---|---:|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n\n".join(
        [
            "# `quantize` against the plain form",
            in_words(circumstances(device)) + ".",
            f"`python benchmarks/kernels/int4_sums.py`, {where}: {ROWS} rows of {SAMPLES} samples. "
            f"{wrong} of {len(rows)} calls differ.",
            "\n".join(lines),
        ]
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    device = this_device()
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help=f"only rows of {' and '.join(map(str, QUICK))} values")
    args.add_argument("--lengths", nargs="+", type=int, help=f"of rows; usually {' '.join(map(str, LENGTHS))}")
    args.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4"])
    args.add_argument("--out", type=Path, default=results("int4-sums", device))
    o = args.parse_args(arguments)
    rows = [
        compared(format, length, previous=previous, prescale=prescale, minus=minus, device=device)
        for format in o.formats
        for length in o.lengths or (QUICK if o.quick else LENGTHS)
        for previous, prescale, minus in itertools.product((False, True), repeat=3)
    ]
    text = markdown(rows, device)
    print(text)
    write(o.out, text, {"circumstances": circumstances(device), "rows": [asdict(row) for row in rows]})
    print(f"\nwritten: {o.out}")
    return rows


if __name__ == "__main__":
    sys.exit(not all(row.right for row in main()))
