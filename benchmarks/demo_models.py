"""Every method at every budget on a demo model, held-out subjects and seeds, one process.

    python benchmarks/demo_models.py --model flux
    python benchmarks/demo_models.py --model dit

Prints the table and writes ``results/demo-<model>.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from diffcache.assets import NAMES, load
from diffcache.demo import Size, show
from diffcache.demo.run import STEPS, batches, circumstances, compare, split
from diffcache.profiling import Calibration

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--budgets", type=int, nargs="+", default=[25, 17, 12, 10, 8, 6])
    args.add_argument("--calibration", type=int, default=32, help="pictures to calibrate on")
    args.add_argument("--held-out", type=int, default=32, help="pictures to compare on")
    args.add_argument("--search-seconds", type=float, default=60)
    args.add_argument("--repeats", type=int, default=3)
    o = args.parse_args()
    size = Size(
        budgets=tuple(o.budgets),
        calibration=o.calibration,
        held_out=o.held_out,
        search_s=o.search_seconds,
        repeats=o.repeats,
    )
    model = load(o.model)
    fitted, shown = split(model, size)
    calibration = Calibration.record(model.pipe, [model.call(*part, steps=STEPS) for part in batches(fitted)])
    schedules = {}
    for budget in size.budgets:
        schedules[budget] = calibration.schedule(budget, time_limit_s=size.search_s)
        print(budget, schedules[budget].describe(), flush=True)
    rows, _ = compare(model, shown, schedules, size.repeats)
    RESULTS.mkdir(exist_ok=True)
    record = {"model": o.model, "circumstances": circumstances(size), "rows": [asdict(r) for r in rows]}
    (RESULTS / f"demo-{o.model}.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / f"demo-{o.model}.md").write_text(show.table(rows) + "\n")
    print(show.table(rows))


if __name__ == "__main__":
    main()
