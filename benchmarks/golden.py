"""Write what accelerated runs return, bit for bit, and compare two such files: proof that a change changes no results.

    python benchmarks/golden.py write before.npz          # with the package of one commit on PYTHONPATH
    python benchmarks/golden.py write after.npz           # with the package of another
    python benchmarks/golden.py compare before.npz after.npz

The outputs are those of tiny pipelines of diffusers' own classes under rules, fitted masks and planned schedules. Equal
bits are to be expected on one machine only: processors differ in the order in which they add.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

PIPELINES = (
    *("flux", "sd3", "chroma", "qwen_image", "dit", "pixart_sigma", "wan", "sd15_ddim", "sdxl_img2img", "ddpm"),
    *("cogvideox", "stable_audio"),
)
RULES = (
    "full",
    "uniform:every=2",
    "taylor:every=3,order=1",
    "uniform:every=2,sites=block",
    "first_block:threshold=0.5",
)
FITTED = ("flux", "chroma", "dit", "sd15_ddim")
PLANNED = ("closed_loop", "uniform", "taylor:order=1", "path", "threshold:kind=magcache")


def write(path: Path) -> None:
    from calibrated import calibration, calls
    from pipelines import TINY, fresh

    import diffcache
    from diffcache.documents import files
    from diffcache.eval.timed_run import output_of
    from diffcache.profiling.fitting.fit import fit
    from diffcache.schedulers.uniform import evenly

    found: dict[str, np.ndarray] = {}
    for name in PIPELINES:
        pipe = fresh(name)
        for rule in RULES:
            call = TINY[name].call(pipe) | {"generator": torch.Generator().manual_seed(3)}
            try:
                with diffcache.accelerated(pipe, rule), torch.no_grad():
                    found[f"run/{name}/{rule}"] = output_of(pipe(**call))
            except diffcache.DiffCacheError as error:
                found[f"run/{name}/{rule}"] = np.array(type(error).__name__)
    for name in FITTED:
        known = calibration(name)
        steps = len(known.replays[0].steps)
        for computed in (2, 3, 4):
            made = fit(known.replays, evenly(steps, computed, known.replays[0].first_steps))
            found[f"fit/{name}/{computed}/weights"], found[f"fit/{name}/{computed}/db"] = made.weights, made.error_db
        profile = diffcache.measure(known.pipe, calls(name, known.pipe))
        for scheduler in PLANNED:
            made_by: Any = diffcache.plan(profile, scheduler, 3)
            for denoiser, site, plan in made_by.plans():
                found[f"plan/{name}/{scheduler}/{denoiser}/{site}/compute"] = plan.compute
                found[f"plan/{name}/{scheduler}/{denoiser}/{site}/weights"] = plan.weights
    files.write(path, lambda file: np.savez_compressed(file, **found))
    print(f"{len(found)} arrays written to {path}")


def compare(one: Path, other: Path) -> int:
    """Print what differs, and return how many arrays do."""
    with np.load(one) as before, np.load(other) as after:
        names = sorted(set(before.files) | set(after.files))
        wrong = 0
        for name in names:
            a, b = (file[name] if name in file.files else None for file in (before, after))
            if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                wrong += 1
                numbers = a is not None and b is not None and a.shape == b.shape and a.dtype.kind == "f"
                apart = f"by up to {np.abs(a - b).max():.3g}" if numbers else f"{a!r:.60} and {b!r:.60}"
                print(f"{name}: differs, {apart}")
    print(f"{len(names) - wrong} of {len(names)} arrays are equal, bit for bit")
    return wrong


if __name__ == "__main__":
    command, *paths = sys.argv[1:] or [""]
    if command == "write" and len(paths) == 1:
        write(Path(paths[0]))
    elif command == "compare" and len(paths) == 2:
        sys.exit(bool(compare(*map(Path, paths))))
    else:
        sys.exit(__doc__)
