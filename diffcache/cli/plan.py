"""``diffcache plan``: from a profile and a budget to a schedule. No network is called."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from diffcache import planning
from diffcache._outputs import check_file
from diffcache.budget import Budget
from diffcache.errors import BadOption
from diffcache.profile import Profile


def plan(
    profile: Annotated[Path | None, typer.Argument(help="A profile, as `diffcache profile` writes it.")] = None,
    scheduler: Annotated[
        str, typer.Option(help="Name of a scheduler, options behind a colon: path:gamma=4. See --list.")
    ] = "closed_loop",
    steps: Annotated[float | None, typer.Option(help="Goal: as many computed steps.")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Goal: the sampling loop so many times faster, by the profile's clock.")
    ] = None,
    max_error_db: Annotated[
        float | None, typer.Option(help="Goal: as few computed steps as keep this expected PSNR of the final state.")
    ] = None,
    memory_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of kept outputs, for the batch that was profiled.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Format of kept outputs: bf16, int8, fp8, int4; auto: for each site the one with which all fit into "
            "--memory-bytes at the least error. Without it, as they are."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File of the schedule.")] = Path("schedule.safetensors"),
    list_: Annotated[bool, typer.Option("--list", help="List the schedulers, and stop.")] = False,
) -> None:
    """Plan a schedule from a profile: which steps are computed, and how the others are predicted."""
    if list_:
        typer.echo(table(planning.available(), shutil.get_terminal_size().columns))
        return
    if profile is None:
        raise BadOption("profile", None, "the file of a profile, or --list")
    goals = {"--steps": steps, "--speedup": speedup, "--max-error-db": max_error_db}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise BadOption("budget", " and ".join(given) or "no goal", f"exactly one of {', '.join(goals)}")
    check_file("out", out)
    planning.check_scheduler(scheduler)
    budget = Budget(computed_steps=steps, speedup=speedup, max_error_db=max_error_db, memory_bytes=memory_bytes)
    schedule = planning.plan(Profile.load(profile), scheduler, budget, store=store)
    typer.echo(schedule.describe())
    typer.echo(f"written to {schedule.save(out)}")


def table(schedulers: tuple[planning.Scheduler, ...], width: int) -> str:
    """What each is, its options with their defaults, and where it comes from."""
    column = max(len(found.name) for found in schedulers) + 2
    room = min(max(width - column, 40), 100)
    blocks = []
    for found in schedulers:
        options = [name if value is None else f"{name}={value}" for name, value in found.options.items()]
        lines = [found.summary, f"options: {', '.join(options) or 'none'}", f"source: {found.source}"]
        wrapped = "\n".join(
            part for line in lines for part in textwrap.wrap(line, room, subsequent_indent="  ", break_on_hyphens=False)
        )
        blocks.append(found.name.ljust(column) + textwrap.indent(wrapped, " " * column).lstrip())
    return "\n\n".join(blocks)
