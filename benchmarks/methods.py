"""Published rules, peers' packages and this project at equal computed steps: held-out pictures and seeds, one process.

    python benchmarks/methods.py --model flux
    python benchmarks/methods.py --model dit
    python benchmarks/methods.py --model flux-guided
    python benchmarks/methods.py --model flux --steps 28 --budgets 14 10 7

Prints the table and writes ``results/methods-<model>.md``, ``.json`` and ``.png``, and ``results/fidelity.png`` of all
models. Results of another number of steps than 50 lie in ``results/methods-<model>-<steps>.*``. Every row is
compared with the full run of the same pictures; speed-ups are of the sampling loop. Peers decide how much they compute
by thresholds: settings that no other of the same package beats are chosen on other pictures than the table is made of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from method_results import AUTO, OURS, PUBLISHED, RESULTS, Record, Result, named, records
from methods_figure import plot, plot_all
from peers.adapters import PEERS
from peers.measure import behind, frontier, measure_peers
from peers.peer import Peer
from trials import Trial, trial

from diffcache import CacheSchedule, estimate, planning, schedulers
from diffcache.assets import NAMES, DemoModel, load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, circumstances, split
from diffcache.documents import Profile, files
from diffcache.eval.metrics.psnr import score as psnr_db
from diffcache.eval.metrics.ssim import score as ssim
from diffcache.eval.noise_schedulers import better_noise_scheduler, noise_scheduler_name
from diffcache.profiling import Calibration, measure
from diffcache.profiling.calibration.correction import correct
from diffcache.schedulers import Rule

CORRECTED_ON = 2  # calls of eight pictures: a scale and a bias need fewer samples than a mask

DEMO_BUDGET = 12  # of STEPS, for `diffcache plan --list`


def again(folder: Path) -> None:
    """The tables and plots of records that lie in ``folder``, written anew."""
    for record in records(folder):
        write(record, folder)
    write_pages(folder)
    write_demo_psnr(folder)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--steps", type=int, default=STEPS, help="steps of the full run")
    args.add_argument("--budgets", type=int, nargs="+", default=[25, 17, 12, 10, 8, 6], help="computed steps")
    args.add_argument("--calibration", type=int, default=32, help="pictures to calibrate on")
    args.add_argument("--held-out", type=int, default=32, help="pictures to compare on")
    args.add_argument("--repeats", type=int, default=1, help="timed runs of every method; the median counts")
    args.add_argument("--choose", type=int, default=8, help="pictures that peers' settings are chosen on; 0: no peers")
    args.add_argument("--out", type=Path, default=RESULTS)
    args.add_argument("--keep", type=Path, help="folder for schedules and choices: what lies there is not made again")
    args.add_argument("--again", action="store_true", help="write tables and plots of the records under --out anew")
    args.add_argument("--plan-only", action="store_true", help="make what --keep is for, compare nothing")
    o = args.parse_args()
    if o.again:
        again(o.out)
        return
    if not 0 < min(o.budgets) <= max(o.budgets) < o.steps:
        args.error(f"--budgets {o.budgets} was given; allowed: 1 to {o.steps - 1}, fewer than --steps")
    model = load(o.model)
    size = Size(budgets=tuple(o.budgets), calibration=o.calibration, held_out=o.held_out, repeats=o.repeats)
    fitted, shown = split(model, size)
    calls = [model.call(*part, steps=o.steps) for part in batches(fitted)]
    # Under a name of their own: schedules of other samples are not taken for theirs.
    keep = o.keep and o.keep / hashlib.sha256(json.dumps(fitted).encode()).hexdigest()[:8]
    plans = schedules(model, calls, o.budgets, keep, o.steps)
    chosen = choice(model, (fitted[0][-o.choose :], fitted[1][-o.choose :]), keep, o.steps) if o.choose else []
    if o.plan_only:
        return
    trial(model, (shown[0][:2], shown[1][:2]), 4, 1)  # warm-up
    full = trial(model, shown, o.steps, max(3, o.repeats))
    table = Table(model, shown, o.repeats, full, o.steps)
    table.add("full run", o.steps, lambda: full, o.steps)
    few_steps(table, o.budgets)
    for (method, budget), schedule in plans.items():
        table.plan(method, budget, schedule)
    if chosen:
        peers(table, model, chosen, shown, o.repeats)
    table.save(o.out, circumstances(size))


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

    def put(self, result: Result) -> None:
        self.results.append(result)
        print(
            f"{result.method:38} {result.computed:5.1f} steps  {result.speedup:5.2f}x  {result.psnr_db:6.2f} dB  "
            f"{result.psnr_low_db:6.2f}  {result.ssim:.4f}  {result.note}",
            flush=True,
        )

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        found = Record(self.model.name, self.steps, about, self.results)
        files.write(folder / f"methods-{found.name}.json", json.dumps(asdict(found), indent=2) + "\n")
        write(found, folder)
        write_pages(folder)
        print(markdown(found))


def write_pages(folder: Path) -> None:
    """Write what is made of all records in a folder: the README's table, the sections of the docs and the plot."""
    write_front_page(folder)
    write_sections(folder)
    plot_all(folder)


