"""Read the arguments of samples, one row each, from a text, CSV, JSON Lines or safetensors file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcache.documents import files
from diffcache.errors import BadOption, DocumentError, Unusable

Row = dict[str, Any]  # arguments of the pipeline for one sample

READERS = ".txt, .csv, .jsonl, .safetensors"
OWN = ("class_labels", "latents", "seed")  # arguments per sample, in addition to prompts, their embeddings and masks


def per_sample(name: str) -> bool:
    """Return whether an argument has a value for each sample. All samples of a call agree in the other arguments."""
    return name in OWN or name.startswith(("prompt", "negative_prompt")) or name.endswith(("_embeds", "_mask"))


def options(
    more: Sequence[str] | None,
    *,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """Return the arguments that all calls share. None: not given.

    Args:
        more: Further arguments as NAME=VALUE; a value that is JSON is parsed.
        steps: Value of num_inference_steps.
        guidance: Value of guidance_scale.
        height: Height of the pictures in pixels.
        width: Width of the pictures in pixels.

    Raises:
        BadOption: If a text of ``more`` is not NAME=VALUE, or an argument is given twice.
    """
    found = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    for text in more or ():
        name, mark, value = text.partition("=")
        name = name.strip()
        if not mark or not name.isidentifier():
            raise BadOption("call", text, "NAME=VALUE with an argument of the pipeline: true_cfg_scale=4")
        if found.get(name) is not None:
            raise BadOption("call", text, f"one value for each argument; {name} is given twice")
        found[name] = _value(name, value)
    return found


def read(file: Path) -> list[Row]:
    """Return the rows of a file of samples.

    A ``.txt`` file has a prompt on each line, a ``.csv`` file a column for each argument, a ``.jsonl`` file an object
    on each line. A ``.safetensors`` file has a tensor for each argument, with one row for each sample. Empty lines and
    empty fields of a CSV file are ignored.

    Raises:
        BadOption: If the file cannot be read or has no rows, or a line is not valid. The message names a line that is
            not valid.
    """
    if file.suffix.lower() == ".safetensors":
        return _tensors(file)
    try:
        text = files.read_text(file)
    except DocumentError as error:
        raise BadOption("prompts", str(file), f"a text file that can be read ({error.problem})") from None
    readers = {".txt": _lines, ".csv": _table, ".jsonl": _objects}
    if file.suffix.lower() not in readers:
        raise BadOption("prompts", str(file), f"a file that ends in {READERS}")
    rows = readers[file.suffix.lower()](file, text)
    if not rows:
        raise BadOption("prompts", str(file), "a file with at least one sample in it")
    return rows


def _lines(_: Path, text: str) -> list[Row]:
    return [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]


def _table(file: Path, text: str) -> list[Row]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    names = reader.fieldnames or []
    if not names or not all(name and name.strip() for name in names) or len(set(names)) < len(names):
        raise BadOption("prompts", str(file), "a first line that names each column once")
    for name in names:
        if not name.strip().isidentifier():
            raise Unusable(
                "prompts",
                f"the first line of {file} has {name.strip()!r:.40}, which is not the name of an argument",
                "Name arguments of the pipeline in the first line, such as prompt or class_labels",
            )
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise Unusable(
                "prompts",
                f"line {reader.line_num} of {file} has another number of fields than the first line",
                f"Write {len(names)} fields in each line",
            )
        rows.append({name.strip(): _value(name.strip(), field) for name, field in row.items() if field.strip()})
    return [row for row in rows if row]


def _objects(file: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unusable(
                "prompts",
                f"line {number} of {file} is not valid JSON ({error})",
                "Write one JSON object on each line",
            ) from None
        if not isinstance(row, dict) or not row:
            raise Unusable(
                "prompts",
                f"line {number} of {file} is not a JSON object with arguments",
                'Write one JSON object on each line, such as {"prompt": "a cat"}',
            )
        rows.append(row)
    return rows


def _tensors(file: Path) -> list[Row]:
    """Return the rows of a safetensors file: the first dimension of every tensor counts the samples."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(files.read_bytes(file))
    except DocumentError as error:
        raise BadOption("prompts", str(file), f"a file that can be read ({error.problem})") from None
    except SafetensorError as error:
        raise BadOption("prompts", str(file), f"a safetensors file of embeddings ({error})") from None
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in found.items()}
    for name in found:
        if not per_sample(name) or name in ("seed", "prompt", "negative_prompt"):
            allowed = "embeddings, masks, class_labels or latents: prompt_embeds, pooled_prompt_embeds, …"
            raise BadOption("prompts", f"{file}, with a tensor {name!r:.80}", allowed)
    if not counts or 0 in counts.values() or len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"
        raise BadOption("prompts", f"{file}, with rows: {shown}", "one row for each prompt in every tensor")
    return [{name: tensor[row] for name, tensor in found.items()} for row in range(max(counts.values()))]


def _value(name: str, field: str) -> Any:
    """Return a field of a CSV file: text for prompts, parsed JSON for other fields that are JSON, else text."""
    if name.startswith(("prompt", "negative_prompt")) and not name.endswith(("_embeds", "_mask")):
        return field
    try:
        return json.loads(field.strip().lower() if field.strip().lower() in ("true", "false", "null") else field)
    except (ValueError, RecursionError):
        return field
