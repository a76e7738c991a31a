"""This project beside cache-dit and diffusers' own caches, by ``diffcache.evaluate``: the tool that users have.

    python benchmarks/peers/evaluate.py --model flux
    python benchmarks/peers/evaluate.py --model dit

Schedules for 25, 17 and 12 of 50 steps are made on calibration pictures; then the full run, ours, fewer steps with
two noise schedulers, uniform reuse and the peers draw other pictures, call by call one after the other. Prints the
table and writes ``results/evaluation-<model>.md``; record, pictures and report lie under ``--out``. A run that is
stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file

from diffcache import CacheSchedule, evaluate
from diffcache.assets import DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, split
from diffcache.documents import files
from diffcache.eval.methods import Method
from diffcache.profiling import Calibration
from peers.cache_dit_peers import dbcache, masked
from peers.diffusers_peers import mag, sea, taylor
from peers.peer import Peer

RESULTS = Path(__file__).parents[1] / "results"
BUDGETS = (25, 17, 12)
# What each package reached nearest to these budgets in `methods.py`.
PEERS: dict[str, tuple[Peer, ...]] = {
    "flux": (
        dbcache(0.5, taylor=1, in_a_row=2),
        dbcache(0.12, taylor=2),
        dbcache(0.2, taylor=2),
        masked(6, taylor=1),
        sea(0.1, in_a_row=2),
        taylor("lite", 2, 1),
        taylor("lite", 3, 1),
        taylor("lite", 4, 1),
        taylor("lite", 6, 1),
    ),
    "dit": (
        dbcache(0.12, taylor=2),
        dbcache(0.2, taylor=2),
        dbcache(0.5),
        sea(0.1, in_a_row=2),
        mag(0.24, in_a_row=6, retention=0.1),
        mag(0.5, in_a_row=8, retention=0.06),
    ),
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=PEERS, default="flux")
    args.add_argument("--calibration", type=int, default=32, help="pictures to calibrate on")
    args.add_argument("--held-out", type=int, default=64, help="pictures to compare on")
    args.add_argument("--out", type=Path, help="folder of pictures, record and report; by default peers-<model>")
    o = args.parse_args()
    out = o.out or Path(f"peers-{o.model}")
    model = load(o.model)
    fitted, shown = split(model, Size(calibration=o.calibration, held_out=o.held_out))
    plans = schedules(model, fitted, out)
    found = evaluate(
        model.pipe,
        {f"diffcache, {n} computed": plan for n, plan in plans.items()},
        [model.call(*part, steps=STEPS) for part in batches(shown)],
        extra=[of_peer(peer) for peer in PEERS[o.model]],
        out=out,
        title=f"The {o.model} demo model: this project, and the caches of cache-dit and diffusers",
    )
    files.write(RESULTS / f"evaluation-{o.model}.md", f"{found}\n")
    print(f"{found}\n\nreport: {found.report}")


def schedules(model: DemoModel, samples: tuple[list[str], list[int]], folder: Path) -> dict[int, CacheSchedule]:
    """Return a schedule per budget: planned on these samples once, then read from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {n: folder / f"{model.name}-{STEPS}-{digest(samples)}-{n}.safetensors" for n in BUDGETS}
    if not all(path.is_file() for path in paths.values()):
        calibration = Calibration.record(model.pipe, [model.call(*part, steps=STEPS) for part in batches(samples)])
        for n, path in paths.items():
            calibration.schedule(n).save(path)
    return {n: CacheSchedule.load(path) for n, path in paths.items()}


def digest(samples: tuple[list[str], list[int]]) -> str:
    """Return a name for calibration samples, so that schedules of other samples are not taken for theirs."""
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:8]


def of_peer(peer: Peer) -> Method:
    """One setting of a package as a method."""
    name = f"{peer.package} {peer.version}: {peer.name}, {peer.setting}"
    return Method(name=name, kind="peer", on=lambda pipe: peer.on(pipe, STEPS), detail=peer.note)


if __name__ == "__main__":
    main()