FRONT_PAGE_BUDGETS = {STEPS: (17, 8)}  # steps of the full run -> the rows of the README's table
FRONT_PAGE_KINDS = ("fewer steps", "published methods", "cache-dit, diffusers")


def write_front_page(folder: Path) -> None:
    """Write the README's table: PSNR of the best of each kind at equal time, two budgets for each model."""
    lines = [
        "| demo model | computed steps | speed-up | " + " | ".join(FRONT_PAGE_KINDS) + " | **diffcache, calibrated** |",
        "|---|---:|---:|" + "---:|" * len(FRONT_PAGE_KINDS) + "---:|",
    ]
    for record in records(folder):
        budgets = FRONT_PAGE_BUDGETS.get(record.steps, ())
        for own in (r for r in record.rows if r.method == OURS and r.budget in budgets):
            found = [at_equal_time(kind, record.rows, own) for kind in FRONT_PAGE_KINDS]
            cells = ["–" if db is None else f"{db:.1f}" for db in found]
            lines.append(
                f"| {record.about.short} | {own.budget:g} of {record.steps} | {own.speedup:.1f}x "
                f"| {' | '.join(cells)} | **{own.psnr_db:.1f}** |"
            )
    files.write(folder / "front-page.md", "\n".join(lines) + "\n")


def write_sections(folder: Path) -> None:
    """Write the parts of ``docs/benchmarks.md`` that have a section for each record."""
    tables, differences = [], []
    for record in records(folder):
        about = record.about
        steps = "" if record.steps == STEPS else f", {record.steps} steps"
        title = f"# {about.title}: {about.task}, {about.sampler}, {about.guidance_words}{steps}"
        budgets = sorted({r.budget for r in record.rows if r.method == OURS}, reverse=True)
        command = f"python benchmarks/methods.py --model {record.model}"
        if record.steps != STEPS:
            command += f" --steps {record.steps} --budgets {' '.join(f'{budget:g}' for budget in budgets)}"
        links = f"[all budgets and methods](methods-{record.name}.md)"
        if (folder / f"evaluation-{record.name}.md").is_file():
            links += f", [on 64 other pictures, with intervals and verdicts](evaluation-{record.name}.md)"
        tables += [title, "", f"`{command}`; {links}.", "", summary(record), ""]
        differences += [f"{about.title}, {about.guidance_words}{steps}:", "", *leads(record.rows), ""]
    files.write(folder / "methods-sections.md", "\n".join(tables))
    files.write(folder / "leads-sections.md", "\n".join(differences))


