"""What does measuring cost? Time of `diffcache.measure` over that of the plain runs it watches.

    python benchmarks/profile_overhead.py

Plain and measured runs of the same calls alternate in one process, so that a machine that slows down slows both. What a
measurement does once, however many calls there are, stands apart, in full runs of one call: the network's answers to
errors (the first calls' loops once more, half of the steps predicted), the noise scheduler's reach, operations and
seconds of the sites, and their influence. Prints the table and writes ``results/profile-overhead.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffcache import measure
from diffcache.assets import NAMES, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, circumstances, split
from diffcache.documents import files
from diffcache.profiling.measuring import call_measurement

RESULTS = Path(__file__).parent / "results"
SITES = ("model", "model,block")
ONCE = {
    "answers": "fit",
    "reach": "measure_reach",
    "operations": "count_flops",
    "seconds": "time_sites",
    "influence": "measure_influence",
}


@contextlib.contextmanager
def stopwatches() -> Iterator[dict[str, float]]:
    """Seconds that went into each of the things done once, while the block lasts."""
    spent = dict.fromkeys(ONCE, 0.0)
    found = {name: getattr(call_measurement, name) for name in ONCE.values()}

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - began

        return run

    for what, name in ONCE.items():
        setattr(call_measurement, name, timed(what, found[name]))
    try:
        yield spent
    finally:
        for name, function in found.items():
            setattr(call_measurement, name, function)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    args.add_argument("--steps", type=int, default=STEPS)
    args.add_argument("--calls", type=int, default=4)
    args.add_argument("--batch", type=int, default=8, help="pictures in a call")
    args.add_argument("--repeats", type=int, default=5)
    args.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    o = args.parse_args()
    lines = [
        f"| model | sites | overhead | quartiles | {' | '.join(f'{what}, runs' for what in ONCE)} |",
        "|---|---|---:|---:|" + "---:|" * len(ONCE),
    ]
    records = []
    for name in o.models:
        model = load(name)
        subjects, seeds = split(model, Size(calibration=o.calls * o.batch, held_out=0))[0]
        parts = [slice(k * o.batch, (k + 1) * o.batch) for k in range(o.calls)]
        calls = [model.call(subjects[p], seeds[p], steps=o.steps, output_type="latent") for p in parts]
        model.pipe(**calls[0])  # warm-up
        for sites in SITES:
            overheads, once = [], []
            for _ in range(o.repeats):
                began = time.perf_counter()
                for call in calls:
                    model.pipe(**call)
                plain = time.perf_counter() - began
                with stopwatches() as spent:
                    began = time.perf_counter()
                    measure(model.pipe, calls, sites=sites)
                    whole = time.perf_counter() - began
                overheads.append((whole - sum(spent.values())) / plain - 1)
                once.append({what: seconds / plain * o.calls for what, seconds in spent.items()})
            middle = statistics.median(overheads)
            low, _, high = statistics.quantiles(overheads, n=4) if len(overheads) > 1 else (middle,) * 3
            runs = {what: statistics.median(one[what] for one in once) for what in ONCE}
            records.append({"model": name, "sites": sites, "overheads": overheads, "once_in_runs_of_a_call": once})
            lines.append(
                f"| {name} | {sites} | {middle:+.1%} | {low:+.1%} – {high:+.1%} | "
                f"{' | '.join(f'{runs[what]:.2f}' for what in ONCE)} |"
            )
            print(lines[-1], flush=True)
    o.results.mkdir(parents=True, exist_ok=True)
    table = "\n".join(lines) + "\n"
    size = {"steps": o.steps, "calls": o.calls, "batch": o.batch, "repeats": o.repeats}
    about = circumstances(Size()) | {"size": size}
    files.write(o.results / "profile-overhead.md", table)
    record = json.dumps({"circumstances": about, "rows": records}, indent=2)
    files.write(o.results / "profile-overhead.json", record + "\n")
    print(table)


if __name__ == "__main__":
    main()
