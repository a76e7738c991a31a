"""``diffcache optimize``: run a pipeline in full on some prompts, and search the best schedule within a budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from diffcache.cli import _samples
from diffcache.cli._goal import goal
from diffcache.cli._options import (
    Batch,
    Calibrating,
    Computed,
    Device,
    Dtype,
    Extra,
    Guidance,
    LaterSteps,
    MaxErrorDb,
    Memory,
    MemoryBytes,
    MinPsnr,
    Model,
    Pixels,
    Seeds,
    Speedup,
)
from diffcache.cli._printing import note, use_next
from diffcache.documents.budget import check_seconds
from diffcache.documents.destinations import check_file
from diffcache.errors import Unusable

FEW = 16  # samples; fewer say little about the fidelity of later runs


def optimize(
    model: Model,
    prompts: Calibrating = None,
    steps: LaterSteps = None,
    computed: Computed = None,
    speedup: Speedup = None,
    min_psnr_db: MinPsnr = None,
    max_error_db: MaxErrorDb = None,
    memory: Memory = None,
    memory_bytes: MemoryBytes = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            help="Seconds for the search, after the full runs. Without it, a fixed number of fits: the same schedule "
            "every time.",
        ),
    ] = None,
    guidance: Guidance = None,
    height: Pixels = None,
    width: Pixels = None,
    call: Extra = None,
    seeds: Seeds = None,
    batch: Batch = 1,
    sites: Annotated[
        str, typer.Option(help="What is predicted: model (the whole denoiser), or stack, block, sublayer inside.")
    ] = "model",
    scheduler: Annotated[
        str, typer.Option(help="search, or a scheduler whose decisions are fitted as they are. See plan --list.")
    ] = "search",
    store: Annotated[
        str | None, typer.Option(help="Format of kept outputs: bf16, int8, fp8, int4. Without it, as they are.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="File of the schedule.")] = Path("schedule.safetensors"),
) -> None:
    """Find the best schedule within a budget: run the pipeline in full, then search and fit.

    Give 16 prompts or more. Steps, size and guidance must equal those of later use.

    Example:
        diffcache optimize black-forest-labs/FLUX.1-dev --prompts prompts.txt \\
            --steps 28 --computed 10 --out flux-28-10.safetensors
        diffcache optimize demo:flux --steps 50 --speedup 3
    """
    budget = goal(
        computed=computed,
        speedup=speedup,
        min_psnr_db=min_psnr_db,
        max_error_db=max_error_db,
        memory=memory,
        memory_bytes=memory_bytes,
    )
    check_seconds("time_limit", time_limit)
    check_file("out", out)
    options = _samples.options(call, steps=steps, guidance=guidance, height=height, width=width)
    rows = _samples.read(prompts) if prompts else None

    from diffcache import host
    from diffcache.cli import _calls, _models  # imports torch and diffusers
    from diffcache.profiling.calibration.optimizing import optimize as search
    from diffcache.profiling.calibration.requests import check_method
    from diffcache.profiling.recording import granularities

    inside = granularities(sites)[-1] != "model"
    if inside and time_limit is not None:
        raise Unusable("--time-limit", f"--sites {sites} needs no search", "Leave out --time-limit")
    check_method(budget, scheduler=scheduler, sites=sites, store=store)
    asked = _calls.Asked(rows, prompts, seeds, batch, options)
    found_model = _models.named(model, dtype, device)
    asked.check(found_model)
    if found_model.kind != "function" and steps is not None:
        budget.check(found_model.planned(steps) or steps, whole=not inside and scheduler == "search")
    loaded = found_model.load()
    calls = asked.calls(loaded)
    count = sum(_calls.samples_in(call) for call in calls)
    if count < FEW:
        note(f"{count} samples. With {FEW} or more, later runs are as close as this schedule expects.")

    found = search(
        loaded.pipe,
        calls,
        budget,
        scheduler=scheduler,
        time_limit_s=time_limit,
        sites=sites,
        store=store,
        progress=True,
    )
    notes = {"model": model} | ({"prompts": prompts.name} if prompts else {}) | ({"seeds": seeds} if seeds else {})
    found = dataclasses.replace(found, provenance={**found.provenance, **notes})
    typer.echo(found.describe())
    typer.echo(f"written to {found.save(out)}")
    given = {"--steps": steps, "--guidance": guidance, "--height": height, "--width": width}
    same = [word for name, value in given.items() if value is not None for word in (name, f"{value:g}")]
    same += [word for text in call or () for word in ("--call", text)]
    others = [] if prompts is None else ["--prompts", f"other-prompts{prompts.suffix}"]
    if host.traits(host.adopted(loaded.pipe)).plays_episodes:
        use_next(out, ["diffcache", "eval", "policy", model, str(out)], variable="policy", seen="observations")
    else:
        use_next(out, ["diffcache", "eval", "run", model, str(out), *others, *same])
