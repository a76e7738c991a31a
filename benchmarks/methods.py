"""Published rules, peers' packages and this project at equal computed steps: held-out pictures and seeds, one process.

    python benchmarks/methods.py --model flux
    python benchmarks/methods.py --model dit
    python benchmarks/methods.py --model flux-guided
    python benchmarks/methods.py --model flux --steps 28 --budgets 14 10 7
    python benchmarks/methods.py --model dit --only ZEUS "DyWeight, trained as long as optimize"

Prints the table and writes ``results/methods-<model>.md``, ``.json`` and ``.png``, and ``results/fidelity.png`` of all
models. Results of another number of steps than 50 lie in ``results/methods-<model>-<steps>.*``. Every row is
compared with the full run of the same pictures; speed-ups are of the sampling loop. Peers decide how much they compute
by thresholds: settings that no other of the same package beats are chosen on other pictures than the table is made of.

The rows of trained solvers and of the search with real runs cost the most. ``--without-costly`` leaves them out, and
``--only`` makes the rows of the named methods and puts them into the record of the model and the number of steps. The
full run is then made anew, as the reference of the new rows. A row names its machine if that is not the machine of the
record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from method_results import (
    AUTO,
    COSTLY,
    FEWER,
    OURS,
    PUBLISHED,
    RESULTS,
    SEARCHED,
    TRAINED,
    Record,
    Result,
    named,
    selectable,
)
from methods_pages import again, markdown, write, write_pages
from peers.adapters import PEERS
from peers.measure import behind, frontier, measure_peers
from peers.peer import Peer
from real_search import search
from trained_solvers import SOLVERS, Trained, TrainedSolver, trained
from trials import Trial, trial

from diffcache import CacheSchedule, estimate, planning
from diffcache.assets import NAMES, DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, circumstances, machine, split
from diffcache.documents import Profile, files
from diffcache.eval.metrics.psnr import score as psnr_db
from diffcache.eval.metrics.ssim import score as ssim
from diffcache.eval.noise_schedulers import better_noise_scheduler, noise_scheduler_name
from diffcache.profiling import Calibration, measure
from diffcache.profiling.calibration.correction import correct
from diffcache.schedulers import Rule

CORRECTED_ON = 2  # calls of eight pictures: a scale and a bias need fewer samples than a mask


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--steps", type=int, default=STEPS, help=f"steps of the full run; default: {STEPS}")
    args.add_argument(
        "--budgets", type=int, nargs="+", help="computed steps; default: 25 17 12 10 8 6, or those of the record"
    )
    args.add_argument("--calibration", type=int, help="pictures to calibrate on; default: 32, or as in the record")
    args.add_argument("--held-out", type=int, help="pictures to compare on; default: 32, or as in the record")
    args.add_argument(
        "--repeats", type=int, help="timed runs, of which the median counts; default: 1, or as in the record"
    )
    args.add_argument("--choose", type=int, default=8, help="pictures that peers' settings are chosen on; 0: no peers")
    args.add_argument("--out", type=Path, default=RESULTS)
    args.add_argument("--keep", type=Path, help="folder for schedules and choices: what lies there is not made again")
    args.add_argument("--again", action="store_true", help="write tables and plots of the records under --out anew")
    args.add_argument("--plan-only", action="store_true", help="make what --keep is for, compare nothing")
    args.add_argument("--without-costly", action="store_true", help="no trained solvers, no search with real runs")
    args.add_argument(
        "--only", nargs="+", choices=selectable(), metavar="NAME", help=f"some of: {'; '.join(selectable())}"
    )
    o = args.parse_args()
    if o.again:
        again(o.out)
        return
    record: Record | None = None
    if o.only:
        path = o.out / f"methods-{named(o.model, o.steps)}.json"
        if not path.is_file():
            args.error(
                f"--only adds rows to a record, and {path} does not exist; run without --only first. "
                "--without-costly leaves out the rows that cost the most"
            )
        record = Record.load(path)
    size = size_of(o, record.circumstances["size"] if record else {}, args.error)
    wanted = o.only or [name for name in selectable() if name not in COSTLY or not o.without_costly]
    model = load(o.model)
    fitted, shown = split(model, size)
    calls = [model.call(*part, steps=o.steps) for part in batches(fitted)]
    # Under a name of their own: schedules of other samples are not taken for theirs.
    keep = o.keep and o.keep / hashlib.sha256(json.dumps(fitted).encode()).hexdigest()[:8]
    optimized = Optimized(model, calls, o.steps, keep)
    plans = schedules(optimized, size.budgets, wanted)
    solvers = solvers_of(optimized, size.budgets, wanted)
    last = fitted[0][-o.choose :], fitted[1][-o.choose :]
    chosen = choice(model, last, keep, o.steps) if o.choose and not o.only else []
    if o.plan_only:
        return
    trial(model, (shown[0][:2], shown[1][:2]), 4, 1)  # warm-up
    full = trial(model, shown, o.steps, max(3, size.repeats))
    table = Table(model, shown, size.repeats, full, o.steps)
    if not o.only:
        table.add("full run", o.steps, lambda: full, o.steps)
    if FEWER in wanted:
        few_steps(table, size.budgets)
    for (method, budget), made in plans.items():
        table.plan(method, budget, made.schedule, made.note)
    for (method, budget), solver in solvers.items():
        table.solver(method, budget, solver)
    if chosen:
        peers(table, model, chosen, shown, size.repeats)
    table.save(o.out, record or Record(model.name, o.steps, circumstances(size), []))


def size_of(o: argparse.Namespace, recorded: Mapping[str, Any], error: Callable[[str], Any]) -> Size:
    """Return the size of a run from its options.

    Args:
        o: The options.
        recorded: The size of the record that rows are added to. Its pictures must be the same. Empty: there is none.
        error: Called with a message if they are not, or if a budget is not less than the number of steps.
    """
    own = {"budgets": [25, 17, 12, 10, 8, 6], "calibration": 32, "held_out": 32, "repeats": 1}
    found = {name: recorded.get(name, value) for name, value in own.items()}
    for name in own:
        asked = getattr(o, name)
        if recorded and name in ("calibration", "held_out") and asked not in (None, found[name]):
            option = "--" + name.replace("_", "-")
            error(f"{option} is {asked}, and the record has {found[name]}; leave the option out with --only")
        found[name] = found[name] if asked is None else asked
    if not 0 < min(found["budgets"]) <= max(found["budgets"]) < o.steps:
        words = " ".join(str(budget) for budget in found["budgets"])
        error(f"--budgets is {words}; allowed: 1 to {o.steps - 1}, fewer than --steps")
    return Size(**found | {"budgets": tuple(found["budgets"])})


def merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """Return the rows of a record with new rows: each takes the place of its older one, or comes last."""
    return list({(r.method, r.budget, r.setting): r for r in (*old, *new)}.values())


class Table:
    """Results as they come, printed at once."""

    def __init__(
        self, model: DemoModel, shown: tuple[Sequence[str], Sequence[int]], repeats: int, full: Trial, steps: int
    ) -> None:
        self.model, self.shown, self.repeats, self.full, self.steps = model, shown, repeats, full, steps
        self.results: list[Result] = []

    def add(self, method: str, budget: float, run: Callable[[], Trial], computed: float, note: str = "") -> None:
        got = run()
        psnr = psnr_db(got.images, self.full.images)
        self.put(
            Result(
                method,
                budget,
                round(computed, 2),
                round(self.full.seconds / got.seconds, 3),
                round(float(psnr.mean()), 3),
                round(float(np.quantile(psnr, 0.1)), 3),
                round(float(ssim(got.images, self.full.images).mean()), 5),
                note,
            )
        )

    def plan(self, method: str, budget: float, schedule: CacheSchedule | Rule | str, note: str = "") -> None:
        """A schedule, a rule, or the reason why there is none."""
        if isinstance(schedule, str):
            print(f"{method}, {budget}: {schedule}", flush=True)
            return
        few = self.model.call(self.shown[0][:2], self.shown[1][:2], steps=self.steps)
        computed = self.steps * estimate(self.model.pipe, schedule, **few).compute_fraction
        self.add(
            method, budget, lambda: trial(self.model, self.shown, self.steps, self.repeats, schedule), computed, note
        )

    def solver(self, method: str, budget: int, made: Trained) -> None:
        """A solver with trained coefficients, in place of the pipeline's noise scheduler."""
        pipe, note = self.model.pipe, f"{made.seconds:.0f} s, {made.updates} updates"
        own, pipe.scheduler = pipe.scheduler, made.solver
        try:
            self.add(method, budget, lambda: trial(self.model, self.shown, budget, self.repeats), budget, note)
        finally:
            pipe.scheduler = own

    def put(self, result: Result) -> None:
        self.results.append(result)
        print(
            f"{result.method:38} {result.computed:5.1f} steps  {result.speedup:5.2f}x  {result.psnr_db:6.2f} dB  "
            f"{result.psnr_low_db:6.2f}  {result.ssim:.4f}  {result.note}",
            flush=True,
        )

    def save(self, folder: Path, record: Record) -> None:
        """Write a record with the new rows, and what is made of all records in its folder.

        Args:
            folder: The folder of the records.
            record: The circumstances, and the rows that stay unless a new one replaces them.
        """
        folder.mkdir(exist_ok=True)
        here = machine()
        elsewhere = here if any(record.circumstances.get(key) != value for key, value in here.items()) else None
        rows = merged(record.rows, [replace(r, ran_on=elsewhere) for r in self.results])
        found = replace(record, rows=rows)
        found.save(folder)
        write(found, folder)
        write_pages(folder)
        print(markdown(found))


