"""Read the guidance of a run: numbers from the arguments of the call, the pipeline and its guiders."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffcache.host.frames import variables_of
from diffcache.host.inspection import guiders

# Names of arguments and attributes. ControlNet's window (``control_guidance_start``) does not guide the denoiser.
NAMES = re.compile(r"^(?!control)(?:.*guid|.*cfg|pag_|sag_|stg_|sld_|modality_|audio_stg_|audio_modality_)")
SWITCHES = re.compile(r"^do_(?:.*guid|.*cfg)")  # local variables and properties: whether a form of guidance is on
PROPERTIES = (
    "do_classifier_free_guidance",
    "do_perturbed_attention_guidance",
    "do_spatio_temporal_guidance",
    "do_modality_isolation_guidance",
)
SCALES = ("guidance_scale", "true_cfg_scale", "cfg_scale")  # they guide above 1, unless a switch says otherwise
OF_GUIDERS = ("_start", "_stop", "_enabled", "use_original_formulation")  # attributes of guiders that NAMES misses


def values_of_pipeline(pipe: Any) -> dict[str, float | None]:
    """Return the guidance of a pipeline's run in progress.

    Returns:
        The name of an argument, attribute or switch -> its number, from the call, the pipeline and its guiders.
        Switches count as 0.0 and 1.0. Arguments and attributes of guiders that are None have the value None.
    """
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
    """Yield the guidance arguments of a call and the switches among its local variables, as (name, value).

    Entries of ``**kwargs`` and of the state of a modular pipeline are included.

    Args:
        variables: The arguments and the other local variables of the call, by name (see ``variables_of``).
    """
    arguments, others = variables
    for name, value in arguments.items():
        inner = getattr(value, "values", None) if name == "state" else value
        if NAMES.match(name):
            yield name, value
        elif isinstance(inner, dict):
            yield from ((n, v) for n, v in inner.items() if isinstance(n, str) and NAMES.match(n))
    yield from ((name, value) for name, value in others.items() if SWITCHES.match(name) and value is not None)


def _numbers(name: str, value: Any, known: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of one argument by name: one per entry of a list (``name[0]``), else one.

    The result is empty if the name is in ``known`` or the value is not a number. Tensors count if they have one element
    and lie on the CPU; reading another device would wait for it.
    """
    if isinstance(value, (list, tuple)):
        each = [_numbers(f"{name}[{i}]", one, known) for i, one in enumerate(value)]
        return {n: number for one in each for n, number in one.items()}
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if name in known or not (value is None or isinstance(value, numbers.Real)):
        return {}
    return {name: None if value is None else float(value)}


def is_guided(values: Mapping[str, float | None]) -> bool | None:
    """Return whether a run uses classifier-free guidance, or a form of it that calls the network again.

    Args:
        values: See ``values_of_pipeline``.

    Returns:
        None if the values do not show it. A loop of your own has none.
    """
    switches = [value for name, value in values.items() if SWITCHES.match(name) and value is not None]
    if switches:
        return any(switches)
    scales = [value for name, value in values.items() if name in SCALES and value is not None]
    return any(value > 1 for value in scales) if scales else None
