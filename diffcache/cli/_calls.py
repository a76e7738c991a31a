"""From samples to calls of a pipeline: seeds, batches, and the arguments that all of them share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffcache import host
from diffcache.cli._models import Call, Loaded
from diffcache.cli._samples import READERS, Row
from diffcache.errors import BadOption, UnknownName

OWN = ("class_labels", "seed")  # what every sample has its own of, beside prompts, their embeddings and masks


def seeds_of(text: str | None, row: int) -> list[int]:
    """Seeds of one row: those of a list ``"0,1,2"``; of a count, as many that no other row has; of nothing, one."""
    if text is None:
        return [row]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in text and numbers[0] < 1):
        raise BadOption("seeds", text, "a list like 0,1,2 or how many each prompt gets, like 4")
    return numbers if "," in text else [row * numbers[0] + n for n in range(numbers[0])]


def asked(
    loaded: Loaded,
    rows: Sequence[Row] | None,
    seeds: str | None,
    batch: int,
    options: Mapping[str, Any],
    *,
    decoded: bool = False,
) -> list[Call]:
    """The calls that a command is to make: those that came with the pipeline; else of the rows, or of what the pipeline
    has to offer.

    options  shared arguments; ``num_inference_steps`` must be among them unless every row says its own
    decoded  whether anybody looks at what comes out

    Raises BadOption, UnknownName.
    """
    if loaded.calls is not None:
        if rows or any(value is not None for value in (*options.values(), seeds)):
            raise BadOption("model", "a function", "no --prompts, --seeds and the like: it brings calls of its own")
        return [dict(call) for call in loaded.calls]
    rows = rows or [dict(sample) for sample in loaded.samples]
    if not rows:
        raise BadOption("prompts", None, f"a file that ends in {READERS}")
    steps = options.get("num_inference_steps")
    if (steps is None and not all("num_inference_steps" in row for row in rows)) or (steps is not None and steps < 1):
        raise BadOption("steps", steps, "1 or more")
    return calls_of(loaded, rows, seeds, batch, options, decoded=decoded)


def calls_of(
    loaded: Loaded,
    rows: Sequence[Row],
    seeds: str | None,
    batch: int,
    shared: Mapping[str, Any],
    *,
    decoded: bool = False,
) -> list[Call]:
    """Calls of up to ``batch`` samples each, one generator a sample. Samples in one call agree in all that is not
    their own. ``shared``: arguments for all, None where not given; a row's own go first. Raises BadOption, UnknownName.
    """
    if batch < 1:
        raise BadOption("batch", batch, "1 or more")
    common = {name: value for name, value in shared.items() if value is not None}
    samples = [
        common | row | {"seed": seed}
        for n, row in enumerate(rows)
        for seed in ([row["seed"]] if "seed" in row else seeds_of(seeds, n))
    ]
    calls = (loaded.prepare(_call(loaded.pipe, group)) for group in _groups(samples, batch))
    return [_checked(loaded.pipe, call, decoded) for call in calls]


def _groups(samples: Sequence[Row], batch: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for sample in samples:
        if group and (len(group) == batch or _common(sample) != _common(group[0])):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _common(sample: Row) -> tuple[set[str], Row]:
    """What samples of one call agree in: which arguments there are, and those that are not a sample's own."""
    return set(sample), {name: value for name, value in sample.items() if not _own(name)}


def _own(name: str) -> bool:
    return name in OWN or name.startswith(("prompt", "negative_prompt")) or name.endswith(("_embeds", "_mask"))


def _call(pipe: Any, group: Sequence[Row]) -> Call:
    call = {name: value for name, value in group[0].items() if not _own(name)}
    for name in (name for name in group[0] if _own(name)):
        values = [sample[name] for sample in group]
        if name == "seed":
            call["generator"] = [_generator(seed) for seed in values]
        else:
            call[name] = _tensor(pipe, name, values) if any(isinstance(v, list) for v in values) else values
    return call


def _generator(seed: object) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise BadOption("seed", seed, "a whole number, 0 or more")
    return torch.Generator().manual_seed(seed)  # of the CPU: the same noise on every device


def _tensor(pipe: Any, name: str, values: Sequence[object]) -> torch.Tensor:
    """Embeddings and masks of several samples, in the type and on the device of the network."""
    try:
        tensor = torch.tensor(values)
    except (TypeError, ValueError) as error:
        raise BadOption(
            name, "of several shapes or kinds", f"lists of numbers, alike in all samples ({error})"
        ) from None
    like = next(next(iter(host.denoisers(pipe).values())).parameters())
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _checked(pipe: Any, call: Call, decoded: bool) -> Call:
    """The call, if the pipeline takes all of it; what nobody looks at need not be decoded."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    known = [name for name in parameters if name != "self"]
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for name in call:
            if name not in known:
                raise UnknownName(f"argument of {type(pipe).__name__}", name, known)
    return ({"output_type": "latent"} if "output_type" in known and not decoded else {}) | call
