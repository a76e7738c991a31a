"""Every peer's settings on held-out pictures of a demo model; prints a Markdown table.

    python benchmarks/peers/run.py --model flux --held-out 8

From another script in ``benchmarks``: ``from peers.measure import measure_peers``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package ``peers`` lies

from diffcache.assets import NAMES, load
from diffcache.demo import Size
from diffcache.demo.run import split
from peers.adapters import PEERS
from peers.measure import PeerRow, frontier, measure_peers, table


def main() -> list[PeerRow]:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--calibration", type=int, default=32, help="pictures left out, as methods.py leaves them out")
    args.add_argument("--held-out", type=int, default=8, help="pictures to compare on")
    args.add_argument("--batch", type=int, help="pictures per call; all at once if not given")
    args.add_argument("--repeats", type=int, default=3, help="timed runs of each; 0 times nothing")
    args.add_argument("--only", default="", help="peers with this in their package, name or setting")
    args.add_argument("--best", action="store_true", help="only what its own package does not beat at less work")
    o = args.parse_args()
    model = load(o.model)
    _, (subjects, seeds) = split(model, Size(calibration=o.calibration, held_out=o.held_out))
    peers = [p for p in PEERS if o.only.lower() in f"{p.package} {p.name} {p.setting}".lower()]
    rows = measure_peers(model, subjects, seeds, o.repeats, peers=peers, batch=o.batch)
    print(table(frontier(rows) if o.best else rows))
    return rows


if __name__ == "__main__":
    main()
