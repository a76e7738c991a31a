"""The demo's job, step by step; what it prints and writes is in ``show``."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from diffcache.api import accelerated
from diffcache.assets import DemoModel, load
from diffcache.demo import show
from diffcache.demo.fidelity import psnr_db, ssim
from diffcache.demo.rows import Row
from diffcache.eval.methods import evenly_reused
from diffcache.eval.solvers import better_solver, solver_of
from diffcache.host import denoisers
from diffcache.profiling import Calibration
from diffcache.profiling.clock import loop_clock
from diffcache.schedule import CacheSchedule

STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much the demo does. ``budgets``: computed steps of 50; ``repeats``: timed runs of each method."""

    budgets: tuple[int, ...] = (17, 12, 8)
    calibration: int = 16
    held_out: int = 16
    search_s: float = 20.0
    repeats: int = 3

    @classmethod
    def quick(cls) -> Size:
        return cls(budgets=(12, 8), calibration=8, held_out=8, search_s=8.0, repeats=1)


@dataclass(frozen=True, slots=True)
class Trial:
    """Pictures [N, H, W, 3] of one method, and the median seconds of its sampling loop."""

    images: np.ndarray
    seconds: float


def run_demo(name: str, out: Path, size: Size) -> list[Row]:
    """Calibrate on some subjects, compare on others, write everything under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model = load(name)
    fitted, shown = split(model, size)
    bar = tqdm(total=len(size.budgets) + 1, desc=f"measure {size.calibration} pictures", unit="part")
    calibration = Calibration.record(model.pipe, [model.call(*part, steps=STEPS) for part in batches(fitted)])
    bar.update()
    schedules = {}
    for budget in size.budgets:
        bar.set_description(f"plan {budget} of {STEPS} steps")
        schedules[budget] = calibration.schedule(budget, time_limit_s=size.search_s)
        schedules[budget].save(out / f"{name}-{STEPS}-{budget}.safetensors")
        bar.update()
    bar.close()

    rows, pictures = compare(model, shown, schedules, size.repeats)
    record = {"model": name, "circumstances": circumstances(size), "rows": [asdict(r) for r in rows]}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "table.md").write_text(show.table(rows) + "\n")
    show.grid(pictures, min(size.budgets), shown[0], out / "pictures.png")
    return rows


def compare(
    model: DemoModel, shown: tuple[Sequence[str], Sequence[int]], schedules: dict[int, CacheSchedule], repeats: int
) -> tuple[list[Row], dict[tuple[str, int], np.ndarray]]:
    """Every method on the same held-out subjects and seeds; (table, pictures by method and computed steps)."""
    pipe = model.pipe
    (denoiser,) = denoisers(pipe)
    better = better_solver(pipe)
    assert better is not None  # neither demo model has it already
    solver_name, solver = better
    plain = f"fewer steps ({solver_of(pipe)})"
    runs: list[tuple[str, int, Any]] = [("full run", STEPS, lambda: trial(model, shown, STEPS, repeats))]
    for n, schedule in schedules.items():
        reuse = evenly_reused([denoiser], STEPS, n)
        runs += [
            (plain, n, lambda n=n: trial(model, shown, n, repeats)),
            (f"fewer steps ({solver_name})", n, lambda n=n: _with_solver(model, solver, shown, n, repeats)),
            ("uniform reuse", n, lambda s=reuse: trial(model, shown, STEPS, repeats, s)),
            ("diffcache", n, lambda s=schedule: trial(model, shown, STEPS, repeats, s)),
        ]
    trial(model, (shown[0][:2], shown[1][:2]), 4, 1)  # warm-up
    bar = tqdm(runs, desc="compare on held-out pictures", unit="method")
    trials = {(method, n): job() for method, n, job in bar}
    full = trials["full run", STEPS]
    rows = [
        Row(
            method,
            n,
            n if method.startswith("fewer") else STEPS,
            round(full.seconds / t.seconds, 3),
            round(float(psnr_db(t.images, full.images).mean()), 3),
            round(float(ssim(t.images, full.images).mean()), 5),
        )
        for (method, n), t in trials.items()
    ]
    return rows, {key: t.images for key, t in trials.items()}


def trial(
    model: DemoModel,
    shown: tuple[Sequence[str], Sequence[int]],
    steps: int,
    repeats: int,
    schedule: CacheSchedule | None = None,
) -> Trial:
    with _maybe_accelerated(model.pipe, schedule), loop_clock(model.pipe) as seconds:
        for _ in range(repeats):
            images = model.pipe(**model.call(*shown, steps=steps)).images
    return Trial(images, statistics.median(seconds))


def _with_solver(
    model: DemoModel, solver: Any, shown: tuple[Sequence[str], Sequence[int]], steps: int, repeats: int
) -> Trial:
    own, model.pipe.scheduler = model.pipe.scheduler, solver
    try:
        return trial(model, shown, steps, repeats)
    finally:
        model.pipe.scheduler = own


@contextmanager
def _maybe_accelerated(pipe: Any, schedule: CacheSchedule | None) -> Iterator[None]:
    if schedule is None:
        yield
    else:
        with accelerated(pipe, schedule):
            yield


def split(model: DemoModel, size: Size) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """(subjects, seeds) for calibration and for comparison: no seed in both, and no subject where there are enough."""
    wanted = size.calibration + size.held_out
    order = np.random.default_rng(7).permutation(len(model.subjects))
    names = [model.subjects[order[i % len(order)]] for i in range(wanted)]
    seeds = list(range(1000, 1000 + wanted))
    cut = size.calibration
    return (names[:cut], seeds[:cut]), (names[cut:], seeds[cut:])


def batches(samples: tuple[list[str], list[int]], size: int = 8) -> Iterator[tuple[list[str], list[int]]]:
    for i in range(0, len(samples[0]), size):
        yield samples[0][i : i + size], samples[1][i : i + size]


def circumstances(size: Size) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    return {"size": asdict(size), **machine()}


def machine() -> dict[str, Any]:
    """What ran, and on what."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
