"""Published rules, peers' packages and this project at equal computed steps: held-out pictures and seeds, one process.

    python benchmarks/methods.py --model flux
    python benchmarks/methods.py --model dit

Prints the table and writes ``results/methods-<model>.md``, ``.json`` and ``.png``, and ``results/fidelity.png`` of both
models. Every row is compared with the full run of the same pictures; speed-ups are of the sampling loop. Peers decide
how much they compute by thresholds: settings that no other of the same package beats are chosen on other pictures than
the table is made of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

RESULTS = Path(__file__).parent / "results"
DPI = 160
OURS = "optimize"
CORRECTED_ON = 2  # calls of eight pictures: a scale and a bias need fewer samples than a mask


@dataclass(frozen=True, slots=True)
class Result:
    """One method at one budget. ``computed``: work in the denoiser, in full steps; psnr_low_db: the worst decile."""

    method: str
    budget: float
    computed: float
    speedup: float
    psnr_db: float
    psnr_low_db: float
    ssim: float
    note: str = ""


# name in the table -> (scheduler's spec, correction fitted on the calibration calls)
PUBLISHED: dict[str, tuple[str, str]] = {
    "uniform reuse": ("uniform", ""),
    "SmoothCache": ("smoothcache:sites=sublayer", ""),
    "MagCache": ("magcache", ""),
    "ERTACache mask": ("ertacache", ""),
    "ERTACache": ("timestep_adjustment", "one for all channels"),
    "CacheQuant DPS": ("cachequant", ""),
    "CacheQuant DPS + DEC": ("cachequant", "per channel"),
    "LeMiCa path": ("lemica", ""),
    "MeanCache path": ("meancache", ""),
    "DPCache path": ("dpcache", ""),
    "TaylorSeer, order 1": ("taylorseer:order=1", ""),
    "TaylorSeer, order 2": ("taylorseer:order=2", ""),
    "simulated plan (diffcache, no fit)": ("closed_loop", ""),
}


DEMO_BUDGET = 12  # of STEPS, for `diffcache plan --list`


def again(folder: Path) -> None:
    """The tables and plots of records that lie in ``folder``, written anew."""
    for path in sorted(folder.glob("methods-*.json")):
        record = json.loads(path.read_text())
        write([Result(**row) for row in record["rows"]], folder, record["model"])
    write_front_page(folder)
    plot_all(folder)
    write_demo_psnr(folder)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=NAMES, default="flux")
    args.add_argument("--budgets", type=int, nargs="+", default=[25, 17, 12, 10, 8, 6])
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
    model = load(o.model)
    size = Size(budgets=tuple(o.budgets), calibration=o.calibration, held_out=o.held_out, repeats=o.repeats)
    fitted, shown = split(model, size)
    calls = [model.call(*part, steps=STEPS) for part in batches(fitted)]
    # Under a name of their own: schedules of other samples are not taken for theirs.
    keep = o.keep and o.keep / hashlib.sha256(json.dumps(fitted).encode()).hexdigest()[:8]
    plans = schedules(model, calls, o.budgets, keep)
    chosen = choice(model, (fitted[0][-o.choose :], fitted[1][-o.choose :]), keep) if o.choose else []
    if o.plan_only:
        return
    trial(model, (shown[0][:2], shown[1][:2]), 4, 1)  # warm-up
    full = trial(model, shown, STEPS, max(3, o.repeats))
    table = Table(model, shown, o.repeats, full)
    table.add("full run", STEPS, lambda: full, STEPS)
    few_steps(table, o.budgets)
    for (method, budget), schedule in plans.items():
        table.plan(method, budget, schedule)
    if chosen:
        peers(table, model, chosen, shown, o.repeats)
    table.save(o.out, o.model, circumstances(size))


class Table:
    """Results as they come, printed at once."""

    def __init__(self, model: DemoModel, shown: tuple[Sequence[str], Sequence[int]], repeats: int, full: Trial) -> None:
        self.model, self.shown, self.repeats, self.full = model, shown, repeats, full
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

    def plan(self, method: str, budget: float, schedule: CacheSchedule | str, note: str = "") -> None:
        """A schedule, or the reason why there is none."""
        if isinstance(schedule, str):
            print(f"{method}, {budget}: {schedule}", flush=True)
            return
        few = self.model.call(self.shown[0][:2], self.shown[1][:2], steps=STEPS)
        computed = STEPS * estimate(self.model.pipe, schedule, **few).compute_fraction
        self.add(method, budget, lambda: trial(self.model, self.shown, STEPS, self.repeats, schedule), computed, note)

    def put(self, result: Result) -> None:
        self.results.append(result)
        print(
            f"{result.method:38} {result.computed:5.1f} steps  {result.speedup:5.2f}x  {result.psnr_db:6.2f} dB  "
            f"{result.psnr_low_db:6.2f}  {result.ssim:.4f}  {result.note}",
            flush=True,
        )

    def save(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        record = {"model": name, "circumstances": about, "rows": [asdict(r) for r in self.results]}
        files.write(folder / f"methods-{name}.json", json.dumps(record, indent=2) + "\n")
        write(self.results, folder, name)
        write_front_page(folder)
        plot_all(folder)
        print(markdown(self.results))


FRONT_PAGE = {"dit": "DiT, guided", "flux": "Flux"}  # the models of the README's table, in its order
FRONT_PAGE_BUDGETS = (17, 8)
FRONT_PAGE_KINDS = ("fewer steps", "published methods", "cache-dit, diffusers")


def write_front_page(folder: Path) -> None:
    """Write the README's table: PSNR of the best of each kind at equal time, two budgets for each model."""
    lines = [
        "| demo model | computed steps | speed-up | " + " | ".join(FRONT_PAGE_KINDS) + " | **diffcache, calibrated** |",
        "|---|---:|---:|" + "---:|" * len(FRONT_PAGE_KINDS) + "---:|",
    ]
    for name, title in FRONT_PAGE.items():
        path = folder / f"methods-{name}.json"
        results = [Result(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []
        for own in (r for r in results if r.method == OURS and r.budget in FRONT_PAGE_BUDGETS):
            found = [at_equal_time(kind, results, own) for kind in FRONT_PAGE_KINDS]
            cells = ["–" if db is None else f"{db:.1f}" for db in found]
            lines.append(
                f"| {title} | {own.budget:g} of {STEPS} | {own.speedup:.1f}x | {' | '.join(cells)} "
                f"| **{own.psnr_db:.1f}** |"
            )
    files.write(folder / "front-page.md", "\n".join(lines) + "\n")


def write_demo_psnr(folder: Path) -> None:
    """Write the file from which ``diffcache plan --list`` takes what schedulers reach on the demo models."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("methods-*.json")):
        record = json.loads(path.read_text())
        rows = {row["method"]: row for row in record["rows"] if row["budget"] == DEMO_BUDGET}
        own = found.setdefault(record["model"], {})
        for method, (spec, correction) in PUBLISHED.items():
            name, row = spec.partition(":")[0], rows.get(method)
            if (
                row is not None
                and row["computed"] <= DEMO_BUDGET + 0.5
                and not (name in own or correction == "per channel")
            ):
                own[name] = round(row["psnr_db"], 1)
    text = json.dumps({"computed_steps": DEMO_BUDGET, "steps": STEPS, "psnr_db": found}, indent=1, sort_keys=True)
    files.write(Path(schedulers.__file__).parent / planning.DEMO_FILE, text + "\n")


def write(results: Sequence[Result], folder: Path, name: str) -> None:
    files.write(folder / f"methods-{name}.md", markdown(results) + "\n")
    files.write(folder / f"summary-{name}.md", summary(results) + "\n")
    files.write(folder / f"leads-{name}.md", "\n".join(leads(results)) + "\n")
    plot(results, name, folder / f"methods-{name}.png")


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
    model: DemoModel, calls: Sequence[dict[str, Any]], budgets: Sequence[int], keep: Path | None
) -> dict[tuple[str, int], CacheSchedule | str]:
    """Of every method at every budget, or the reason why there is none."""
    found: dict[tuple[str, int], CacheSchedule | str] = {}
    profile: Profile | None = None
    calibration: Calibration | None = None
    for budget in budgets:
        for method in [*PUBLISHED, OURS]:
            path = keep / f"{model.name}-{budget}-{method.replace(' ', '-')}.safetensors" if keep else None
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


def choice(model: DemoModel, pictures: tuple[Sequence[str], Sequence[int]], keep: Path | None) -> list[Peer]:
    """The peers' settings that are best at some amount of work on these pictures."""
    path = keep / f"{model.name}-peers.json" if keep else None
    if path is not None and path.is_file():
        names = [tuple(name) for name in json.loads(path.read_text())]
        return [p for p in PEERS if (p.package, p.name, p.setting) in names]
    chosen = behind(frontier(measure_peers(model, *pictures, repeats=0)))
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
    for row in measure_peers(model, *shown, repeats=repeats, peers=chosen):
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


def markdown(results: Sequence[Result]) -> str:
    """By budget; peers' settings stand with the budget next above the work they do."""
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
                f"| {name} | {r.computed:.1f} of {STEPS} | {r.speedup:.2f}x | {r.psnr_db:.1f} | {low} | {r.ssim:.4f} |"
            )
    return "\n".join([*lines, "", *leads(results)])


def summary(results: Sequence[Result], budgets: Sequence[float] = (25, 17, 12, 8)) -> str:
    """What a reader wants first: plain alternatives, the best published rule, the best peer in about the time, ours."""
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
                f"| {r.computed:.1f} of {STEPS} | {name} | {r.speedup:.2f}x | {r.psnr_db:.1f} | {low} | {r.ssim:.4f} |"
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


INK, MUTED = "#22223b", "#5c606c"
OWN = "#0063a6"
# Name of a method without its variant -> colour and dashes, the same in all panels. Text in each has enough contrast.
STYLES: dict[str, tuple[str, Any]] = {
    "MeanCache": ("#c85200", "-"),
    "LeMiCa": ("#008060", "-"),
    "TaylorSeer": ("#b3202a", "-"),
    "DPCache": ("#5b3fa8", "-"),
    "diffusers": ("#a0568a", "-"),
    "fewer steps": ("#8c6d1f", "-"),
    "MagCache": ("#4d7c0f", (0, (5, 1.5))),
    "ERTACache": ("#0e7490", (0, (3, 1, 1, 1))),
    "CacheQuant": ("#6b6b6b", (0, (5, 1.5))),
    "SmoothCache": ("#be185d", (0, (3, 1, 1, 1))),
    "uniform reuse": ("#22223b", (0, (1, 1))),
    "cache-dit": ("#444444", "-"),
    "diffcache, no fit": ("#2272b4", (0, (3, 1.5))),
}
TICKS = (2, 3, 4, 5, 6, 8)
NAMED_AT = (17, 12, 8)  # budgets by which the methods to emphasise are chosen
LOW, HIGH = 1.6, 8.8  # speed-ups: what hardly saves anything, and the full run itself, would squeeze the rest
EARLY = 5.5  # a line that ends at a lower speed-up has its name at its end, not at the right
NAME_SIZE = 10  # points
PANEL_TITLES = {"dit": "DiT, classifier-free guidance 4 (DDIM)", "flux": "Flux transformer, no guidance (Euler)"}


def plot(results: Sequence[Result], name: str, path: Path) -> None:
    """Draw fidelity over speed-up of one model."""
    _draw({name: results}, path)


def plot_all(folder: Path) -> None:
    """Draw fidelity over speed-up of all models with a record in ``folder``, next to each other."""
    found = {}
    for path in sorted(folder.glob("methods-*.json")):
        record = json.loads(path.read_text())
        found[record["model"]] = [Result(**row) for row in record["rows"]]
    _draw(found, folder / "fidelity.png")


def _draw(models: dict[str, Sequence[Result]], path: Path) -> None:
    figure = figure_of(models)
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def figure_of(models: dict[str, Sequence[Result]]) -> Any:
    """Return the figure: one panel for each model, in which every line has its name."""
    import matplotlib.figure

    # 1600 px for two panels: at half the size, as in a README, the text is still 11 px high.
    figure = matplotlib.figure.Figure(figsize=(0.4 + 4.8 * len(models), 5.6), dpi=DPI)
    panels = figure.subplots(1, len(models), squeeze=False)
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=1, top=0.93, wspace=0.08)
    text = (
        "Band: from the mean down to the worst tenth of held-out pictures. "
        "One line for each paper: its best variant. Packages: their best settings."
    )
    caption = textwrap.fill(text, int(15 * (figure.get_figwidth() - 0.65)))  # 15 characters take an inch
    figure.subplots_adjust(bottom=0.14 + 0.035 * caption.count("\n"))
    for n, (axes, (name, results)) in enumerate(zip(panels[0], models.items(), strict=True)):
        _panel(axes, results, name)
        if not n:
            axes.set_ylabel("PSNR against the full run (dB)", fontsize=10.5, color=INK)
    figure.text(0.6 / figure.get_figwidth(), 0.012, caption, fontsize=9.5, color=MUTED, linespacing=1.4)
    return figure


