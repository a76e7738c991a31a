"""Options that are common to the commands that run a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A folder or an id on the Hub; demo:flux or demo:dit; or package.module:function of yours, which returns "
        "a pipeline, or a pipeline and calls: dictionaries of its arguments."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="What to ask for: .txt, a prompt a line; .csv, a column for each argument of the pipeline; .jsonl, an "
        "object with arguments a line. An argument `seed` is the sample's own."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampling loop.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own if not given.")]
Pixels = Annotated[int | None, typer.Option(help="Of the pictures, in pixels.")]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds of every prompt (0,1,2), or the number of different seeds (4). Default: one.")
]
Batch = Annotated[int, typer.Option(help="Samples that run together.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 (fp16) or bfloat16 (bf16). Of a folder: bfloat16, on the CPU float32."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Of a folder: cuda where there is one.")]
