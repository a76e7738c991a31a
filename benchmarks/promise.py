"""Compare the fidelity that ``optimize`` promises with the fidelity that fresh samples show.

    python benchmarks/promise.py                      # both demo models, 17, 12 and 8 of 50 steps: a table in results/
    python benchmarks/promise.py --model dit --calls 1x16 --time-limit 1

``Expected`` and this script measure the same quantity: PSNR of the final state against the full run's, where the peak
is the range of the full run's final state. The fresh samples are subjects and seeds that ``optimize`` never saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffcache import _files, accelerated, optimize
from diffcache.assets import DemoModel, load
from diffcache.demo.run import STEPS
from diffcache.optimizing import final_states
from diffcache.profiling.fit import psnr_db

RESULTS = Path(__file__).parent / "results"
FIRST_SEED, FRESH_SEED = 1000, 5000
BATCH = 8  # samples that run together when schedules are measured


def samples(model: DemoModel, count: int, first_seed: int, skip: int) -> tuple[list[str], list[int]]:
    """Return ``count`` subjects, in a fixed random order from the one at ``skip`` on, and as many seeds."""
    order = np.random.default_rng(7).permutation(len(model.subjects))
    subjects = [model.subjects[order[(skip + i) % len(order)]] for i in range(count)]
    return subjects, list(range(first_seed, first_seed + count))


def calls(model: DemoModel, drawn: tuple[list[str], list[int]], size: int) -> list[dict[str, Any]]:
    """Return calls of ``size`` samples each."""
    subjects, seeds = drawn
    return [model.call(subjects[i : i + size], seeds[i : i + size], steps=STEPS) for i in range(0, len(subjects), size)]


def state_psnr(pipe: Any, fresh: list[dict[str, Any]], full: list[torch.Tensor], schedule: Any) -> np.ndarray:
    """Return the PSNR in dB of the final state of every fresh sample, float64 [N]."""
    with accelerated(pipe, schedule):
        ends = final_states(pipe, fresh)
    return np.concatenate([_of_samples(a, b, call) for a, b, call in zip(ends, full, fresh, strict=True)])


def _of_samples(end: torch.Tensor, reference: torch.Tensor, call: dict[str, Any]) -> np.ndarray:
    """Return one number per sample: the DiT pipeline's state holds every sample twice, once for each branch."""
    count = len(call["generator"])
    return psnr_db(end[:count], reference[:count]).numpy()


def measured(model: DemoModel, shape: str, budgets: list[int], fresh_samples: int, time_limit_s: float | None,
             folder: Path) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row per budget."""
    number, size = map(int, shape.split("x"))
    fitted = calls(model, samples(model, number * size, FIRST_SEED, 0), size)
    fresh = calls(model, samples(model, fresh_samples, FRESH_SEED, number * size), BATCH)
    full = final_states(model.pipe, fresh)
    rows = []
    for budget in budgets:
        began = time.perf_counter()
        schedule = optimize(model.pipe, fitted, budget, time_limit_s=time_limit_s)
        seconds = time.perf_counter() - began
        limit = "none" if time_limit_s is None else f"{time_limit_s:g}"
        schedule.save(folder / f"promise-{model.name}-{shape}-{budget}-{limit}.safetensors")
        found = state_psnr(model.pipe, fresh, full, schedule)
        assert schedule.expected is not None
        row = {
            "model": model.name,
            "calls": shape,
            "budget": budget,
            "time_limit_s": time_limit_s,
            "promised": dataclasses.asdict(schedule.expected),
            "mean_db": float(found.mean()),
            "worst_tenth_db": float(np.quantile(found, 0.1)),
            "fits": schedule.provenance.get("fits", ""),
            "front": schedule.provenance.get("front", ""),
            "seconds": seconds,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and the mean distance between promise and measurement."""
    names = "model", "calls", "computed", "limit (s)", "promised (worst tenth)", "samples", "measured (worst tenth)"
    head = f"| {' | '.join((*names, 'off by', 'fits'))} |"
    lines = [head, "|---|---|---:|---:|---:|---|---:|---:|---:|"]
    for row in rows:
        told = row["promised"]
        off = told["mean_db"] - row["mean_db"], told["low_db"] - row["worst_tenth_db"]
        limit = "none" if row["time_limit_s"] is None else f"{row['time_limit_s']:g}"
        lines.append(
            f"| {row['model']} | {row['calls']} | {row['budget']} of {STEPS} | {limit} "
            f"| {told['mean_db']:.1f} ({told['low_db']:.1f}) | {told['samples']} {told['origin']} "
            f"| {row['mean_db']:.1f} ({row['worst_tenth_db']:.1f}) | {off[0]:+.1f} ({off[1]:+.1f}) | {row['fits']} |"
        )
    off = np.array(
        [[r["promised"]["mean_db"] - r["mean_db"], r["promised"]["low_db"] - r["worst_tenth_db"]] for r in rows]
    )
    mean, worst = off.mean(0)
    size, worst_size = np.abs(off).mean(0)
    lines += [
        "",
        f"Promised less measured, mean over the rows: {mean:+.2f} dB (worst tenth {worst:+.2f}). Mean size of the "
        f"difference: {size:.2f} dB (worst tenth {worst_size:.2f}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["flux", "dit"])
    parser.add_argument("--calls", nargs="+", default=["4x4", "1x16"], help="calls times samples in each")
    parser.add_argument("--budget", nargs="+", type=int, default=[17, 12, 8])
    parser.add_argument("--fresh", type=int, default=48, help="samples that the schedules are measured on")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds, as optimize takes them")
    parser.add_argument("--folder", type=Path, default=Path("promise"), help="where schedules are written")
    parser.add_argument("--out", type=Path, default=RESULTS / "promise.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.model:
        model = load(name)
        for shape in given.calls:
            rows += measured(model, shape, given.budget, given.fresh, given.time_limit, given.folder)
    _files.write(given.out.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    _files.write(given.out, table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