def few_steps(table: Table, budgets: Sequence[int]) -> None:
    """The same work without a cache: the model's own noise scheduler, and a better one."""
    pipe = table.model.pipe
    own, better = pipe.scheduler, better_noise_scheduler(pipe.scheduler)
    assert better is not None
    name, solver = better
    for budget in budgets:
        run = lambda n=budget: trial(table.model, table.shown, n, table.repeats)  # noqa: E731
        table.add(f"fewer steps ({noise_scheduler_name(own)})", budget, run, budget)
        pipe.scheduler = solver
        try:
            table.add(f"fewer steps ({name})", budget, run, budget)
        finally:
            pipe.scheduler = own


@dataclass(frozen=True, slots=True)
class Made:
    """The schedule of a method, or the reason why there is none, and a note about its cost."""

    schedule: CacheSchedule | Rule | str
    note: str = ""


class Optimized:
    """Schedules of ``optimize``, and the seconds that each takes with the recording of the calls.

    Args:
        model: The demo model.
        calls: The calls to calibrate on.
        steps: Steps of the full run.
        keep: The folder for the schedules of all methods. None: they are not kept.
    """

    def __init__(self, model: DemoModel, calls: Sequence[dict[str, Any]], steps: int, keep: Path | None) -> None:
        self.model, self.calls, self.steps, self.keep = model, calls, steps, keep
        self._calibration: Calibration | None = None
        self._recording_s = 0.0
        self._seconds: dict[int, float] = {}

    def kept(self, budget: int, method: str, suffix: str = ".safetensors") -> Path | None:
        """Return the file of a method at a budget in the folder ``keep``; None without a folder."""
        name = f"{named(self.model.name, self.steps)}-{budget}-{method.replace(' ', '-')}{suffix}"
        return self.keep / name if self.keep else None

    def schedule(self, budget: int) -> CacheSchedule:
        """Return the schedule of a budget from the folder ``keep``, or make it."""
        path = self.kept(budget, OURS)
        return CacheSchedule.load(path) if path is not None and path.is_file() else self._made(budget)

    def seconds(self, budget: int) -> float:
        """Return the seconds that the schedule of a budget took. If they are unknown, it is made again."""
        path = self.kept(budget, OURS, ".json")
        if path is not None and path.is_file():
            return float(json.loads(path.read_text())["seconds"])
        if budget not in self._seconds:
            self._made(budget)
        return self._seconds[budget]

    def _made(self, budget: int) -> CacheSchedule:
        began = time.perf_counter()
        if self._calibration is None:
            self._calibration = Calibration.record(self.model.pipe, self.calls)
            self._recording_s, began = time.perf_counter() - began, time.perf_counter()
        made = self._calibration.schedule(budget)
        self._seconds[budget] = seconds = self._recording_s + time.perf_counter() - began
        print(f"planned {OURS}, {budget}, in {seconds:.0f} s with the recording", flush=True)
        path = self.kept(budget, OURS)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
            files.write(path.with_suffix(".json"), json.dumps({"seconds": round(seconds, 1)}) + "\n")
        return made


