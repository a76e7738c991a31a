"""The ``diffcache`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffcache.errors import DiffCacheError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Training-free feature caching for diffusion models."
)


@app.callback()
def command() -> None:
    """Training-free feature caching for diffusion models."""


@app.command()
def demo(
    model: Annotated[
        Literal["flux", "dit"], typer.Option(help="flux: text to picture, no guidance; dit: class to picture, guided.")
    ] = "flux",
    out: Annotated[Path, typer.Option(help="Folder for pictures, table, schedules and results.")] = Path(
        "diffcache-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures and a short search: under a minute.")] = False,
) -> None:
    """Calibrate, plan and accelerate a small trained model that comes with the package, and show what it cost."""
    from diffcache.demo import Size, run_demo, show  # torch and diffusers load only now

    rows = run_demo(model, out, Size.quick() if quick else Size())
    typer.echo("\n" + show.table(rows))
    typer.echo(f"\nPictures, table, schedules and results: {out.resolve()}")
    typer.echo(
        'Your own pipeline, without calibration:  pipe = diffcache.accelerate(pipe, "taylor:every=3,order=1")\n'
        "and with it:  pipe = diffcache.accelerate(pipe, diffcache.optimize(pipe, calls, computed_steps=12))"
    )


def main() -> None:
    """Entry point: errors of this library are one line, not a traceback."""
    try:
        app()
    except DiffCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
