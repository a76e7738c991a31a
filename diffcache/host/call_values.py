"""Check the values of arguments that diffusers pipelines take, before a pipeline runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcache.documents.checks import is_unicode
from diffcache.errors import BadOption, Unusable
from diffcache.host.arguments import GRIDS, STEPS, is_count

MOST_STEPS = 100_000
COUNTS = ("height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
NUMBERS = ("guidance_scale", "true_cfg_scale", "strength", "eta")
TEXTS = ("prompt", "negative_prompt")
BATCHES = ("class_labels", "generator", "image", "latents")  # arguments with an entry for every sample


def check_values(call: Mapping[str, Any], where: str, *, steps_optional: bool = False) -> None:
    """Raise BadOption for a value in ``call`` that no pipeline accepts.

    Args:
        call: The arguments by name.
        where: The name of the call in errors.
        steps_optional: Whether the number of steps may be None, because the pipeline has a default.
    """
    steps = call.get(STEPS)
    known = steps_optional or any(call.get(name) is not None for name in GRIDS)
    if STEPS in call and not (steps is None and known) and not is_count(steps, 1, MOST_STEPS):
        raise BadOption(STEPS, steps, f"a whole number from 1 to {MOST_STEPS}, in {where}")
    for key, value in call.items():
        _check_value(f"{where}[{key!r}]", key, value)
    _check_noise(call, where)


def _check_value(where: str, key: str, value: object) -> None:
    """Raise BadOption if the value of the argument ``key`` is out of range. Errors call it ``where``."""
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
        raise Unusable(where, "the batch is empty", "Pass at least one sample")
    if key == "generator" and value is not None:
        several = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(g, torch.Generator) for g in several):
            allowed = "a torch.Generator, or a list with one for every sample: torch.Generator().manual_seed(0)"
            raise BadOption(where, shown(value), allowed)


def _check_noise(call: Mapping[str, Any], where: str) -> None:
    """Raise BadOption if a list of generators has not one for every sample."""
    drawn, asked = call.get("generator"), call.get("prompt", call.get("class_labels"))
    if not isinstance(drawn, (list, tuple)) or not isinstance(asked, (list, tuple)):
        return
    copies = math.prod(int(call[name]) for name in COUNTS if name.endswith("_per_prompt") and call.get(name))
    if len(drawn) != len(asked) * copies:
        raise Unusable(
            where,
            f"it has {len(drawn)} generators for {len(asked) * copies} samples",
            "Pass one generator for each sample, or a single one",
        )


def _is_batch(key: str, value: object) -> bool:
    """Return whether the argument ``key`` has an entry for every sample."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    named = key in BATCHES or key.startswith("prompt") or key.endswith("_embeds")
    return named and isinstance(value, (list, tuple))


def generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    """Return the random generators among the arguments of a call, including those in lists."""
    return [
        member
        for value in call.values()
        for member in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(member, torch.Generator)
    ]


def brings_noise(call: Mapping[str, Any]) -> bool:
    """Return whether a call has a seed, a generator or latents, so that a second run begins with the same noise."""
    return call.get("seed") is not None or bool(generators(call)) or call.get("latents") is not None


def shown(value: object) -> str:
    """Return the text that errors show for a value."""
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"one dictionary of {', '.join(map(str, value)) or 'nothing'}"[:120]
    return f"{value!r:.80}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