def schedules(optimized: Optimized, budgets: Sequence[int], wanted: Sequence[str]) -> dict[tuple[str, int], Made]:
    """Return the schedule of each wanted method at each budget, or the reason why there is none."""
    model, calls = optimized.model, optimized.calls
    found: dict[tuple[str, int], Made] = {}
    profile: Profile | None = None
    for budget in budgets:
        for method in [name for name in (AUTO, *PUBLISHED, SEARCHED, OURS) if name in wanted]:
            if method == AUTO:
                found[method, budget] = Made(auto(budget, optimized.steps))
                continue
            if method == OURS:
                found[method, budget] = Made(optimized.schedule(budget))
                continue
            path = optimized.kept(budget, method)
            if path is not None and path.is_file():
                schedule = CacheSchedule.load(path)
                found[method, budget] = Made(schedule, schedule.provenance.get("cost", ""))
                continue
            began = time.perf_counter()
            if method == SEARCHED:
                made = searched(model, calls[0], budget)
            else:
                profile = profile or measured(model, calls)
                made = Made(published(model, profile, *PUBLISHED[method], budget, calls))
            found[method, budget] = made
            print(f"planned {method}, {budget}, in {time.perf_counter() - began:.0f} s", flush=True)
            if path is not None and isinstance(made.schedule, CacheSchedule):
                path.parent.mkdir(parents=True, exist_ok=True)
                made.schedule.save(path)
    return found