def lines_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each method, and the settings of each package that no other of it beats, by speed-up."""
    groups: dict[str, list[Result]] = {}
    for r in sorted(results, key=lambda r: r.speedup):
        if r.method != "full run":
            groups.setdefault(r.method.partition(": ")[0] if ": " in r.method else r.method, []).append(r)
    for rows in groups.values():
        if ": " in rows[0].method:
            rows[:] = [r for n, r in enumerate(rows) if all(later.psnr_db < r.psnr_db for later in rows[n + 1 :])]
    return groups


def reached(groups: dict[str, list[Result]], method: str) -> float:
    """Return the mean over budgets of the best PSNR in dB that a method has in about the time of ours."""
    own = {r.budget: r for r in groups[OURS]}
    found = [
        max((r.psnr_db for r in groups[method] if r.speedup >= own[budget].speedup / 1.05), default=0.0)
        for budget in NAMED_AT
        if budget in own
    ]
    return float(np.mean(found)) if found else 0.0


def best_variants(groups: dict[str, list[Result]]) -> dict[str, str]:
    """Return the name of each method without its variant -> its best variant, a key of ``groups``."""
    return {_family(m): m for m in sorted(groups, key=lambda m: reached(groups, m)) if m != OURS}


def named(results: Sequence[Result]) -> list[str]:
    """Return the lines that a plot emphasises: the best of each kind, and the best rule of a second paper."""
    groups = lines_of(results)
    lines = list(best_variants(groups).values())
    rules = [m for m in lines if m in PUBLISHED and m != "uniform reuse" and "diffcache" not in m]
    packages = [m for m in lines if ": " in groups[m][0].method]
    fewer = [m for m in lines if m.startswith("fewer")]
    best = [(rules, 2), (packages, 1), (fewer, 1)]
    return [m for some, n in best for m in sorted(some, key=lambda m: reached(groups, m), reverse=True)[:n]]


def _family(method: str) -> str:
    """Return the name of a method or package without its variant, a key of ``STYLES``."""
    if "diffcache" in method:
        return "diffcache, no fit"
    return next(family for family in STYLES if method.startswith(family))


def _short(method: str) -> str:
    """Return a name that fits next to a line."""
    if method.startswith("fewer"):
        return method.replace(" (", ", ").rstrip(")").replace("DPM-Solver++", "DPM++")
    if "diffcache" in method:
        return "diffcache" if method == "diffcache" else _family(method)
    if _family(method) in ("diffusers", "cache-dit"):
        return _family(method)  # without the version
    return method.removesuffix(" path").removesuffix(" mask")


def _panel(axes: Any, results: Sequence[Result], name: str) -> None:
    """Draw the lines of one model, each with its name."""
    groups = lines_of(results)
    emphasised = named(results)
    own = [r for r in groups[OURS] if r.speedup < HIGH]
    lines = {m: [r for r in groups[m] if LOW < r.speedup < HIGH] for m in best_variants(groups).values()}
    lines = {m: rows for m, rows in lines.items() if rows}
    shown = [r for rows in (*lines.values(), own) for r in rows]
    bottom, top = min(r.psnr_db for r in shown) - 1.5, max(r.psnr_db for r in own) + 2
    bottom -= (top - bottom) / 25  # a name below the lowest end
    axes.set(xscale="log", xlim=(LOW, 29), ylim=(bottom, top))
    ends = [("diffcache", OWN, own[-1])]
    for method, rows in lines.items():
        strong = method in emphasised
        colour, dashes = STYLES[_family(method)]
        axes.plot(
            [r.speedup for r in rows], [r.psnr_db for r in rows], color=colour, linestyle="-" if strong else dashes,
            marker="o", linewidth=1.9 if strong else 1, markersize=4.5 if strong else 2, zorder=3 if strong else 1,
            label=_short(method),
        )  # fmt: skip
        if rows[-1].speedup < EARLY:
            axes.annotate(
                _short(method), (rows[-1].speedup, rows[-1].psnr_db), (0, -4), textcoords="offset points",
                color=colour, fontsize=NAME_SIZE, va="top", ha="left" if rows[-1].speedup < TICKS[0] else "center",
            )  # fmt: skip
        else:
            ends.append((method, colour, rows[-1]))
    speeds = [r.speedup for r in own]
    axes.fill_between(
        speeds, [r.psnr_low_db for r in own], [r.psnr_db for r in own], color=OWN, alpha=0.13, lw=0, zorder=0
    )
    axes.plot(
        speeds, [r.psnr_db for r in own], "o-", color=OWN, linewidth=2.8, markersize=6, zorder=4, label="diffcache"
    )
    axes.set_xticks(TICKS, [f"{t}x" for t in TICKS], minor=False)
    axes.minorticks_off()
    axes.tick_params(labelsize=10.5, color=MUTED, labelcolor=INK, length=3)
    axes.set_xlabel("speed-up of the sampling loop", fontsize=10.5, color=INK, loc="left")
    axes.set_title(PANEL_TITLES.get(name, name), loc="left", fontsize=12, color=INK)
    axes.grid(axis="y", color="#ecedf1", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    _names(axes, ends, (top - bottom) / 26)


def _names(axes: Any, ends: list[tuple[str, str, Result]], apart: float) -> None:
    """Write the names of lines at the right, at least ``apart`` dB from each other, each with a line to its end."""
    ends.sort(key=lambda end: end[2].psnr_db)
    lowest, highest = axes.get_ylim()
    heights = spread([end[2].psnr_db for end in ends], apart, lowest + apart / 2, highest - apart / 2)
    for (method, colour, last), height in zip(ends, heights, strict=True):
        weight = "bold" if method == "diffcache" else "normal"
        at = [last.speedup, HIGH * 0.99, HIGH * 1.22, HIGH * 1.25]
        axes.plot(at, [last.psnr_db, last.psnr_db, height, height], color=colour, lw=0.8, ls=":", label="_leader")
        axes.text(HIGH * 1.27, height, _short(method), color=colour, fontsize=NAME_SIZE, va="center", weight=weight)


def spread(wanted: Sequence[float], apart: float, lowest: float, highest: float) -> list[float]:
    """Return the heights nearest to ``wanted``, in ascending order, that differ by at least ``apart``.

    Args:
        wanted: Heights in ascending order.
        apart: Least distance.
        lowest: Least height.
        highest: Largest height. It yields to ``lowest`` and ``apart``.
    """
    # Without the distances, neighbours in the wrong order share their mean: an isotonic regression.
    groups: list[tuple[float, int]] = []
    for n, height in enumerate(wanted):
        groups.append((height - n * apart, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (second, count), (first, before) = groups.pop(), groups.pop()
            groups.append(((first * before + second * count) / (before + count), before + count))
    flat = [height for height, count in groups for _ in range(count)]
    most = highest - (len(wanted) - 1) * apart
    return [max(min(height, most), lowest) + n * apart for n, height in enumerate(flat)]


if __name__ == "__main__":
    main()
