"""``diffcache show``: print and draw a schedule, a schedule set or a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from diffcache.documents import collection, container
from diffcache.documents.destinations import check_file
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule, SitePlan
from diffcache.documents.schedule_set import ScheduleSet
from diffcache.documents.token_profile import TokenProfile
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import DocumentError, Unusable


def show(
    file: Annotated[Path, typer.Argument(help="A schedule, a schedule set or a profile, of a language model too.")],
    coefficients: Annotated[
        bool, typer.Option("--coefficients", help="Also the coefficients of every predicted step.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it and write this picture: .png, .svg, .pdf.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Draw a schedule's masks over the distances that this profile measured.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of a schedule set, only the schedule for this number of steps.")
    ] = None,
) -> None:
    """Print a schedule (masks, coefficients, expected fidelity), all schedules of a set, or a profile, and draw it.

    Example:
        diffcache show schedule.safetensors
        diffcache show schedule.safetensors --profile profile.safetensors --plot schedule.png
        diffcache show schedules.safetensors --steps 28 --plot schedule.png
    """
    if (file / "model_index.json").is_file():
        raise Unusable("file", f"the folder {file} holds a diffusers pipeline", "Pass a schedule or a profile")
    if plot is not None:
        check_file("plot", plot)
    document = read_document(file)
    if steps is not None:
        if not isinstance(document, ScheduleSet):
            raise Unusable("--steps", f"{file} is not a schedule set", "Leave out --steps")
        document = document[steps]
    if isinstance(document, (TokenSchedule, TokenProfile)):
        for name, given in (("--coefficients", coefficients), ("--plot", plot), ("--profile", profile)):
            if given:
                why = f"{file} is of a language model, which {name} does not support"
                raise Unusable(name, why, f"Leave out {name}")
        typer.echo(document.describe())
        return
    if isinstance(document, Profile) and (coefficients or profile):
        raise Unusable(
            "file", f"{file} is a profile, and --coefficients and --profile need a schedule", "Pass a schedule"
        )
    if isinstance(document, ScheduleSet) and plot is not None:
        example = f"Choose one: --steps {next(iter(document))}"
        raise Unusable("--plot", f"{file} holds schedules for {document.covered} steps", example)
    if profile is not None and plot is None:
        raise Unusable("--profile", "it has an effect only with --plot", "Add --plot FILE, or leave out --profile")
    typer.echo(document.describe())
    if coefficients:
        _print_coefficients(document)
    if plot is not None and not isinstance(document, ScheduleSet):
        from diffcache.planning import plots

        beside = Profile.load(profile) if profile else None
        typer.echo(f"drawn into {plots.save(document, plot, beside)}")


def read_document(file: Path) -> CacheSchedule | ScheduleSet | TokenSchedule | Profile | TokenProfile:
    """Return the document in a file: a schedule, a schedule set or a profile, of pictures or of a language model."""
    if container.format_in(file) == TokenProfile.FORMAT:
        return TokenProfile.load(file)
    try:
        return collection.read_schedules(file)
    except DocumentError as error:
        if error.field != "format":
            raise
    return Profile.load(file)


def _print_coefficients(document: CacheSchedule | ScheduleSet | Profile) -> None:
    """Print the coefficients of a schedule, or of each schedule of a set."""
    schedules = document.schedules.values() if isinstance(document, ScheduleSet) else [document]
    for schedule in schedules:
        if isinstance(schedule, CacheSchedule):
            of = f"{schedule.steps} steps, " if isinstance(document, ScheduleSet) else ""
            for denoiser, site, plan in schedule.plans():
                typer.echo(f"\n{of}{denoiser} {site}\n{table(plan)}")


def table(plan: SitePlan) -> str:
    """Return the coefficients of equation (1) at every predicted step.

    The columns are w for the newest outputs, and v for their inputs, κ, s and b if the plan has them.
    """
    branches, anchors = len(plan.weights), plan.anchors
    computed, before = np.flatnonzero(plan.compute), np.cumsum(plan.compute)
    heads = ["step", *(["branch"] if branches > 1 else []), "newest", *(f"w{k}" for k in range(anchors))]
    more = {"κ": plan.kappa, "s": plan.scale, "b": plan.bias}
    heads += [f"v{k}" for k in range(anchors)] if plan.inputs is not None else []
    heads += [head for head, array in more.items() if array is not None]
    rows = []
    for step in np.flatnonzero(~plan.compute):
        kept = int(before[step])
        newest = int(computed[kept - 1])
        for branch in range(branches):
            weights = [
                _number(array[branch, step, k]) if k < kept else ""
                for array in (plan.weights, plan.inputs)
                if array is not None
                for k in range(anchors)
            ]
            others = [_number(array[branch, step]) for array in more.values() if array is not None]
            rows.append([str(step), *([str(branch)] if branches > 1 else []), str(newest), *weights, *others])
    if not rows:
        return "  every step is computed"
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows])
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _number(value: np.ndarray | float) -> str:
    """Return one coefficient; for one per channel, the least and the greatest."""
    low, high = np.min(value), np.max(value)
    return f"{low:.4g}" if np.ndim(value) == 0 else f"{low:.4g} to {high:.4g}"
