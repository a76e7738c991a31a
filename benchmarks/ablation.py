"""What each part of the method is worth, how much calibration it needs, and where else a schedule serves.

    python benchmarks/ablation.py --model flux
    python benchmarks/ablation.py --model dit
    python benchmarks/ablation.py --model flux-guided

PSNR of the final state against the full run, on held-out subjects and seeds. Prints the tables and writes
``results/ablation-<model>.md`` and ``.json``. Sites inside the denoiser stand beside the whole one at several budgets,
with the speed-up of the sampling loop as measured, so that equal times can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from trials import trial

from diffcache import CacheSchedule, accelerated, estimate, optimize, planning, resampled
from diffcache.assets import NAMES, DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, circumstances, split
from diffcache.documents import files
from diffcache.host.levels import CannotFollow
from diffcache.profiling import Calibration
from diffcache.profiling.calibration.search import Search
from diffcache.profiling.fitting import psnr_db
from diffcache.profiling.fitting.fit import Fit, fit, replayed_psnr_db
from diffcache.profiling.fitting.output_fit import fit_outputs
from diffcache.profiling.recording import final_states
from diffcache.profiling.replay.warp import Movable
from diffcache.schedulers.uniform import evenly, reuse

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "parts": "Parts of the method",
    "samples": "Samples to calibrate on",
    "elsewhere": "A schedule elsewhere",
    "sites": "Sites, by the clock",
}
TIMED = 3  # runs, whose median counts
INSIDE = 17  # computed steps of inner sites: much fewer are not possible, for the rest of a step always runs
SEARCHED_S = 20.0


@dataclass(frozen=True, slots=True)
class Row:
    """PSNR of final states in dB: on the samples it was made of (None where that means nothing), and held out.
    ``speedup`` of the loop, where it was timed."""

    part: str
    what: str
    calibration_db: float | None
    held_out_db: float
    worst_tenth_db: float
    computed: float
    speedup: float | None = None


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--computed", type=int, default=12)
    args.add_argument("--calibration", type=int, default=32)
    args.add_argument("--held-out", type=int, default=32)
    args.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16, 64], help="sizes of calibration to compare")
    args.add_argument("--fits", type=int, default=20, help="of every search")
    args.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="tables to make; others stay as they are")
    args.add_argument("--out", type=Path, default=RESULTS)
    o = args.parse_args()
    model = load(o.model)
    size = Size(budgets=(o.computed,), calibration=max(o.calibration, *o.samples), held_out=o.held_out)
    fitted, shown = split(model, size)
    rows = Rows(o.model, circumstances(size), o.out)
    most = Calibration.record(model.pipe, calls(model, fitted))
    held = Calibration.record(model.pipe, calls(model, shown))
    some = Calibration(model.pipe, most.trajectories[: o.calibration // 8])
    if "parts" in o.only:
        rows.begin(PARTS["parts"])
        parts(rows, most, held, o.calibration, o.computed, o.fits)
    if "samples" in o.only:
        rows.begin(PARTS["samples"])
        amounts(rows, model, fitted, held, o.samples, o.computed, o.fits)
    if "elsewhere" in o.only:
        rows.begin(PARTS["elsewhere"])
        elsewhere(rows, model, some.schedule(o.computed), fitted, shown)
    if "sites" in o.only:
        rows.begin(PARTS["sites"])
        inside(rows, model, some, fitted, shown, o.computed)


class Rows:
    """Written after every row, for the whole takes long; tables that were made before stay."""

    def __init__(self, model: str, about: Mapping[str, Any], folder: Path) -> None:
        self.model, self.about, self.folder = model, about, folder
        record = folder / f"ablation-{model}.json"
        known = json.loads(record.read_text())["rows"] if record.is_file() else []
        self.rows = [Row(**row) for row in known if row["part"] in PARTS.values()]

    def begin(self, part: str) -> None:
        """A table anew."""
        self.rows = [row for row in self.rows if row.part != part]

    def add(
        self,
        part: str,
        what: str,
        held: np.ndarray,
        computed: float,
        calibration: np.ndarray | None = None,
        speedup: float | None = None,
    ) -> None:
        own = None if calibration is None else round(float(calibration.mean()), 2)
        low = round(float(np.quantile(held, 0.1)), 2)
        row = Row(part, what, own, round(float(held.mean()), 2), low, round(float(computed), 2), speedup)
        self.rows.append(row)
        print(row, flush=True)
        self.save()

    def save(self) -> None:
        lines = []
        for part in (part for part in PARTS.values() if any(row.part == part for row in self.rows)):
            lines += [
                f"**{part}**",
                "",
                "| | computed steps | speed-up | calibration (dB) | held out (dB) | worst tenth |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            for row in (r for r in self.rows if r.part == part):
                own = "–" if row.calibration_db is None else f"{row.calibration_db:.1f}"
                timed = "–" if row.speedup is None else f"{row.speedup:.2f}x"
                lines.append(
                    f"| {row.what} | {row.computed:.1f} | {timed} | {own} | {row.held_out_db:.1f} | "
                    f"{row.worst_tenth_db:.1f} |"
                )
            lines.append("")
        self.folder.mkdir(exist_ok=True)
        record = {"model": self.model, "circumstances": self.about, "rows": [asdict(r) for r in self.rows]}
        files.write(self.folder / f"ablation-{self.model}.json", json.dumps(record, indent=2) + "\n")
        files.write(self.folder / f"ablation-{self.model}.md", "\n".join(lines))


def calls(model: DemoModel, samples: tuple[Sequence[str], Sequence[int]], **more: Any) -> list[dict[str, Any]]:
    return [model.call(*part, **({"steps": STEPS} | more)) for part in batches((list(samples[0]), list(samples[1])))]


def parts(rows: Rows, most: Calibration, held: Calibration, samples: int, computed: int, fits: int) -> None:
    """Mask, target of the fit, branches, search, channels: one after another."""
    title = PARTS["parts"]
    train, even = most.replays[: samples // 8], evenly(STEPS, computed)
    apart = most.guidance is not None and most.guidance.branches > 1

    def weighed(what: str, compute: np.ndarray, weights: np.ndarray) -> None:
        own, others = (replayed_psnr_db(replays, compute, weights) for replays in (train, held.replays))
        rows.add(title, what, others, compute.sum(), own)

    def fitted(what: str, compute: np.ndarray, **options: Any) -> Fit:
        found = fit(train, compute, held=held.replays, **options)
        rows.add(title, what, found.held_db, compute.sum(), found.error_db)
        return found

    weighed("even mask, reuse", even, reuse(even).weights)
    weighed("even mask, fit to outputs", even, fit_outputs(most.trajectories[: samples // 8], even))
    fitted("even mask, fit to states", even, per_branch=False)
    if apart:
        fitted("even mask, fit to states, weights per branch", even)
    profile = Calibration(most.pipe, most.trajectories[: samples // 8]).profile()
    simulated = planning.plan(profile, "closed_loop", computed).denoisers["transformer"].sites["model"]
    weighed("simulated mask, reuse", simulated.compute, reuse(simulated.compute).weights)
    weighed("simulated mask, simulated weights", simulated.compute, simulated.weights)
    fitted("simulated mask, fit to states", simulated.compute, per_branch=apart)
    cut = max(1, len(train) - 1)
    seeker = Search(train[:2], train[cut:], per_branch=apart)
    searched = seeker.run(computed, fits=fits)
    fitted("searched mask, fit to states", searched.compute, per_branch=apart)
    with contextlib.suppress(CannotFollow):  # DDIM has no levels to move
        levels = seeker.nudged(most.pipe, searched).levels
        if levels is not None:
            own, others = ([Movable(most.pipe, r).on(levels) for r in part] for part in (train, held.replays))
            moved = fit(own, searched.compute, held=others, levels=levels, per_branch=apart)
            rows.add(title, "searched mask, noise levels moved", moved.held_db, computed, moved.error_db)
    fitted("searched mask, fit to states, scale per channel", searched.compute, per_branch=apart, per_channel=True)
    fitted("searched mask, fit to states, 3 anchors", searched.compute, per_branch=apart, anchors=3)


def amounts(
    rows: Rows,
    model: DemoModel,
    fitted: tuple[Sequence[str], Sequence[int]],
    held: Calibration,
    sizes: Sequence[int],
    computed: int,
    fits: int,
) -> None:
    """The gap between calibration and held-out samples, by the number of the former."""
    for count in sizes:
        own = Calibration.record(model.pipe, calls(model, (fitted[0][:count], fitted[1][:count])))
        apart = own.guidance is not None and own.guidance.branches > 1
        mask = Search(own.replays[:2], per_branch=apart).run(computed, fits=fits).compute
        found = fit(own.replays, mask, held=held.replays, per_branch=apart)
        rows.add(PARTS["samples"], f"{count}", found.held_db, computed, found.error_db)


def elsewhere(
    rows: Rows,
    model: DemoModel,
    schedule: CacheSchedule,
    fitted: tuple[Sequence[str], Sequence[int]],
    shown: tuple[Sequence[str], Sequence[int]],
) -> None:
    """The same schedule on other seeds, at another guidance, on another number of steps."""
    title = PARTS["elsewhere"]
    held_reuse = reuse_of(schedule)

    def both(what: str, made: CacheSchedule, plain: CacheSchedule, some: list[dict[str, Any]]) -> None:
        full = final_states(model.pipe, some)
        for name, one in ((what, made), (f"{what}: reuse on the same mask", plain)):
            rows.add(title, name, compared(model, one, some, full), one.computed_steps)

    both("where it was made for, held out", schedule, held_reuse, calls(model, shown))
    seeds = [seed + 500_000 for seed in fitted[1][: len(shown[1])]]
    both("calibration subjects, other seeds", schedule, held_reuse, calls(model, (fitted[0][: len(seeds)], seeds)))
    for argument, scale in model.about.guidance.items():
        for other in (scale / 2, scale * 1.5):
            both(f"guidance {other:g}", schedule, held_reuse, calls(model, shown, **{argument: other}))
    for steps in (40, 60):
        some = calls(model, shown, steps=steps)
        grid = grid_of(model, some[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both(f"{steps} steps, resampled", resampled(schedule, grid), resampled(held_reuse, grid), some)


def inside(
    rows: Rows,
    model: DemoModel,
    most: Calibration,
    fitted: tuple[Sequence[str], Sequence[int]],
    shown: tuple[Sequence[str], Sequence[int]],
    computed: int,
) -> None:
    """Sites inside the denoiser, and the whole one at more budgets, by the clock."""
    title = PARTS["sites"]
    some, own = calls(model, shown), calls(model, (fitted[0][:16], fitted[1][:16]))
    full = final_states(model.pipe, some)
    few = model.call(shown[0][:2], shown[1][:2], steps=STEPS)
    clock = trial(model, shown, STEPS, TIMED).seconds
    attempts: dict[str, Callable[[], CacheSchedule]] = {
        f"model, {n} steps": lambda n=n: most.schedule(n, time_limit_s=SEARCHED_S) for n in (computed, 17, 25)
    }
    attempts |= {
        f"{sites}, {INSIDE} steps": lambda s=sites, by=scheduler: optimize(
            model.pipe, own, INSIDE, sites=s, scheduler=by, held_out=some[:1]
        )
        for sites, scheduler in (("stack", "cachequant"), ("block", "search"), ("sublayer", "search"))
    }
    for name, make in attempts.items():
        try:
            made = make()
        except ValueError as reason:
            print(f"{name}: {reason}")
            continue
        work = STEPS * estimate(model.pipe, made, **few).compute_fraction
        speedup = round(clock / trial(model, shown, STEPS, TIMED, made).seconds, 2)
        rows.add(title, name, compared(model, made, some, full), work, speedup=speedup)


def compared(model: DemoModel, made: CacheSchedule, some: list[dict[str, Any]], full: Sequence[Any]) -> np.ndarray:
    with accelerated(model.pipe, made, strict=False):
        ends = final_states(model.pipe, some)
    return np.concatenate([psnr_db(a, b).numpy() for a, b in zip(ends, full, strict=True)])


def reuse_of(schedule: CacheSchedule) -> CacheSchedule:
    """The same mask with plain reuse."""
    denoisers = {
        name: dataclasses.replace(d, sites={site: reuse(plan.compute) for site, plan in d.sites.items()})
        for name, d in schedule.denoisers.items()
    }
    return dataclasses.replace(schedule, denoisers=denoisers)


def grid_of(model: DemoModel, call: dict[str, Any]) -> np.ndarray:
    """The timesteps of one call's loop."""
    return Calibration.record(model.pipe, [call]).trajectories[0].timesteps.double().numpy()


if __name__ == "__main__":
    main()
