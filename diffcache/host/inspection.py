"""Inspect a pipeline and its networks: denoisers, guiders, arguments of forwards and configurations."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffcache.host.branches import Conditions, recognised
from diffcache.host.own_loops import Loop
from diffcache.patch import BoundMethod

STATES = ("x_t",)  # names of parameters that are a network's main input at any position
TIMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")  # names of parameters that are the time
DENOISER_NAMES = ("transformer", "unet", "prior", "decoder")
CONFIG = "config/"  # prefix of the keys of configurations in a provenance
LONGEST_CONFIG = 16_384  # characters
GUIDER_METHODS = ("prepare_inputs", "prepare_inputs_from_block_state")


def looping_blocks(pipe: Any) -> list[Any]:
    """Return the blocks of a modular pipeline that hold a sampling loop.

    Their ``progress_bar`` counts the loop, and their ``loop_step`` is an iteration.
    """
    found, left = [], [getattr(pipe, "_blocks", None)]
    while left:
        block = left.pop()
        if hasattr(block, "progress_bar") and hasattr(block, "loop_step"):
            found.append(block)
        left += (getattr(block, "sub_blocks", None) or {}).values()
    return found


def guiders(pipe: Any) -> list[Any]:
    """Return the guiders of a pipeline, which set the branches of every step.

    Most modular pipelines have one or two.
    """
    return [part for part in pipe.components.values() if hasattr(part, GUIDER_METHODS[-1])]


def has_components(value: Any) -> bool:
    """Return whether ``value`` has components, as pipelines do.

    The property of a pipeline is not read, because it is slow.
    """
    if hasattr(type(value), "components") or "components" in getattr(value, "__dict__", {}):
        return True
    forwards = hasattr(type(value), "__getattr__") and not isinstance(value, nn.Module)
    return forwards and hasattr(value, "components")  # a wrapper that forwards attributes


def is_pipeline(value: Any) -> bool:
    """Return whether ``value`` has components and a noise scheduler, and is not a :class:`diffcache.Loop`."""
    return not isinstance(value, Loop) and has_components(value) and hasattr(value, "scheduler")


def is_denoiser_name(name: str) -> bool:
    """Return whether the component with this name is a denoiser.

    ``transformer_2`` and ``unconditional_transformer`` are; ``prior_text_encoder`` is not.
    """
    begins = any(name == n or name.startswith(n + "_") for n in DENOISER_NAMES)
    return (begins or name.endswith(("_transformer", "_unet"))) and "encoder" not in name


def unwrapped(module: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the class's forward.

    A forward on the object may be a wrapper of another library.
    """
    kind, name = (
        (type(module.of()), module.name) if isinstance(module, BoundMethod) else (type(unwrapped(module)), "forward")
    )
    return tuple(inspect.signature(getattr(kind, name)).parameters)[1:]


def main_input(module: nn.Module) -> str:
    """Return the name of the parameter that is the state: the first one in STATES, else the first of all."""
    names = parameters(module)
    return next((name for name in names if name in STATES), names[0] if names else "")


def main_of(module: nn.Module) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    """Return the function that picks the main input from the arguments of a call."""
    names, name = parameters(module), main_input(module)
    place = names.index(name) if name else 0

    def main(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs.get(name)

    return main


def time_of(module: nn.Module) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    """Return the function that picks the time from the arguments of a denoiser's call.

    The function returns None if no parameter is in TIMES.
    """
    names = parameters(module)
    name = next((known for known in TIMES if known in names), "")
    place = names.index(name) if name else 0

    def time(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[place] if name and place < len(args) else kwargs.get(name)

    return time


def conditions_of(module: nn.Module) -> Callable[[Sequence[Any], Mapping[str, Any]], Conditions]:
    """Return the function that picks the conditioning from the arguments of a denoiser's call.

    The conditioning is all arguments except the main input and the time. Entries of dicts and lists are separate.
    """
    names = parameters(module)
    left_out = {main_input(module), next((known for known in TIMES if known in names), "")}

    def conditions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
        found: dict[str, Any] = {}
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if name in left_out:
                continue
            if isinstance(value, Mapping):
                found |= {f"{name}.{key}": recognised(part) for key, part in value.items()}
            elif isinstance(value, (list, tuple)):
                found |= {f"{name}.{n}": recognised(part) for n, part in enumerate(value)}
            else:
                found[name] = recognised(value)
        return found

    return conditions


def class_name(module: Any) -> str:
    """Return the name of a network's class.

    For a compiled module it is that of the module inside, for a method its owner's.
    """
    return type(module.of() if isinstance(module, BoundMethod) else unwrapped(module)).__name__


def host_name(host: Any) -> str:
    """Return the class by which messages name a host: for the loop of a network or a policy, the class of that."""
    return class_name(host.shown) if isinstance(host, Loop) else type(host).__name__


def config_text(module: Any) -> str:
    """Return the configuration of a diffusers object as JSON, without private entries.

    For other networks return the names and shapes of their parameters.
    """
    config = getattr(unwrapped(module), "config", None)
    if not isinstance(config, Mapping):  # not a diffusers object; parameters identify the network too
        shapes: Any = getattr(unwrapped(module), "named_parameters", dict)()
        config = {name: list(parameter.shape) for name, parameter in dict(shapes).items()}
    public = {str(k): v for k, v in config.items() if not str(k).startswith("_")}
    return json.dumps(public, sort_keys=True, default=repr)


def config_digest(module: Any) -> str:
    """Return the SHA-256 of ``config_text``, in hexadecimal."""
    return hashlib.sha256(config_text(module).encode()).hexdigest()


def configurations(**parts: Any) -> dict[str, str]:
    """Return entries for the provenance of a document: "config/" and the name of each part -> its ``config_text``.

    Configurations of more than LONGEST_CONFIG characters are left out: the shapes of a large network of another library
    would be longer than the rest of the document.
    """
    texts = {f"{CONFIG}{name}": config_text(part) for name, part in parts.items()}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_CONFIG}


def other_settings(found: Any, text: str | None, digest: str) -> str:
    """Return a text for errors: which settings of ``found`` differ from those of a configuration.

    Args:
        found: The object to compare.
        text: The configuration as JSON, if a document holds it. It counts only if ``digest`` is its SHA-256.
        digest: The SHA-256 of the configuration.
    """
    here = config_text(found)
    known = text is not None and hashlib.sha256(text.encode()).hexdigest() == digest
    try:
        then, now = json.loads(text) if known and text else None, json.loads(here)
    except (ValueError, RecursionError):
        then = None
    if not isinstance(then, dict):
        return "which setting differs is not known, for the schedule holds no more than the digest"
    missing = "not set"
    names = sorted(name for name in then.keys() | now.keys() if then.get(name, missing) != now.get(name, missing))
    differences = [
        f"{name:.40} was {then.get(name, missing)!r:.60}, is {now.get(name, missing)!r:.60}" for name in names[:4]
    ]
    return "; ".join(differences) + (f"; and {len(names) - 4} more settings" if len(names) > 4 else "")


def prediction_type(scheduler: Any) -> str | None:
    """Return the ``prediction_type`` in the configuration of a noise scheduler, or None."""
    value = dict(scheduler.config).get("prediction_type")
    return None if value is None else str(value)


def batches_guidance(pipe: Any) -> bool:
    """Return whether the pipeline's ``do_classifier_free_guidance`` states that the run is guided, else False."""
    said = getattr(pipe, "do_classifier_free_guidance", False)
    return isinstance(said, (bool, Tensor)) and bool(said)  # a tensor where each frame has a scale
