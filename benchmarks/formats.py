"""What it costs to keep outputs in fewer bytes: every format at every kind of site, on held-out pictures and seeds.

    python benchmarks/formats.py

Prints the table and writes ``results/formats.md`` and ``.json``. Each row is compared with the full run of the same
pictures, and with the same schedule whose outputs are kept in bfloat16. Bytes are what the store held at most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from diffcache import CacheSchedule, accelerated, report
from diffcache.assets import NAMES, DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, machine, split
from diffcache.documents import files
from diffcache.documents.schedule import StoreFormat
from diffcache.eval.metrics.psnr import score as psnr_db
from diffcache.schedulers import Rule, parse_rule

RESULTS = Path(__file__).parent / "results"
FORMATS = ("exact", *get_args(StoreFormat))
# What is predicted from how many anchors decides what an error of storage costs.
METHODS = {
    "reuse (FORA)": "uniform:every={every},sites={sites}",
    "residual reuse (FirstBlockCache)": "firstblockcache:threshold=0.12",
    "extrapolation, order 1 (TaylorSeer)": "taylorseer:every={every},order=1,sites={sites}",
    "extrapolation, order 2 (TaylorSeer)": "taylorseer:every={every},order=2,sites={sites}",
}


@dataclass(frozen=True, slots=True)
class Result:
    """``against_bf16_db``: change of the mean PSNR from the same schedule with outputs kept in bfloat16."""

    model: str
    sites: str
    method: str
    store: str
    psnr_db: float
    against_bf16_db: float
    bytes: int
    of_bf16: float


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    args.add_argument("--sites", nargs="+", default=["stack", "block", "sublayer"])
    args.add_argument("--pictures", type=int, default=32)
    args.add_argument("--every", type=int, default=3, help="every so many steps is computed")
    args.add_argument("--steps", type=int, default=STEPS)
    args.add_argument("--out", type=Path, default=RESULTS)
    o = args.parse_args()
    results = [row for name in o.models for row in of_model(load(name), o)]
    o.out.mkdir(exist_ok=True)
    about = {"pictures": o.pictures, "every": o.every, "steps": o.steps, **machine()}
    record = {"circumstances": about, "rows": [asdict(r) for r in results]}
    files.write(o.out / "formats.json", json.dumps(record, indent=2) + "\n")
    files.write(o.out / "formats.md", markdown(results) + "\n")
    files.write(o.out / "formats-summary.md", summary(results) + "\n")
    print(markdown(results))


def of_model(model: DemoModel, o: argparse.Namespace) -> Iterator[Result]:
    shown = split(model, Size(held_out=o.pictures))[1]
    full = pictures(model, shown, o.steps)[0]
    for sites, method, rule in rules(o):
        found = {}
        for store in FORMATS:
            images, held = pictures(model, shown, o.steps, rule, store)
            found[store] = float(psnr_db(images, full).mean()), held
        for store, (psnr, held) in found.items():
            than, bytes_ = found["bf16"]
            row = Result(model.name, sites, method, store, psnr, psnr - than, held, held / bytes_)
            print(line(row), flush=True)
            yield row


def rules(o: argparse.Namespace) -> Iterator[tuple[str, str, Rule]]:
    for sites in o.sites:
        for method, spec in METHODS.items():
            if "sites" in spec or sites == "stack":  # a rule that decides in a block governs stacks
                yield sites, method, parse_rule(spec.format(every=o.every, sites=sites))


def pictures(
    model: DemoModel,
    shown: tuple[list[str], list[int]],
    steps: int,
    source: CacheSchedule | Rule | str = "full",
    store: str = "exact",
) -> tuple[np.ndarray, int]:
    """[N, H, W, 3], and bytes that the store held at most in a batch."""
    images, held = [], 0
    with accelerated(model.pipe, source, store=store):
        for part in batches(shown):
            images.append(model.pipe(**model.call(*part, steps=steps)).images)
            held = max(held, report(model.pipe).peak_bytes)
    return np.concatenate(images), held


def line(r: Result) -> str:
    return (
        f"| {r.model} | {r.sites} | {r.method} | {r.store} | {r.psnr_db:.2f} | {r.against_bf16_db:+.2f} | "
        f"{r.bytes / 1e6:.2f} | {r.of_bf16:.3f} |"
    )


def markdown(results: Sequence[Result]) -> str:
    head = [
        "| model | sites | method | kept as | PSNR, dB | against bf16, dB | megabytes | of bf16 |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    return "\n".join(head + [line(r) for r in results])


def summary(results: Sequence[Result]) -> str:
    """A line for each method at block sites (first-block caching: at stacks)."""
    lines = [
        "| model | method | kept as bf16: PSNR, dB | int8 | fp8 | int4 | bytes of bf16: int8 | fp8 | int4 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(r.model, r.method, r.store): r for r in results if r.sites == "block" or "First" in r.method}
    for model, method in dict.fromkeys((model, method) for model, method, _ in found):
        few = [found[model, method, store] for store in ("int8", "fp8", "int4")]
        apart = " | ".join(f"{r.against_bf16_db:+.2f}" for r in few)
        bytes_ = " | ".join(f"{r.of_bf16:.3f}" for r in few)
        lines.append(f"| {model} | {method} | {found[model, method, 'bf16'].psnr_db:.2f} | {apart} | {bytes_} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