def write_demo_psnr(folder: Path) -> None:
    """Write the file from which ``diffcache plan --list`` takes what schedulers reach on the demo models."""
    found: dict[str, dict[str, float]] = {}
    for record in (one for one in records(folder) if one.steps == STEPS):
        rows = {row.method: row for row in record.rows if row.budget == DEMO_BUDGET}
        own = found.setdefault(record.model, {})
        for method, (spec, correction) in PUBLISHED.items():
            name, row = spec.partition(":")[0], rows.get(method)
            if (
                row is not None
                and row.computed <= DEMO_BUDGET + 0.5
                and not (name in own or correction == "per channel")
            ):
                own[name] = round(row.psnr_db, 1)
    text = json.dumps({"computed_steps": DEMO_BUDGET, "steps": STEPS, "psnr_db": found}, indent=1, sort_keys=True)
    files.write(Path(schedulers.__file__).parent / planning.DEMO_FILE, text + "\n")


def write(record: Record, folder: Path) -> None:
    files.write(folder / f"methods-{record.name}.md", markdown(record) + "\n")
    files.write(folder / f"summary-{record.name}.md", summary(record) + "\n")
    files.write(folder / f"leads-{record.name}.md", "\n".join(leads(record.rows)) + "\n")
    plot(record, folder / f"methods-{record.name}.png")


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


def schedules(
    model: DemoModel, calls: Sequence[dict[str, Any]], budgets: Sequence[int], keep: Path | None, steps: int = STEPS
) -> dict[tuple[str, int], CacheSchedule | Rule | str]:
    """Of every method at every budget, or the reason why there is none."""
    found: dict[tuple[str, int], CacheSchedule | Rule | str] = {}
    profile: Profile | None = None
    calibration: Calibration | None = None
    for budget in budgets:
        found[AUTO, budget] = auto(budget, steps)
        for method in [*PUBLISHED, OURS]:
            file = f"{named(model.name, steps)}-{budget}-{method.replace(' ', '-')}.safetensors"
            path = keep / file if keep else None
            if path is not None and path.is_file():
                found[method, budget] = CacheSchedule.load(path)
                continue
            began = time.perf_counter()
            if method == OURS:
                calibration = calibration or Calibration.record(model.pipe, calls)
                found[method, budget] = made = calibration.schedule(budget)
            else:
                profile = profile or measured(model, calls)
                found[method, budget] = made = published(model, profile, *PUBLISHED[method], budget, calls)
            print(f"planned {method}, {budget}, in {time.perf_counter() - began:.0f} s", flush=True)
            if path is not None and isinstance(made, CacheSchedule):
                path.parent.mkdir(parents=True, exist_ok=True)
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


