"""Calls of a pipeline, checked before the pipeline runs.

A call is a dictionary of arguments for ``pipe(**call)``. Every function that takes calls checks them here first, so
that a mistake in the last call is found before the first one runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcache.documents.checks import is_unicode
from diffcache.errors import BadOption, UnknownName
from diffcache.host.arguments import GRIDS, STEPS, Parameters, is_count, parameters_of
from diffcache.host.kinds import kind_of

MOST_STEPS = 100_000
COUNTS = ("height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
NUMBERS = ("guidance_scale", "true_cfg_scale", "strength", "eta")
TEXTS = ("prompt", "negative_prompt")
BATCHES = ("class_labels", "generator", "image", "latents")  # arguments with an entry for every sample
ALLOWED = "a list of at least one dictionary of arguments for pipe(**call)"


def check_calls(pipe: Any, calls: object, name: str = "calls", *, repeatable: bool = False) -> None:
    """Raise unless every one of ``calls`` can be the arguments of ``pipe(**call)``.

    Args:
        pipe: A pipeline, or the ``Loop`` that stands for a policy or a network.
        calls: What the user passed.
        name: The name of the argument, for errors.
        repeatable: Whether each call runs several times and must begin with the same noise every time.

    Raises:
        BadOption: ``calls`` is not a list of dictionaries, or a value in it is out of range.
        UnknownName: The pipeline has no argument of that name.
    """
    kind = kind_of(pipe)
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence) or not calls:
        raise BadOption(name, _shown(calls), ALLOWED, example=kind.example)
    for call in calls:
        if not isinstance(call, Mapping):
            raise BadOption(name, f"{_shown(calls)} with {_shown(call)} in it", ALLOWED, example=kind.example)
    kind.check_callable(pipe)
    for index, call in enumerate(calls):
        check_call(pipe, call, f"{name}[{index}]")
        if repeatable and call.get("seed") is None and not generators(call) and call.get("latents") is None:
            allowed = "a generator, or one for every sample, in each call (of a policy or a loop, a seed)"
            raise BadOption(name, f"call {index} without generator", allowed)


def check_call(pipe: Any, call: Mapping[Any, Any], where: str = "call") -> None:
    """Raise BadOption or UnknownName unless ``call`` can be the arguments of ``pipe(**call)``."""
    check_names(arguments_of(pipe), _title(pipe), call, where)
    check_values(call, where, steps_optional=not kind_of(pipe).traits.steps_required)


def check_names(
    parameters: Mapping[str, inspect.Parameter] | None, title: str, call: Mapping[Any, Any], where: str
) -> None:
    """Raise unless the names in ``call`` are among ``parameters``, and none that is required is missing.

    Args:
        parameters: The arguments of the pipeline (see ``arguments_of``); None: any.
        title: What the pipeline is called in errors.
    """
    for key in call:
        if not isinstance(key, str):
            raise BadOption(where, f"a dictionary with the key {key!r:.80}", "names of arguments, as text")
    if parameters is None:
        return
    for key in call:
        if key not in parameters:
            raise UnknownName(f"argument of {title}", key, tuple(parameters), next_step=f"It is in {where}.")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in call:
            raise BadOption(where, f"a call without {key!r}", f"a value for {key!r}, which {title} requires")


def arguments_of(pipe: Any) -> Parameters | None:
    """Return the arguments that a call may have, by name; None if the pipeline takes any."""
    return kind_of(pipe).arguments(pipe)


def arguments_of_class(kind: type) -> Parameters | None:
    """Return the arguments that a call of a pipeline of this class may have, by name; None if it takes any."""
    return parameters_of(kind.__call__, leave_out=1)


def check_values(call: Mapping[str, Any], where: str, *, steps_optional: bool = False) -> None:
    """Raise BadOption for a value in ``call`` that no pipeline can do with.

    Args:
        steps_optional: Whether the pipeline knows its number of steps by itself, so that None is no mistake.
    """
    steps = call.get(STEPS)
    known = steps_optional or any(call.get(name) is not None for name in GRIDS)
    if STEPS in call and not (steps is None and known) and not is_count(steps, 1, MOST_STEPS):
        raise BadOption(STEPS, steps, f"a whole number from 1 to {MOST_STEPS}, in {where}")
    for key, value in call.items():
        _check_value(f"{where}[{key!r}]", key, value)
    _check_noise(call, where)


def _check_value(where: str, key: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadOption(where, value, "a finite number")
    if key in TEXTS and not isinstance(value, (str, list, tuple, Mapping, type(None))):
        raise BadOption(where, value, "text, or a list of texts")
    members = value if isinstance(value, (list, tuple)) else [value]
    for member in members:
        if isinstance(member, str) and not is_unicode(member):
            raise BadOption(where, ascii(member)[:80], "Unicode text, without lone surrogates")
    if key in NUMBERS and isinstance(value, str):
        raise BadOption(where, value, "a finite number")
    if key == "class_labels" and any(isinstance(member, str) for member in members):
        raise BadOption(where, value, "whole numbers: a class is given by its number")
    if key in COUNTS and value is not None and not is_count(value, 1):
        raise BadOption(where, value, "a whole number, 1 or more")
    if _is_batch(key, value) and not len(value):  # type: ignore[arg-type]
        raise BadOption(where, "an empty batch", "at least one sample")
    if key == "generator" and value is not None:
        several = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(g, torch.Generator) for g in several):
            allowed = "a torch.Generator, or a list with one for every sample: torch.Generator().manual_seed(0)"
            raise BadOption(where, _shown(value), allowed)


def _check_noise(call: Mapping[str, Any], where: str) -> None:
    """Raise BadOption unless a list of generators has one for every sample."""
    drawn, asked = call.get("generator"), call.get("prompt", call.get("class_labels"))
    if not isinstance(drawn, (list, tuple)) or not isinstance(asked, (list, tuple)):
        return
    copies = math.prod(int(call[name]) for name in COUNTS if name.endswith("_per_prompt") and call.get(name))
    if len(drawn) != len(asked) * copies:
        found = f"{len(drawn)} generators for {len(asked) * copies} samples"
        raise BadOption(where, found, "one generator for every sample, or a single one")


def _is_batch(key: str, value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0
    named = key in BATCHES or key.startswith("prompt") or key.endswith("_embeds")
    return named and isinstance(value, (list, tuple))


def generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    """Return the random generators among the arguments of a call, or in lists there."""
    return [
        member
        for value in call.values()
        for member in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(member, torch.Generator)
    ]


def steps_asked(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """Return the number of steps that a call asks for, or None if only a run shows it."""
    return kind_of(pipe).steps_asked(pipe, call)


def iterations(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """Return the iterations that the noise scheduler plans for a call, or None if only a run shows them.

    A solver of second order has more of them than steps are asked for. Those that a late start (image to image) leaves
    out count too, as they do in a schedule.
    """
    return kind_of(pipe).iterations(pipe, call)


def check_same_steps(pipe: Any, calls: Sequence[Mapping[str, Any]], name: str = "calls") -> None:
    """Raise BadOption if the calls ask for different numbers of steps."""
    found = sorted({steps for call in calls if (steps := steps_asked(pipe, call)) is not None})
    if len(found) > 1:
        raise BadOption(name, f"calls of {found} steps", "calls that all take the same steps")


def _title(pipe: Any) -> str:
    return type(pipe).__name__


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"one dictionary of {', '.join(map(str, value)) or 'nothing'}"[:120]
    return f"{value!r:.80}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
