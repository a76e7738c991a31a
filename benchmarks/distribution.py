"""Does a cache change what a model draws, as a set? Thousands of pictures of the DiT demo model, by every method.

    python benchmarks/distribution.py --noto emoji-datasource-google-16.0.0/package

Schedules for 25, 17 and 12 of 50 steps are made on calibration pictures. Full run, ours, fewer steps with the model's
own noise scheduler and a better one, and the peers' packages then draw the same classes from the same seeds, by
``diffcache.evaluate``; the distance of each set is taken from the real pictures of these classes (examples/training
says where they come from), plain and mirrored, as the model was trained. Prints the table and writes
``results/distribution-dit.md``. A run that is stopped goes on; ``torchrun --nproc-per-node 2`` shares the calls, and
the table then holds no seconds.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from peers.evaluate import BUDGETS, PEERS, RESULTS, of_peer, schedules
from PIL import Image, ImageOps

from diffcache import evaluate
from diffcache.assets import DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, split
from diffcache.documents import files
from diffcache.eval.methods import fewer_steps, ours
from diffcache.eval.table import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "training"))
import data


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--samples", type=int, default=2000)
    args.add_argument("--batch", type=int, default=50)
    args.add_argument("--out", type=Path, default=Path("distribution-dit"), help="folder of pictures and schedules")
    args.add_argument("--noto", type=Path, required=True, help="unpacked package of real pictures")
    o = args.parse_args()
    model = load("dit")
    model.pipe.to(torch.bfloat16)  # as such models are run, and twice as fast
    fitted, _ = split(model, Size(calibration=32, held_out=8))
    plans = schedules(model, fitted, o.out)
    methods = [ours(f"diffcache, {n} computed", plan) for n, plan in plans.items()]
    others = [fewer_steps(model.pipe, n, better=better) for n in BUDGETS for better in (False, True)]
    others += [of_peer(peer) for peer in PEERS[model.name]]
    made = evaluate(
        model.pipe, methods, calls(model, o.samples, o.batch, 50_000), compare=others, metrics=("psnr", "latent"),
        out=o.out / "evaluation", extractor="efflite0", real=real(o.noto, o.out / "real"),
        title="DiT demo model, bfloat16",
    )  # fmt: skip
    if made.record["circumstances"]["processes"] > 1:  # they share the machine: their seconds say nothing
        for method in made.record["methods"]:
            method |= {"seconds": {}, "speedup": {}}
    table = markdown(made.record)
    if int(os.environ.get("RANK", 0)) == 0:
        files.write(RESULTS / "distribution-dit.md", f"{table}\n")
        print(f"{table}\n\nreport: {made.report}")


def real(noto: Path, folder: Path) -> Path:
    """The pictures of the model's classes, and their mirror images, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = data.noto(noto)
    drawn = {subcategory for group in data.CLASSES.values() for subcategory in group}
    chosen = [x for x, kind in zip(pictures.pixels, pictures.subcategories, strict=True) if kind in drawn]
    for n, pixels in enumerate(chosen):
        picture = Image.fromarray(pixels)
        for name, one in ((f"{n:04d}", picture), (f"{n:04d}-mirrored", ImageOps.mirror(picture))):
            files.write(folder / f"{name}.png", functools.partial(one.save, format="PNG"))
    return folder


def calls(model: DemoModel, samples: int, batch: int, seed: int) -> list[dict[str, object]]:
    """All classes equally often, in an order of their own."""
    names = np.random.default_rng(seed).permutation(np.resize(model.subjects, samples)).tolist()
    seeds = list(range(seed, seed + samples))
    return [model.call(names[i : i + batch], seeds[i : i + batch], steps=STEPS) for i in range(0, samples, batch)]


if __name__ == "__main__":
    main()
