"""Collect the facts about networks by which published calibrations are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffcache.host.inspection import class_name, unwrapped
from diffcache.presets import NetworkFacts


def network_facts(pipe: Any, networks: Mapping[str, Any]) -> dict[str, NetworkFacts]:
    """Return the facts about the networks of a pipeline.

    Args:
        pipe: The pipeline, policy or loop.
        networks: Component name -> the network.
    """
    return {
        name: NetworkFacts(
            class_name=class_name(network),
            config={str(key): value for key, value in _config(unwrapped(network)).items() if str(key)[:1] != "_"},
            pipeline=type(pipe).__name__,
            origin=str(_config(pipe).get("_name_or_path") or _config(unwrapped(network)).get("_name_or_path") or ""),
        )
        for name, network in networks.items()
    }


def _config(value: Any) -> Mapping[str, Any]:
    """Return the configuration of a diffusers object, empty for other objects."""
    config = getattr(value, "config", None)
    return config if isinstance(config, Mapping) else {}
