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
        help="Samples: .txt, one prompt per line; .csv, one column per argument of the pipeline; .jsonl, one object "
        "with arguments per line. The argument `seed` is the seed of the sample."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampling loop.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's default.")]
Pixels = Annotated[int | None, typer.Option(help="Height or width of the pictures in pixels.")]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds of every prompt (0,1,2), or the number of different seeds (4). Default: one.")
]
Batch = Annotated[int, typer.Option(help="Samples per batch.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 (fp16) or bfloat16 (bf16). Default for a folder: bfloat16; on the CPU, float32."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default for a folder: cuda if available.")]
