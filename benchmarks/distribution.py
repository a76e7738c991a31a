"""Does a cache change what a model draws, as a set? Thousands of pictures of the DiT demo model, by every method.

    python benchmarks/distribution.py --real emoji-datasource-google-16.0.0/package/img/google/64

Schedules for 25, 17 and 12 of 50 steps are made on calibration pictures. Full run, ours, fewer steps with the model's
own noise scheduler and a better one, uniform reuse and the peers' packages then draw the same classes from the same
seeds, by ``diffcache.evaluate``. A run that is stopped goes on. Distances of sets are taken from the pictures on disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from peers.evaluate import BUDGETS, PEERS, of_peer, schedules

from diffcache import evaluate
from diffcache.assets import DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, split
from diffcache.eval.methods import fewer_steps, ours, uniform_reuse


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--samples", type=int, default=2000)
    args.add_argument("--batch", type=int, default=50)
    args.add_argument("--out", type=Path, default=Path("distribution-dit"), help="folder of pictures and schedules")
    args.add_argument("--real", type=Path, help="folder of real pictures")
    o = args.parse_args()
    model = load("dit")
    fitted, _ = split(model, Size(calibration=32, held_out=8))
    plans = schedules(model, fitted, o.out)
    methods = [ours(f"diffcache, {n} computed", plan) for n, plan in plans.items()]
    others = [fewer_steps(model.pipe, n, better=better) for n in BUDGETS for better in (False, True)]
    others += [uniform_reuse(model.pipe, STEPS, n) for n in BUDGETS]
    others += [of_peer(peer) for peer in PEERS[model.name]]
    made = evaluate(
        model.pipe, methods, calls(model, o.samples, o.batch, 50_000), compare=others, metrics=("psnr", "latent"),
        out=o.out / "evaluation", extractor="efflite0", real=o.real, title="DiT demo model, guidance 4, 50 steps",
    )  # fmt: skip
    print(made)


def calls(model: DemoModel, samples: int, batch: int, seed: int) -> list[dict[str, object]]:
    """All classes equally often, in an order of their own."""
    names = np.random.default_rng(seed).permutation(np.resize(model.subjects, samples)).tolist()
    seeds = list(range(seed, seed + samples))
    return [model.call(names[i : i + batch], seeds[i : i + batch], steps=STEPS) for i in range(0, samples, batch)]


if __name__ == "__main__":
    main()
