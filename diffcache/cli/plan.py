"""``diffcache plan``: make a schedule from a profile and a budget, without calling a network."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from diffcache import planning, registry, schedulers
from diffcache.documents.budget import Budget
from diffcache.documents.destinations import check_file
from diffcache.documents.profile import Profile
from diffcache.errors import BadOption, Unusable

DEFAULT = "closed_loop"
LEAST_ROOM = 45  # columns that the summary needs to share a line with the table


def plan(
    context: typer.Context,
    profile: Annotated[Path | None, typer.Argument(help="A profile, as `diffcache profile` writes it.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Name of a scheduler, options behind a colon: meancache:gamma=4. See --list.")
    ] = None,
    steps: Annotated[
        float | None, typer.Option("--steps", "--computed", help="Goal: number of computed steps.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Goal: speed-up of the sampling loop, by the seconds in the profile.")
    ] = None,
    max_error_db: Annotated[
        float | None,
        typer.Option(help="Goal: fewest computed steps with at least this expected PSNR of the final state."),
    ] = None,
    memory_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of kept outputs, for the profiled batch.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Format of kept outputs: bf16, int8, fp8, int4; auto: for each site the one with which all fit into "
            "--memory-bytes at the least error. Without it, as they are."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output file of the schedule.")] = Path("schedule.safetensors"),
    list_: Annotated[
        bool, typer.Option("--list", help="List the schedulers; with --scheduler, describe that one. Plans nothing.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Plan with every scheduler and sort by expected PSNR. Writes nothing."),
    ] = False,
) -> None:
    """Plan a schedule from a profile: which steps are computed, and how the others are predicted."""
    if list_:
        typer.echo(listing(scheduler, shutil.get_terminal_size().columns))
        return
    if profile is None:
        raise BadOption("profile", None, "the file of a profile, or --list")
    goals = {"--steps": steps, "--speedup": speedup, "--max-error-db": max_error_db}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} were given" if given else "no goal was given"
        raise Unusable("budget", found, f"Pass exactly one of {', '.join(goals)}")
    budget = Budget(computed_steps=steps, speedup=speedup, max_error_db=max_error_db, memory_bytes=memory_bytes)
    if compare:
        _demand_comparable(context)
        typer.echo(comparison(planning.compare(Profile.load(profile), budget)))
        return
    scheduler = scheduler or DEFAULT
    check_file("out", out)
    planning.check_scheduler(scheduler)
    schedule = planning.plan(Profile.load(profile), scheduler, budget, store=store)
    typer.echo(schedule.describe())
    typer.echo(f"written to {schedule.save(out)}")


def _demand_comparable(context: typer.Context) -> None:
    """Raise BadOption if an option is given that has no effect with --compare."""
    sources = {name: context.get_parameter_source(name) for name in ("scheduler", "store", "out")}
    given = [f"--{name}" for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if given:
        raise Unusable(
            "--compare",
            f"it plans with every scheduler and writes no file, and {' and '.join(given)} was given too",
            "Use --compare with a profile, one goal and --memory-bytes only",
        )


def listing(scheduler: str | None, width: int) -> str:
    """Return all schedulers by group, or the options and the source of one scheduler."""
    found = {one.name: one for one in planning.available()}
    if scheduler is None:
        return table(tuple(found.values()), width)
    name, _ = schedulers.parse_spec(scheduler, "plan")
    one = found[name]
    options = ", ".join(f"{option}={default}" for option, default in one.options.items())
    lines = [one.summary, f"needs: {one.needs or 'any profile'}", f"options: {options or 'none'}"]
    return "\n".join([name, *(f"  {line}" for line in [*lines, f"source: {one.source}"])])


def table(found: tuple[planning.Scheduler, ...], width: int) -> str:
    """Return the schedulers by group, with the measurements that they need and their PSNR on the demo models."""
    models = sorted({model for one in found for model in one.demo_db})
    rules = schedulers.rules()
    rows = [("", "needs", " / ".join(models), ""), *(_row(one, models) for one in found)]
    columns = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    columns[0] = max(columns[0], *map(len, rules))

    def line(row: tuple[str, str, str, str]) -> str:
        head = "  ".join(["", *(text.ljust(length) for text, length in zip(row[:3], columns, strict=True))])
        indent = len(head) + 2 if width - len(head) - 2 >= LEAST_ROOM else 6  # in a narrow window, on the next line
        text = textwrap.wrap(row[3], width - indent, break_on_hyphens=False)
        first = [f"{head}  {text.pop(0)}"] if text and indent > 6 else [head.rstrip()]
        return "\n".join([*first, *(" " * indent + part for part in text)])

    about = (
        f"PSNR on the demo models in dB, {planning.DEMO_STEPS}. Start with {DEFAULT}. With the pipeline at hand, "
        "diffcache.optimize fits the plan to full runs and reaches more. Options and source of one: "
        "diffcache plan --list --scheduler NAME"
    )
    lines = [*textwrap.wrap(about, width, break_on_hyphens=False), "", line(rows[0])]
    for group in schedulers.GROUPS:
        lines += ["", group, *(line(_row(one, models)) for one in found if one.group == group)]
    lines += ["", 'without a profile: accelerate(pipe, "uniform:every=2")']
    return "\n".join([*lines, *(line((name, "", "", _summary(name))) for name in rules)])


def comparison(found: list[planning.Compared]) -> str:
    """Return the results of all schedulers for one profile, best first."""
    column = max(len(one.name) for one in found)
    lines = []
    for one in found:
        if one.schedule is None:
            text = f"cannot plan: {one.reason}"
        elif one.schedule.expected is None:
            text = "planned; the final state of such a schedule is not simulated"
        else:
            text = str(one.schedule.expected)
        lines.append(f"{one.name.ljust(column)}  {text}")
    return "\n".join(lines)


def _row(one: planning.Scheduler, models: list[str]) -> tuple[str, str, str, str]:
    decibels = (f"{one.demo_db[model]:.1f}" if model in one.demo_db else "–" for model in models)
    return one.name, one.needs or "any profile", " / ".join(decibels), one.summary


def _summary(name: str) -> str:
    return (registry.load(schedulers.__name__, name).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
