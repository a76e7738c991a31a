"""``diffcache profile``: run a pipeline in full on some prompts, and save the measurements that schedulers need."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from diffcache.cli import _samples
from diffcache.cli._options import (
    Batch,
    Calibrating,
    Device,
    Dtype,
    Extra,
    Guidance,
    LaterSteps,
    Model,
    Pixels,
    Seeds,
)
from diffcache.documents.destinations import check_file, check_folder
from diffcache.documents.token_profile import TokenProfile
from diffcache.errors import BadOption, Unusable


def profile(
    model: Model,
    prompts: Calibrating = None,
    steps: LaterSteps = None,
    guidance: Guidance = None,
    height: Pixels = None,
    width: Pixels = None,
    call: Extra = None,
    seeds: Seeds = None,
    batch: Batch = 1,
    sites: Annotated[
        str, typer.Option(help="Sites to measure: model, stack, block, sublayer, separated by commas.")
    ] = "model",
    influence_steps: Annotated[
        int, typer.Option(help="Number of steps at which the influence of inner sites is measured; 0 for none.")
    ] = 4,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Output file of the profile.")] = Path("profile.safetensors"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps every measured call. Default: one next to --out, removed at the end."),
    ] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Keep no measured calls on the way.")] = False,
) -> None:
    """Measure a pipeline in full runs, for diffcache plan. A stopped measurement goes on; torchrun shares it.

    Give 16 prompts or more. Steps, size and guidance must equal those of later use.
    With the pipeline at hand, diffcache optimize reaches more.

    Example:
        diffcache profile my-flux --prompts prompts.txt --steps 28
        diffcache plan profile.safetensors --computed 10
    """
    check_file("out", out)
    if resume and no_resume:
        raise BadOption("resume", str(resume), "either --resume or --no-resume")
    if resume:
        check_folder("resume", resume)
    folder = None if no_resume else resume or out.with_name(f"{out.name}.parts")
    if folder and not resume and folder.is_symlink():
        raise Unusable(
            "out",
            f"{folder}, the folder for measured calls, is a symbolic link",
            "Remove the link, choose another file for --out, or pass --no-resume",
        )
    if influence_steps < 0:
        raise BadOption("influence_steps", influence_steps, "0 or more")
    options = _samples.options(call, steps=steps, guidance=guidance, height=height, width=width)
    rows = _samples.read(prompts) if prompts else None

    from diffcache.cli import _calls, _models  # imports torch and diffusers
    from diffcache.profiling import measure
    from diffcache.profiling.recording import granularities

    granularities(sites)  # raises for wrong names before a model is loaded
    asked = _calls.Asked(rows, prompts, seeds, batch, options)
    found_model = _models.named(model, dtype, device)
    asked.check(found_model)
    loaded = found_model.load()
    calls = asked.calls(loaded)

    found = measure(
        loaded.pipe,
        calls,
        sites=sites,
        influence=influence_steps > 0,
        influence_steps=max(influence_steps, 1),
        resume=folder,
        progress=True,
    )
    notes = {"model": model} | ({"prompts": prompts.name} if prompts else {}) | ({"seeds": seeds} if seeds else {})
    found = dataclasses.replace(found, provenance={**found.provenance, **notes})
    if not _models.is_first_process():
        return
    found.save(out)
    if folder and not resume:
        shutil.rmtree(folder)
    typer.echo(found.describe())
    typer.echo(f"written to {out}")
    if isinstance(found, TokenProfile):  # its plans are made by optimize
        return
    third = ["--computed", str(max(1, found.steps // 3))]
    typer.echo("\nPlan a schedule from it, or compare all schedulers:")
    for words in (third, [*third, "--compare"]):
        typer.echo(f"  {shlex.join(['diffcache', 'plan', str(out), *words])}")
