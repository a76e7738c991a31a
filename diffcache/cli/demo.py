"""``diffcache demo``: calibrate, plan and evaluate on a model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffcache.documents.destinations import check_folder


def demo(
    model: Annotated[
        Literal["flux", "flux-guided", "dit", "text"],
        typer.Option(
            help="flux: text to picture, no guidance; flux-guided: the same with true classifier-free guidance; dit: "
            "class to picture, guided; text: a masked diffusion language model."
        ),
    ] = "dit",
    out: Annotated[Path, typer.Option(help="Folder for pictures, table, schedules and results.")] = Path(
        "diffcache-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures or prompts, and a short search.")] = False,
) -> None:
    """Calibrate, plan and accelerate a small trained model that comes with the package, and show the results.

    Example:
        diffcache demo --model dit --quick
    """
    check_folder("out", out)
    if model == "text":
        _text(out, quick=quick)
        return
    from diffcache.demo import Size, run_demo, table  # imports torch and diffusers

    found = run_demo(model, out, Size.quick() if quick else Size())
    typer.echo(f"\n{table(found.record)}")
    typer.echo(f"\nOpen {found.report.resolve()} in a browser. In the same folder:")
    typer.echo("pictures.png (the pictures of all methods), table.md (all numbers), and the schedules.")
    typer.echo(
        'Your own pipeline, without calibration:  pipe = diffcache.accelerate(pipe, "auto")\n'
        "and with it:  pipe = diffcache.accelerate(pipe, diffcache.optimize(pipe, calls, 12))"
    )


def _text(out: Path, *, quick: bool) -> None:
    """Run the demo of the text model."""
    from diffcache.demo.text import TextSize, run_text_demo  # imports torch and transformers

    run_text_demo(out, TextSize.quick() if quick else TextSize())
    typer.echo(f"\n{out.resolve()} holds text.txt (this text), the schedules, and a table and a record for each task.")
    typer.echo(
        "Your own model:  loop = diffcache.Loop(model, sample)\n"
        "                 schedule = diffcache.optimize(loop, calls, diffcache.Budget(speedup=3))\n"
        "                 diffcache.accelerate(model, schedule)"
    )
