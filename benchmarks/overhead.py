"""What does a predicted step cost? Measured speed-up of the sampling loop over what the skipped work alone would give.

    python benchmarks/overhead.py

Full and accelerated runs alternate in one process, so that a machine that slows down slows both. Prints the table and
writes ``results/overhead.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from diffcache.api import accelerated
from diffcache.assets import NAMES, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, circumstances, split
from diffcache.documents import files
from diffcache.profiling import Calibration
from diffcache.profiling.recording import loop_clock

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--budgets", type=int, nargs="+", default=[25, 12, 8])
    args.add_argument("--pictures", type=int, nargs="+", default=[1, 8, 16], help="batch sizes")
    args.add_argument("--repeats", type=int, default=7)
    o = args.parse_args()
    size = Size(calibration=8, held_out=max(o.pictures), fits=0, repeats=o.repeats)
    lines = [
        "| model | pictures | computed steps | steps saved would give | measured | ratio | ratio, quartiles |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    records = []
    for name in NAMES:
        model = load(name)
        fitted, shown = split(model, size)
        calibration = Calibration.record(model.pipe, [model.call(*part, steps=STEPS) for part in batches(fitted)])
        for count in o.pictures:
            part = shown[0][:count], shown[1][:count]
            for budget in o.budgets:
                schedule = calibration.schedule(budget, fits=0)
                ratios = []
                for _ in range(o.repeats):
                    with loop_clock(model.pipe) as seconds:
                        model.pipe(**model.call(*part, steps=STEPS))
                        with accelerated(model.pipe, schedule):
                            model.pipe(**model.call(*part, steps=STEPS))
                    ratios.append(seconds[0] / seconds[1])
                ideal, measured = STEPS / budget, statistics.median(ratios)
                low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (measured,) * 3
                records.append(
                    {"model": name, "pictures": count, "computed_steps": budget, "ideal": ideal, "ratios": ratios}
                )
                lines.append(
                    f"| {name} | {count} | {budget} of {STEPS} | {ideal:.2f}x | {measured:.2f}x | "
                    f"{measured / ideal:.3f} | {low / ideal:.3f} – {high / ideal:.3f} |"
                )
                print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    files.write(RESULTS / "overhead.md", "\n".join(lines) + "\n")
    files.write(
        RESULTS / "overhead.json", json.dumps({"circumstances": circumstances(size), "rows": records}, indent=2) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
