"""Check a pipeline before a run: refuse other caches, and refuse diffcache itself if a full run is needed.

Every entry point makes these checks, and every run makes them again when it begins. A check walks the modules of a
denoiser once and reads their ``__dict__``. It calls nothing and reads no device. On a transformer of FLUX.1's structure
(57 blocks, 1,275 modules) ``demand_ready`` takes about 2 ms on one CPU core, as long as ``list(network.modules())``.
Results are not kept for the next run, because any module may have changed in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffcache.errors import AlreadyAccelerated, UnsupportedModel
from diffcache.host.dispatch import adopted, denoisers
from diffcache.host.forwards import chain, on_class, outermost, own
from diffcache.host.inspection import host_name, unwrapped
from diffcache.host.own_loops import MARK
from diffcache.patch import BoundMethod

KEPT_ATTENTION = ("attention_probs", "attnstore")  # attributes of attention processors
CACHE = re.compile(
    r"cach(?:e|ing)|taylor_?seer", re.IGNORECASE
)  # matches the names of functions that replace a forward
# Attributes that forks leave on a network or its class. Networks have caches of other kinds ("kv_cache").
FORKS = re.compile(
    r"(?:^|_)(?:tea|mag|easy|deep|ada|sea|first_?block|taylor|fora|toca|speca|faster|delta)_?cache|taylor_?seer|rel_l1"
    r"|^(?:is|_is)_cached$|^previous_(?:modulated_input|residual)$",
    re.IGNORECASE,
)
SWITCH = "enable_teacache"  # attribute by which TeaCache is turned off; its forward stays
# Modules in which all functions are caches. Those of cache-dit stay when it is off; an attribute shows its state.
PACKAGES = re.compile(r"(?:DeepCache|tgate|para_attn|nunchaku\.caching|xfuser\.model_executor\.cache)\b")


def demand_no_other_cache(pipe: Any) -> None:
    """Raise AlreadyAccelerated if another cache acts on a denoiser of ``pipe``, or on a part of one.

    Recognised are diffusers' caches (``enable_cache``, ``diffusers.hooks.apply_*``), cache-dit and its relatives, and
    functions that replace a forward, on the object or on the class, if their names or attributes contain "cache". Hooks
    for offloading, casting, adapters and parallelism are no caches.
    """
    _look(host_name(pipe), denoisers(pipe), running=False)


def demand_ready(pipe: Any) -> None:
    """Raise an error if a run that is about to begin cannot be accelerated.

    Raises:
        AlreadyAccelerated: Another cache is on (see ``demand_no_other_cache``).
        UnsupportedModel: Attention processors keep attention maps for the pipeline (self-attention guidance, LEdits++,
            Attend-and-Excite). At a skipped step the pipeline would read those of an earlier step.
    """
    _look(host_name(pipe), denoisers(pipe), running=True)


def demand_full_run(pipe: Any) -> None:
    """Raise AlreadyAccelerated if a run of ``pipe`` would not be a full run: diffcache or another cache is on."""
    if MARK in getattr(adopted(pipe, bare=True), "__dict__", {}):
        raise AlreadyAccelerated(
            f"this {host_name(pipe)} is accelerated; a measurement would record predictions as outputs of the "
            "full run. Call diffcache.restore first, and accelerate it again afterwards."
        )
    demand_no_other_cache(pipe)


def parts(network: nn.Module) -> Iterator[nn.Module]:
    """Yield ``network`` and every module in it, each once. ``Module.modules`` takes four times as long."""
    seen, left = {id(network)}, [network]
    while left:
        part = left.pop()
        yield part
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                left.append(child)


def _look(title: str, networks: Mapping[str, Any], *, running: bool) -> None:
    """Raise AlreadyAccelerated at the first sign of another cache.

    Args:
        title: The name of the pipeline in errors.
        networks: The denoisers by component name. They are looked at without the wrapper of ``torch.compile``; for a
            method, its owner is.
        running: Whether a run is about to begin. If so, raise UnsupportedModel for attention maps that are kept.
    """
    for name, found in networks.items():
        network: Any = found.of() if isinstance(found, BoundMethod) else unwrapped(found)
        kinds: set[type[nn.Module]] = set()
        _refuse(title, name, _switched_on(name, network))
        for part in parts(network):
            state = part.__dict__
            if "_diffusers_hook" in state:
                _refuse(title, name, _hooked(name, state["_diffusers_hook"].hooks))
            if "forward" in state:
                _refuse(title, name, _replaced(name, network, part, outermost(part)))
            kind = type(part)
            if kind not in kinds:
                kinds.add(kind)
                _refuse(title, name, _replaced(name, network, part, on_class(kind)))
            # getattr would take more time than all the rest, because most parts have no such attribute.
            if running and ("processor" in state or "processor" in part._modules):
                _demand_nothing_kept(title, name, state.get("processor", part._modules.get("processor")))


def _demand_nothing_kept(title: str, name: str, processor: Any) -> None:
    """Raise UnsupportedModel if an attention processor keeps attention maps for the pipeline."""
    if any(hasattr(processor, kept) for kept in KEPT_ATTENTION):
        raise UnsupportedModel(
            f"{title} reads the attention maps of {name!r} at every step ({type(processor).__name__}); "
            "a skipped step has none. This pipeline cannot be accelerated. If you want the processors removed, call "
            "set_default_attn_processor()."
        )


def _refuse(title: str, name: str, found: tuple[str, str] | None) -> None:
    """Raise AlreadyAccelerated if a cache was found.

    Args:
        title: The name of the pipeline in errors.
        name: The name of the denoiser.
        found: The cache and the way to turn it off, or None.
    """
    if found is not None:
        cache, way_out = found
        raise AlreadyAccelerated(
            f"the {name} of this {title} has {cache} on. {way_out} first: two caches would skip work "
            "unaware of each other, and a run with another cache is not a full run."
        )


def _switched_on(name: str, network: nn.Module) -> tuple[str, str] | None:
    """Return the cache that the attributes of a network show, and the way to turn it off; None if there is none."""
    if getattr(network, "is_cache_enabled", False) is True:
        config = type(getattr(network, "_cache_config", None)).__name__
        return f"a cache of diffusers' own ({config})", f"Call pipe.{name}.disable_cache()"
    if getattr(network, "_is_cached", False) is True:
        return "a cache of cache-dit", "Call cache_dit.disable_cache(pipe)"
    for attribute in (*network.__dict__, *type(network).__dict__):
        if FORKS.search(attribute) and not callable(value := getattr(network, attribute)) and _on(value):
            if getattr(network, SWITCH, True) is False:
                return None
            return f"another cache (attribute {attribute!r})", _PUT_BACK.format(name=name)
    return None


def _on(value: Any) -> bool:
    """Return whether a setting is neither None nor False. Tensors are not read."""
    return value is not None and value is not False


def _hooked(name: str, hooks: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the cache among the hooks of diffusers' registry, and the way to turn it off; None if there is none.

    A stateful hook keeps values from one forward for another.
    """
    for key, hook in hooks.items():
        if getattr(hook, "_is_stateful", False) is True or CACHE.search(f"{key} {type(hook).__name__}"):
            registry = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.{name})"
            return f"a cache of diffusers' own ({type(hook).__name__})", f"Call {registry}.remove_hook({key!r})"
    return None


def _replaced(name: str, network: nn.Module, part: nn.Module, function: Any) -> tuple[str, str] | None:
    """Return the cache among the functions that replace a forward, and the way to turn it off; None if there is none.

    Args:
        name: The name of the denoiser.
        network: The denoiser.
        part: The module whose forward was replaced.
        function: The function that replaced it.
    """
    for wrapper in chain(function):
        if own(part, wrapper) and function is not on_class(type(part)):
            return None
        module, named = _names(wrapper)
        caches = PACKAGES.match(module) or (CACHE.search(named) and not module.startswith("cache_dit."))
        if caches and getattr(network, SWITCH, True) is not False:
            return f"another cache ({type(part).__name__}.forward is {named})", _PUT_BACK.format(name=name)
    return None


def _names(function: Any) -> tuple[str, str]:
    """Return the module and the name of a function, or of an object's class, without enclosing functions."""
    named = getattr(function, "__qualname__", type(function).__qualname__)
    return str(getattr(function, "__module__", "")), str(named).rpartition("<locals>.")[2]


_PUT_BACK = "Turn it off, or put the forward of pipe.{name}, its class and its blocks back,"
