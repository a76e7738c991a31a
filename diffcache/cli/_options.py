"""Options that are common to several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from diffcache.errors import BadOption

T = TypeVar("T")

UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base ** (n + 1) for kind, base in (("b", 1000), ("ib", 1024)) for n, letter in enumerate("kmgt")
}


Model = Annotated[
    str,
    typer.Argument(
        help="A folder or an id on the Hub; demo:flux, demo:flux-guided or demo:dit; or package.module:function of "
        "yours, which returns a pipeline, or a pipeline and calls: dictionaries of its arguments."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="What to ask for: .txt, a prompt a line; .csv, a column for each argument of the pipeline; .jsonl, an "
        "object with arguments a line; .safetensors, embeddings such as prompt_embeds, a row for each prompt. An "
        "argument `seed` is the sample's own."
    ),
]
Calibrating = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="16 prompts or more, like those that you will use: .txt, a prompt a line; .csv, a column for each "
        "argument of the pipeline; .jsonl, an object with arguments a line; .safetensors, embeddings such as "
        "prompt_embeds, a row for each prompt. An argument `seed` is the sample's own.",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps: num_inference_steps of the pipeline.")]
LaterSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Sampling steps: num_inference_steps of the pipeline. The schedule serves runs with the same steps, size "
        "and guidance.",
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale: guidance_scale of the pipeline. Its own if not given.")
]
Pixels = Annotated[int | None, typer.Option(help="Of the pictures, in pixels. The pipeline's own if not given.")]
Extra = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        metavar="NAME=VALUE",
        help="Another argument of the pipeline, the same in all calls: true_cfg_scale=4. May be repeated.",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds of every prompt (0,1,2), or the number of different seeds (4). Default: one.")
]
Batch = Annotated[int, typer.Option(help="Samples per batch.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="fp32, fp16 or bf16 (or float32, float16, bfloat16). Of a folder: bf16, on the CPU fp32."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Of a folder: cuda where there is one.")]

Computed = Annotated[
    float | None, typer.Option(help="Goal: this number of computed steps. The other steps are predicted.")
]
Speedup = Annotated[
    float | None, typer.Option(help="Goal: the sampling loop so many times faster, by the measured seconds.")
]
MinPsnr = Annotated[
    float | None,
    typer.Option(
        "--min-psnr-db", help="Goal: as few computed steps as keep this expected PSNR of the final state, in dB."
    ),
]
MaxErrorDb = Annotated[float | None, typer.Option("--max-error-db", hidden=True)]  # the old name of --min-psnr-db
Memory = Annotated[
    str | None,
    typer.Option(help="Most memory for kept outputs, at the batch size of the calibration: 500MB, 2GiB, or bytes."),
]
MemoryBytes = Annotated[str | None, typer.Option("--memory-bytes", hidden=True)]  # the old name of --memory


def either(name: str, value: T | None, alias: str, other: T | None) -> T | None:
    """Return the value of an option that may also be given under an old name.

    Raises:
        BadOption: If it is given under both names.
    """
    if value is not None and other is not None:
        raise BadOption(name.lstrip("-"), f"{value} and {alias} {other}", f"{name} alone: {alias} is its old name")
    return other if value is None else value


def size_in_bytes(text: str) -> int:
    """Return the number of bytes that a size such as "500MB", "2GiB" or "4096" means.

    Raises:
        BadOption: If the text is not a size.
    """
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        size = float(number) * UNITS[unit]
        return int(size)
    except (ValueError, KeyError, OverflowError):
        raise BadOption("memory", text, "a size such as 500MB or 2GiB, or a number of bytes") from None
