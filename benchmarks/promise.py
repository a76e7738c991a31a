"""Compare the fidelity that ``optimize`` promises with the fidelity that fresh samples show.

    python benchmarks/promise.py                      # all demo models, 17, 12 and 8 of 50 steps: a table in results/
    python benchmarks/promise.py --model dit --calls 1x16 --time-limit 1 --out limited.md
    python benchmarks/promise.py --draws 3            # the masks found, fitted to three other sets of samples

``Expected`` and this script measure the same quantity: PSNR of the final state against the full run's, where the peak
is the range of the full run's final state. The fresh samples are subjects and seeds that ``optimize`` never saw. Rows
that the JSON record already holds are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffcache import CacheSchedule, accelerated, optimize
from diffcache.assets import NAMES, DemoModel, load
from diffcache.demo.run import STEPS
from diffcache.documents import files
from diffcache.profiling import Calibration
from diffcache.profiling.fitting import psnr_db
from diffcache.profiling.recording import final_states

RESULTS = Path(__file__).parent / "results"
FIRST_SEED, FRESH_SEED = 1000, 5000
KEY = "model", "calls", "budget", "time_limit_s", "draw"  # of a row
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


class Bench:
    """One model, with calls of one shape, and its fresh samples."""

    def __init__(self, model: DemoModel, shape: str, fresh_samples: int, folder: Path) -> None:
        self.model, self.shape, self.folder = model, shape, folder
        self.number, self.size = map(int, shape.split("x"))
        self.count = self.number * self.size
        self.fresh = calls(model, samples(model, fresh_samples, FRESH_SEED, self.count), BATCH)

    @functools.cached_property
    def full(self) -> list[torch.Tensor]:
        """The final states of the fresh samples in the full run."""
        return final_states(self.model.pipe, self.fresh)

    def fitted(self, draw: int = 0) -> list[dict[str, Any]]:
        """Return the calls of a set of calibration samples; no two sets share one."""
        first = FIRST_SEED + draw * self.count
        skip = draw and self.count * draw + sum(len(call["generator"]) for call in self.fresh)
        return calls(self.model, samples(self.model, self.count, first, skip), self.size)

    def optimized(self, budget: int, time_limit_s: float | None) -> dict[str, Any]:
        """Return the row of a search for one budget, and keep its schedule."""
        began = time.perf_counter()
        schedule = optimize(self.model.pipe, self.fitted(), budget, time_limit_s=time_limit_s)
        seconds = time.perf_counter() - began
        schedule.save(self.path(budget, time_limit_s))
        return self.row(schedule, budget, time_limit_s, seconds=seconds)

    def refitted(self, budget: int, draw: int) -> dict[str, Any]:
        """Return the row of the mask that the unlimited search found, fitted to other calibration samples."""
        ((_, _, plan),) = CacheSchedule.load(self.path(budget, None)).plans()
        schedule = Calibration.record(self.model.pipe, self.fitted(draw)).fitted(plan.compute)
        return self.row(schedule, budget, None, draw=draw)

    def path(self, budget: int, time_limit_s: float | None) -> Path:
        return self.folder / f"promise-{self.model.name}-{self.shape}-{budget}-{limit_text(time_limit_s)}.safetensors"

    def row(self, schedule: CacheSchedule, budget: int, time_limit_s: float | None, **more: Any) -> dict[str, Any]:
        """Measure a schedule on the fresh samples."""
        found = state_psnr(self.model.pipe, self.fresh, self.full, schedule)
        assert schedule.expected is not None
        return {
            "model": self.model.name,
            "calls": self.shape,
            "budget": budget,
            "time_limit_s": time_limit_s,
            "draw": 0,
            "promised": dataclasses.asdict(schedule.expected),
            "mean_db": float(found.mean()),
            "worst_tenth_db": float(np.quantile(found, 0.1)),
            "fits": schedule.provenance.get("fits", ""),
            "front": schedule.provenance.get("front", ""),
            **more,
        }


def limit_text(time_limit_s: float | None) -> str:
    return "none" if time_limit_s is None else f"{time_limit_s:g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and the mean distance between promise and measurement."""
    names = "model", "calls", "computed", "limit (s)", "promised (worst tenth)", "samples", "measured (worst tenth)"
    head = f"| {' | '.join((*names, 'off by', 'fits'))} |"
    lines = [head, "|---|---|---:|---:|---:|---|---:|---:|---:|"]
    for row in rows:
        promised = row["promised"]
        off = promised["mean_db"] - row["mean_db"], promised["low_db"] - row["worst_tenth_db"]
        drawn = f", set {row['draw']}" if row["draw"] else ""
        lines.append(
            f"| {row['model']} | {row['calls']}{drawn} | {row['budget']} of {STEPS} "
            f"| {limit_text(row['time_limit_s'])} "
            f"| {promised['mean_db']:.1f} ({promised['low_db']:.1f}) | {promised['samples']} {promised['origin']} "
            f"| {row['mean_db']:.1f} ({row['worst_tenth_db']:.1f}) | {off[0]:+.1f} ({off[1]:+.1f}) | {row['fits']} |"
        )
    offs = np.array(
        [[r["promised"]["mean_db"] - r["mean_db"], r["promised"]["low_db"] - r["worst_tenth_db"]] for r in rows]
    )
    mean, worst = offs.mean(0)
    size, worst_size = np.abs(offs).mean(0)
    lines += [
        "",
        f"Promised less measured, mean over the rows: {mean:+.2f} dB (worst tenth {worst:+.2f}). Mean size of the "
        f"difference: {size:.2f} dB (worst tenth {worst_size:.2f}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--calls", nargs="+", default=["4x4", "1x16"], help="calls times samples in each")
    parser.add_argument("--budget", nargs="+", type=int, default=[17, 12, 8])
    parser.add_argument("--fresh", type=int, default=48, help="samples that the schedules are measured on")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds, as optimize takes them")
    parser.add_argument("--draws", type=int, default=0, help="fit the masks of --budget to so many other sets instead")
    parser.add_argument("--folder", type=Path, default=Path("promise"), help="where schedules are written")
    parser.add_argument("--out", type=Path, default=RESULTS / "promise.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    record = given.out.with_suffix(".json")
    rows = json.loads(record.read_text()) if record.is_file() else []
    known = {tuple(row[name] for name in KEY) for row in rows}
    for name, shape in itertools.product(given.model, given.calls):
        bench = Bench(load(name), shape, given.fresh, given.folder)
        for budget, draw in itertools.product(given.budget, range(1, given.draws + 1) if given.draws else [0]):
            if (name, shape, budget, given.time_limit, draw) in known:
                continue
            rows.append(bench.refitted(budget, draw) if draw else bench.optimized(budget, given.time_limit))
            print(json.dumps(rows[-1]), flush=True)
            files.write(record, json.dumps(rows, indent=1) + "\n")
    files.write(given.out, table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
