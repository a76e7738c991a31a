"""Write the tables, the sections of the documentation and the plots of the records of ``methods.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from method_results import OURS, PUBLISHED, SEARCHED, TRAINED, Record, Result, records
from methods_figure import plot, plot_all

from diffcache import planning, schedulers
from diffcache.demo.run import STEPS
from diffcache.documents import files

DEMO_BUDGET = 12  # of STEPS, for `diffcache plan --list`
KINDS: dict[str, Callable[[Result], bool]] = {
    "fewer steps": lambda r: r.method.startswith("fewer"),
    "trained solvers": lambda r: r.method in TRAINED,
    "uniform reuse": lambda r: r.method == "uniform reuse",
    "published methods": lambda r: r.method in (*PUBLISHED, SEARCHED) and "diffcache" not in r.method,
    "cache-dit, diffusers": lambda r: ": " in r.method,
}


def again(folder: Path) -> None:
    """Write the tables and plots of all records in a folder."""
    for record in records(folder):
        write(record, folder)
    write_pages(folder)
    write_demo_psnr(folder)


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


def row_of(result: Result, record: Record) -> list[str]:
    """Return the cells of a result: method, computed steps, speed-up, PSNR, PSNR of the worst tenth, SSIM."""
    name = f"**diffcache {result.method}**" if result.method == OURS else result.method
    name += f" ({result.setting})" if result.setting else ""
    low = "–" if np.isnan(result.psnr_low_db) else f"{result.psnr_low_db:.1f}"
    computed = f"{result.computed:.1f} of {record.steps}"
    return [name, computed, f"{result.speedup:.2f}x", f"{result.psnr_db:.1f}", low, f"{result.ssim:.4f}"]


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
            name, steps, *others = row_of(r, record)
            lines.append(f"| {name} | {steps} | {' | '.join(others)} |")
    return "\n".join([*lines, "", *leads(results)])


SUMMARY_BUDGETS = {STEPS: (25, 17, 12, 8)}  # steps of the full run -> budgets; all of them where none are named


def summary(record: Record) -> str:
    """Return plain alternatives, and the best trained solver, rule and package in about the time, as a table."""
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
        rules = [r for r in at if KINDS["published methods"](r) and r.method != "uniform reuse"]
        solvers = [r for r in at if r.method in TRAINED]
        others = [r for r in results if ": " in r.method and r.speedup >= own[0].speedup / 1.05]
        best = [max(group, key=lambda r: r.psnr_db) for group in (solvers, rules, others) if group]
        for r in [*plain, *best, *own]:
            name, steps, *others = row_of(r, record)
            lines.append(f"| {steps} | {name} | {' | '.join(others)} |")
    return "\n".join(lines)


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
    kinds = [kind for kind, belongs in KINDS.items() if any(belongs(r) for r in results)]
    lines = [
        "Lead of `optimize` in dB at equal time over the best of each kind, whose PSNR is in brackets:",
        "",
        "| computed steps | " + " | ".join(kinds) + " |",
        "|---:|" + "---:|" * len(kinds),
    ]
    for budget in budgets:
        (own,) = (r for r in results if r.method == OURS and r.budget == budget)
        cells = []
        for kind in kinds:
            best = at_equal_time(kind, results, own)
            cells.append("–" if best is None else f"{own.psnr_db - best:+.1f} ({best:.1f})")
        lines.append(f"| {budget:g} | " + " | ".join(cells) + " |")
    return lines
