"""Make the calls of a pipeline from samples: seeds, batches, and the arguments that all calls share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcache import host
from diffcache.cli._models import Call, Loaded, Named
from diffcache.cli._samples import READERS, Row, per_sample
from diffcache.errors import BadOption, UnknownName, Unusable

STEPS = "num_inference_steps"
ENCODERS = ("text_encoder", "tokenizer")  # the beginnings of names of components that encode text
TEXTS = {f"{sign}prompt{number}" for sign in ("", "negative_") for number in ("", "_2", "_3", "_4")}


def seeds_of(text: str | None, row: int) -> list[int]:
    """Return the seeds of one row.

    Args:
        text: A list ``"0,1,2"``, a count of seeds per row, or None for one seed. Seeds from a count or from None differ
            between rows.
        row: Number of the row.

    Raises:
        BadOption: If the text is neither a list nor a count.
    """
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
    """The arguments that a command received for the calls of a pipeline.

    Attributes:
        rows: Rows of the file with prompts. None: the samples that the model offers.
        source: The file with prompts.
        seeds: A list or a count of seeds, as ``seeds_of`` takes it.
        batch: Number of samples that run together.
        options: Arguments that all calls share. None: not given.
    """

    rows: Sequence[Row] | None
    source: Path | None
    seeds: str | None
    batch: int
    options: Mapping[str, Any]

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that all calls share and that were given."""
        return {name: value for name, value in self.options.items() if value is not None}

    def check(self, model: Named, *, decoded: bool = False) -> None:
        """Check everything that can be checked before ``model`` is loaded.

        Args:
            model: The model.
            decoded: Whether the outputs are used, so that they must be decoded.

        Raises:
            BadOption: If an argument has a wrong value, or the prompts are missing.
            UnknownName: If the pipeline has no such argument.
        """
        if model.kind == "pretrained" and not self.rows:
            raise BadOption("prompts", None, f"a file that ends in {READERS}")
        if decoded and "vae" in model.absent:
            raise BadOption("model", model.name, "a pipeline with its vae: pictures are compared. This one has none")
        rows = self.rows or [{}]
        if model.kind != "function" or self.rows or self.shared.get(STEPS) is not None:
            self._check_steps(rows)
        for call in _drawn(rows, self.seeds, self.batch, self.shared):
            host.check_values(call, "a row of the prompts" if self.rows else "the options")
        if model.pipeline is not None:
            for row in rows:
                self._check_names(model.pipeline, row)
                self._check_encoders(model, model.pipeline, row)

    def calls(self, loaded: Loaded, *, decoded: bool = False) -> list[Call]:
        """Return the calls that came with the pipeline, or the calls for the rows.

        Without rows, they are for the samples that the model offers.

        Args:
            loaded: The pipeline.
            decoded: Whether the outputs are used, so that they must be decoded.

        Raises:
            BadOption: If an argument has a wrong value, or the prompts are missing.
            UnknownName: If the pipeline has no such argument.
        """
        if loaded.calls is not None:
            if self.rows or self.shared or self.seeds is not None:
                raise Unusable(
                    "model",
                    "it is a function that returns its own calls, and arguments of calls were given too",
                    "Leave out the prompts, --seeds and the other arguments of calls",
                )
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

    def _check_encoders(self, model: Named, pipeline: type, row: Row) -> None:
        """Raise BadOption if a row has text, or no embeddings, for a pipeline that is saved without text encoders."""
        absent = [name for name in model.absent if name.startswith(ENCODERS)]
        encoders = [name for name in {*model.classes, *model.absent} if name.startswith(ENCODERS[0])]
        known = host.arguments_of_class(pipeline) or {}
        needed = [name for name in known if name.endswith("_embeds") and "prompt" in name]
        if not needed or not encoders or not set(encoders) <= set(absent):
            return
        given = {**self.shared, **row}
        texts = [name for name in given if name in TEXTS]
        if texts or not set(needed) & given.keys():
            plain = [name for name in needed if not name.startswith("negative")]
            guided = [name for name in needed if name.startswith("negative")]
            allowed = f"a .safetensors file with {', '.join(plain)}, one row for each prompt"
            if guided:
                allowed += f"; where negative prompts guide, with {', '.join(guided)} too"
            found = f"{texts[0]} as text" if texts else "no embeddings"
            raise BadOption("prompts", f"{found}, for a pipeline that is saved without {', '.join(absent)}", allowed)

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
    """Return calls of up to ``batch`` samples each, with one generator for each sample.

    The samples of a call agree in all arguments that are not per sample.

    Args:
        loaded: The pipeline.
        rows: Arguments of one sample each.
        seeds: A list or a count of seeds, as ``seeds_of`` takes it.
        batch: Number of samples that run together.
        shared: Arguments for all calls. None: not given. The arguments of a row replace them.
        decoded: Whether the outputs are used, so that they must be decoded.

    Raises:
        BadOption: If an argument has a wrong value.
        UnknownName: If the pipeline has no such argument.
    """
    common = {name: value for name, value in shared.items() if value is not None}
    like = (
        next(next(iter(host.denoisers(loaded.pipe).values())).parameters())
        if hasattr(loaded.pipe, "scheduler")
        else None
    )
    calls = (loaded.prepare(_on(call, like)) for call in _drawn(rows, seeds, batch, common))
    return [_checked(loaded.pipe, call, decoded) for call in calls]


