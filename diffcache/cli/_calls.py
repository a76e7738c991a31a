"""From samples to calls of a pipeline: seeds, batches, and the arguments that all of them share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcache import host
from diffcache.cli._models import Call, Loaded, Named
from diffcache.cli._samples import READERS, Row
from diffcache.errors import BadOption, UnknownName

STEPS = "num_inference_steps"
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command is to call a pipeline with, as the user said it.

    rows     of the file with prompts; None: what the model itself has to offer
    source   that file
    options  arguments that all calls share, None where not given
    """

    rows: Sequence[Row] | None
    source: Path | None
    seeds: str | None
    batch: int
    options: Mapping[str, Any]

    @property
    def shared(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if value is not None}

    def check(self, model: Named) -> None:
        """Raise BadOption or UnknownName for what can be known to be wrong before ``model`` is loaded."""
        if model.kind == "pretrained" and not self.rows:
            raise BadOption("prompts", None, f"a file that ends in {READERS}")
        rows = self.rows or [{}]
        if model.kind != "function" or self.rows or self.shared.get(STEPS) is not None:
            self._check_steps(rows)
        for call in _drawn(rows, self.seeds, self.batch, self.shared):
            host.check_values(call, "a row of the prompts" if self.rows else "the options")
        if model.pipeline is not None:
            for row in rows:
                self._check_names(model.pipeline, row)

    def calls(self, loaded: Loaded, *, decoded: bool = False) -> list[Call]:
        """Return the calls: those that came with the pipeline; else of the rows, or of what the pipeline has to offer.

        decoded  whether something looks at what comes out

        Raises BadOption, UnknownName.
        """
        if loaded.calls is not None:
            if self.rows or self.shared or self.seeds is not None:
                raise BadOption("model", "a function", "no --prompts, --seeds and the like: it brings calls of its own")
            host.check_calls(host.adopted(loaded.pipe), loaded.calls)
            return [dict(call) for call in loaded.calls]
        rows = self.rows or [dict(sample) for sample in loaded.samples]
        if not rows:
            raise BadOption("prompts", None, f"a file that ends in {READERS}")
        self._check_steps(rows)
        return calls_of(loaded, rows, self.seeds, self.batch, self.options, decoded=decoded)

    def _check_steps(self, rows: Sequence[Row]) -> None:
        steps = self.options.get(STEPS)
        if (steps is None and not all(STEPS in row for row in rows)) or (steps is not None and steps < 1):
            raise BadOption("steps", steps, "1 or more")

    def _check_names(self, pipeline: type, row: Row) -> None:
        known = host.arguments_of_class(pipeline)
        for name in ({**self.shared, **row}.keys() - {"seed"}) if known is not None else ():
            if known is not None and name not in known:
                where = f"It is a column of {self.source}." if name in row else "It is an option of this command."
                if name == "prompt" and "class_labels" in known:
                    where = "This model draws classes: give it a .csv file with a column class_labels."
                raise UnknownName(f"argument of {pipeline.__name__}", name, tuple(known), next_step=where)


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
    common = {name: value for name, value in shared.items() if value is not None}
    like = (
        next(next(iter(host.denoisers(loaded.pipe).values())).parameters())
        if hasattr(loaded.pipe, "scheduler")
        else None
    )
    calls = (loaded.prepare(_on(call, like)) for call in _drawn(rows, seeds, batch, common))
    return [_checked(loaded.pipe, call, decoded) for call in calls]


def _drawn(rows: Sequence[Row], seeds: str | None, batch: int, shared: Mapping[str, Any]) -> list[Call]:
    """The calls as they can be made without a pipeline."""
    if batch < 1:
        raise BadOption("batch", batch, "1 or more")
    samples = [
        dict(shared) | row | {"seed": seed}
        for n, row in enumerate(rows)
        for seed in ([row["seed"]] if "seed" in row else seeds_of(seeds, n))
    ]
    return [_call(group) for group in _groups(samples, batch)]


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


def _call(group: Sequence[Row]) -> Call:
    call = {name: value for name, value in group[0].items() if not _own(name)}
    for name in (name for name in group[0] if _own(name)):
        values = [sample[name] for sample in group]
        if name == "seed":
            call["generator"] = [_generator(seed) for seed in values]
        else:
            call[name] = _tensor(name, values) if any(isinstance(v, list) for v in values) else values
    return call


def _generator(seed: object) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise BadOption("seed", seed, "a whole number, 0 or more")
    return torch.Generator().manual_seed(seed)  # of the CPU: the same noise on every device


def _tensor(name: str, values: Sequence[object]) -> torch.Tensor:
    """Embeddings and masks of several samples."""
    try:
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadOption(
            name, "of several shapes or kinds", f"lists of numbers, alike in all samples ({error})"
        ) from None


def _on(call: Call, like: torch.Tensor | None) -> Call:
    """The call with its tensors in the type and on the device of the network."""

    def moved(value: Any) -> Any:
        if like is None or not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return {name: moved(value) for name, value in call.items()}


def _checked(pipe: Any, call: Call, decoded: bool) -> Call:
    """The call, if the pipeline takes all of it; what nothing looks at need not be decoded."""
    known = host.arguments_of_class(type(pipe)) or {}
    for name in call if known else ():
        if name not in known:
            raise UnknownName(f"argument of {type(pipe).__name__}", name, tuple(known))
    accepts = inspect.signature(type(pipe).__call__).parameters
    return ({"output_type": "latent"} if "output_type" in accepts and not decoded else {}) | call