def searched(model: DemoModel, call: Mapping[str, Any], budget: int, **options: Any) -> Made:
    """Return the schedule of BudCache's search with real runs of one calibration call, and its cost as a note."""
    found = search(model.pipe, call, budget, **options)
    note = f"{found.masks} masks, as much work as {found.full_runs:.0f} full runs"
    return Made(found.schedule.with_provenance(cost=note), note)


def solvers_of(optimized: Optimized, budgets: Sequence[int], wanted: Sequence[str]) -> dict[tuple[str, int], Trained]:
    """Return the trained solver of each wanted method at each budget."""
    pipe = optimized.model.pipe
    found: dict[tuple[str, int], Trained] = {}
    for budget in budgets:
        for method in [name for name in TRAINED if name in wanted]:
            kind, times = TRAINED[method]
            solver: TrainedSolver = SOLVERS[kind](pipe.scheduler, budget)
            path = optimized.kept(budget, method)
            if path is not None and path.is_file():
                found[method, budget] = Trained.load(path, solver)
                continue
            made = trained(pipe, solver, optimized.calls, times * optimized.seconds(budget))
            found[method, budget] = made
            print(f"trained {method}, {budget}: {made.updates} updates in {made.seconds:.0f} s", flush=True)
            if path is not None:
                made.save(path)
    return found


def auto(budget: int, steps: int = STEPS) -> Rule:
    """Return the rule of ``accelerate(pipe, "auto:speedup=…")`` that computes ``budget`` steps."""
    return Rule("auto", options={"speedup": steps / budget})


def choice(
    model: DemoModel, pictures: tuple[Sequence[str], Sequence[int]], keep: Path | None, steps: int = STEPS
) -> list[Peer]:
    """The peers' settings that are best at some amount of work on these pictures."""
    path = keep / f"{named(model.name, steps)}-peers.json" if keep else None
    if path is not None and path.is_file():
        names = [tuple(name) for name in json.loads(path.read_text())]
        return [p for p in PEERS if (p.package, p.name, p.setting) in names]
    chosen = behind(frontier(measure_peers(model, *pictures, repeats=0, steps=steps)))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps([(p.package, p.name, p.setting) for p in chosen]))
    return chosen


def measured(model: DemoModel, calls: Sequence[dict[str, Any]]) -> Profile:
    began = time.perf_counter()
    profile = measure(model.pipe, calls, sites=("model", "sublayer"), influence=False)
    print(f"profile in {time.perf_counter() - began:.0f} s", flush=True)
    return profile


def published(
    model: DemoModel, profile: Profile, spec: str, correction: str, budget: int, calls: Sequence[dict[str, Any]]
) -> CacheSchedule | str:
    try:
        schedule = planning.plan(profile, spec, budget)
        if correction:
            schedule = correct(model.pipe, schedule, calls[:CORRECTED_ON], per_channel=correction == "per channel")
    except ValueError as error:  # what this method cannot do here: the noise scheduler steps by a fixed stride
        return str(error)
    return schedule


def peers(
    table: Table,
    model: DemoModel,
    chosen: Sequence[Peer],
    shown: tuple[Sequence[str], Sequence[int]],
    repeats: int,
) -> None:
    for row in measure_peers(model, *shown, repeats=repeats, steps=table.steps, peers=chosen):
        if row.computed is None or row.psnr_db is None or row.speedup is None or row.ssim is None:
            print(f"{row.package} {row.name} {row.setting}: {row.failed}", flush=True)
            continue
        table.put(
            Result(
                f"{row.package} {row.version}: {row.name}",
                round(row.computed, 1),
                row.computed,
                row.speedup,
                row.psnr_db,
                float("nan"),
                row.ssim,
                row.setting,
            )
        )


if __name__ == "__main__":
    main()