def markdown(record: Record) -> str:
    """By budget; peers' settings stand with the budget next above the work they do."""
    results = record.rows
    budgets = sorted({r.budget for r in results if r.method == OURS}, reverse=True)
    lines = [
        "| method | computed steps | sampling speed-up | PSNR (dB) | worst tenth | SSIM |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for budget in budgets:
        lower = max((b for b in budgets if b < budget), default=0)
        here = [r for r in results if lower < r.budget <= budget]
        for r in sorted(here, key=lambda r: -r.psnr_db):
            name = f"**diffcache {r.method}**" if r.method == OURS else r.method
            name += f" ({r.note})" if ": " in r.method else ""
            low = "–" if np.isnan(r.psnr_low_db) else f"{r.psnr_low_db:.1f}"
            lines.append(
                f"| {name} | {r.computed:.1f} of {record.steps} | {r.speedup:.2f}x | {r.psnr_db:.1f} | {low} "
                f"| {r.ssim:.4f} |"
            )
    return "\n".join([*lines, "", *leads(results)])


SUMMARY_BUDGETS = {STEPS: (25, 17, 12, 8)}  # steps of the full run -> budgets; all of them where none are named


def summary(record: Record) -> str:
    """What a reader wants first: plain alternatives, the best published rule, the best peer in about the time, ours."""
    results = record.rows
    budgets = SUMMARY_BUDGETS.get(record.steps) or sorted({r.budget for r in results if r.method == OURS}, reverse=True)
    lines = [
        "| computed steps | method | sampling speed-up | PSNR (dB) | worst tenth | SSIM |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for budget in budgets:
        own = [r for r in results if r.method == OURS and r.budget == budget]
        if not own:
            continue
        at = [r for r in results if r.budget == budget]
        plain = [r for r in at if r.method.startswith("fewer") or r.method == "uniform reuse"]
        rules = [r for r in at if r.method in PUBLISHED and r.method != "uniform reuse" and "diffcache" not in r.method]
        others = [r for r in results if ": " in r.method and r.speedup >= own[0].speedup / 1.05]
        best = [max(group, key=lambda r: r.psnr_db) for group in (rules, others) if group]
        for r in [*plain, *best, *own]:
            name = f"**diffcache {r.method}**" if r.method == OURS else r.method
            name += f" ({r.note})" if ": " in r.method else ""
            low = "–" if np.isnan(r.psnr_low_db) else f"{r.psnr_low_db:.1f}"
            lines.append(
                f"| {r.computed:.1f} of {record.steps} | {name} | {r.speedup:.2f}x | {r.psnr_db:.1f} | {low} "
                f"| {r.ssim:.4f} |"
            )
    return "\n".join(lines)


KINDS: dict[str, Callable[[Result], bool]] = {
    "fewer steps": lambda r: r.method.startswith("fewer"),
    "uniform reuse": lambda r: r.method == "uniform reuse",
    "published methods": lambda r: r.method in PUBLISHED and "diffcache" not in r.method,
    "cache-dit, diffusers": lambda r: ": " in r.method,
}


def at_equal_time(kind: str, results: Sequence[Result], own: Result) -> float | None:
    """Return the PSNR in dB that a kind reaches at the speed-up of ``own``; None if it has no result as fast.

    Settings are discrete, so a kind may have none at exactly this speed-up. The value is then interpolated between the
    nearest slower and the nearest faster setting, linearly over the logarithm of the speed-up. Settings that are both
    slower and worse than another are left out. A setting that takes up to 1.05 times as long also counts.
    """
    others = [r for r in results if KINDS[kind](r)]
    within = [r.psnr_db for r in others if r.speedup >= own.speedup / 1.05]
    if not within:
        return None
    front: list[Result] = []
    for one in sorted(others, key=lambda r: -r.speedup):
        if not front or one.psnr_db > front[-1].psnr_db:
            front.append(one)
    faster = next((r for r in reversed(front) if r.speedup >= own.speedup), None)
    slower = next((r for r in front if r.speedup < own.speedup), None)
    if faster is None or slower is None:
        return max(within)
    share = np.log(own.speedup / slower.speedup) / np.log(faster.speedup / slower.speedup)
    return max(max(within), float(slower.psnr_db + share * (faster.psnr_db - slower.psnr_db)))


def leads(results: Sequence[Result]) -> list[str]:
    """Return the lead of ``optimize`` over the best of each kind at equal time, as lines of a table."""
    budgets = sorted({r.budget for r in results if r.method == OURS}, reverse=True)
    lines = [
        "Lead of `optimize` in dB at equal time over the best of each kind, whose PSNR is in brackets:",
        "",
        "| computed steps | " + " | ".join(KINDS) + " |",
        "|---:|" + "---:|" * len(KINDS),
    ]
    for budget in budgets:
        (own,) = (r for r in results if r.method == OURS and r.budget == budget)
        cells = []
        for kind in KINDS:
            best = at_equal_time(kind, results, own)
            cells.append("–" if best is None else f"{own.psnr_db - best:+.1f} ({best:.1f})")
        lines.append(f"| {budget:g} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
