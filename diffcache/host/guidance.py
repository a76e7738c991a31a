"""Which guidance a run has: every number of it, from the arguments of the call, the pipeline and its guiders."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffcache.host.frames import variables_of
from diffcache.host.inspection import guiders

# Names of arguments and attributes. ControlNet's window (``control_guidance_start``) is no guidance of the denoiser.
NAMES = re.compile(r"^(?!control)(?:.*guid|.*cfg|pag_|sag_|stg_|sld_|modality_|audio_stg_|audio_modality_)")
SWITCHES = re.compile(r"^do_(?:.*guid|.*cfg)")  # local variables and properties: whether a form of guidance is on
PROPERTIES = (
    "do_classifier_free_guidance",
    "do_perturbed_attention_guidance",
    "do_spatio_temporal_guidance",
    "do_modality_isolation_guidance",
)
OF_GUIDERS = ("_start", "_stop", "_enabled", "use_original_formulation")  # what guiders call by general names


def values_of_pipeline(pipe: Any) -> dict[str, float | None]:
    """Return the guidance of a pipeline's run in progress: numbers of the call, of the pipeline and of its guiders."""
    found: dict[str, float | None] = {}
    for guider in guiders(pipe):
        for name, value in vars(guider).items():
            if name in OF_GUIDERS:
                found |= _numbers(f"guidance_{name.removeprefix('use_').lstrip('_')}", value, found)
            elif NAMES.match(name):
                found |= _numbers(name, value, found)
    for name, value in _of_call(variables_of(pipe)):
        found |= _numbers(name, value, found)
    for name, value in vars(pipe).items():
        if name.startswith("_") and NAMES.match(name[1:]) and value is not None:
            found |= _numbers(name[1:], value, found)
    for name in PROPERTIES:
        if (value := getattr(pipe, name, None)) is not None:
            found |= _numbers(name, value, found)
    return found


def _of_call(variables: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Arguments, ``**kwargs`` and a modular pipeline's state included, and switches among the local variables."""
    arguments, others = variables
    for name, value in arguments.items():
        inner = getattr(value, "values", None) if name == "state" else value
        if NAMES.match(name):
            yield name, value
        elif isinstance(inner, dict):
            yield from ((n, v) for n, v in inner.items() if isinstance(n, str) and NAMES.match(n))
    yield from ((name, value) for name, value in others.items() if SWITCHES.match(name) and value is not None)


def _numbers(name: str, value: Any, known: Mapping[str, Any]) -> dict[str, float | None]:
    """The number, or numbers, that an argument has; nothing if its name is known. Tensors on a device are not read."""
    if isinstance(value, (list, tuple)):
        each = [_numbers(f"{name}[{i}]", one, known) for i, one in enumerate(value)]
        return {n: number for one in each for n, number in one.items()}
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if name in known or not (value is None or isinstance(value, numbers.Real)):
        return {}
    return {name: None if value is None else float(value)}