def samples_in(call: Mapping[str, Any]) -> int:
    """Return the number of samples of a call."""
    many = [value for name, value in call.items() if per_sample(name) or name == "generator"]
    return max((len(value) for value in many if isinstance(value, (list, tuple, torch.Tensor))), default=1)


def _drawn(rows: Sequence[Row], seeds: str | None, batch: int, shared: Mapping[str, Any]) -> list[Call]:
    """Return the calls in the form that needs no pipeline."""
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
    """Return the names of all arguments, and the arguments that are not per sample.

    The samples of one call agree in both.
    """
    return set(sample), {name: value for name, value in sample.items() if not per_sample(name)}


def _call(group: Sequence[Row]) -> Call:
    call = {name: value for name, value in group[0].items() if not per_sample(name)}
    for name in (name for name in group[0] if per_sample(name)):
        values = [sample[name] for sample in group]
        if name == "seed":
            call["generator"] = [_generator(seed) for seed in values]
        else:
            call[name] = _tensor(name, values) if any(isinstance(v, (list, torch.Tensor)) for v in values) else values
    return call


def _generator(seed: object) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise BadOption("seed", seed, "a whole number, 0 or more")
    return torch.Generator().manual_seed(seed)  # on the CPU, so that the noise is the same on every device


def _tensor(name: str, values: Sequence[object]) -> torch.Tensor:
    """Return the embeddings or masks of several samples as one tensor."""
    try:
        if all(isinstance(value, torch.Tensor) for value in values):
            return torch.stack([value for value in values if isinstance(value, torch.Tensor)])
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unusable(
            name,
            f"the values of the samples have different shapes or types ({error})",
            "Pass lists of numbers of the same shape for all samples",
        ) from None


def _on(call: Call, like: torch.Tensor | None) -> Call:
    """Return the call with its tensors on the device of the network, floating-point ones in its dtype."""

    def moved(value: Any) -> Any:
        if like is None or not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return {name: moved(value) for name, value in call.items()}


def _checked(pipe: Any, call: Call, decoded: bool) -> Call:
    """Return the call if the pipeline takes all of its arguments. Outputs that are not used are not decoded."""
    known = host.arguments_of_class(type(pipe)) or {}
    for name in call if known else ():
        if name not in known:
            raise UnknownName(f"argument of {host.host_name(pipe)}", name, tuple(known))
    accepts = inspect.signature(type(pipe).__call__).parameters
    return ({"output_type": "latent"} if "output_type" in accepts and not decoded else {}) | call
