"""Questions about a host, answered by its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffcache.errors import UnsupportedModel
from diffcache.host.inspection import unwrapped
from diffcache.host.kinds import kind_of
from diffcache.host.traits import Traits


def adopted(value: Any, *, bare: bool = False) -> Any:
    """Return the host for an object that the user passed; ``value`` unchanged if it is of no known kind.

    Args:
        value: A pipeline, a policy, a network or a loop.
        bare: Return the one host that is registered for a policy or a network, and keeps neither alive.
    """
    try:
        kind = kind_of(value)
    except UnsupportedModel:
        return value
    return kind.adopt(value, bare=bare)


def denoisers(host: Any) -> dict[str, nn.Module]:
    """Return the networks that the loop of a host calls at every step, by component name.

    Raises:
        UnsupportedModel: If ``host`` is of no known kind, or has no network that can be skipped.
    """
    return kind_of(host).denoisers(host)


def traits(host: Any) -> Traits:
    """Return the traits of a host's kind, which evaluation and recording use.

    Raises:
        UnsupportedModel: If ``host`` is of no known kind.
    """
    return kind_of(host).traits


def noise_scheduler(host: Any) -> Any:
    """Return the noise scheduler that the loop of a host steps, or a ``Clock`` if each forward is a step."""
    return kind_of(host).noise_scheduler(host)


def parts(host: Any) -> Mapping[str, Any]:
    """Return the parts of a host that identify it, by name: the components of a pipeline, the policy of a loop."""
    return kind_of(host).parts(host)


def guidance_values(host: Any) -> dict[str, float | None]:
    """Return the guidance of the run in progress, by the name of the argument or setting.

    Arguments that were given as None have the value None. Switches count as 0 and 1, and a list has a number for each
    entry (``guidance_scale[0]``). If the call of the pipeline is not on the stack, only the values that the pipeline
    keeps are returned.
    """
    return kind_of(host).guidance(host)


def guidance_scales(host: Any) -> dict[str, float]:
    """Return ``guidance_values`` without those that are None."""
    return {name: value for name, value in guidance_values(host).items() if value is not None}


def in_parts(host: Any) -> list[str]:
    """Return the names of the denoisers that several processes run together (diffusers' ``enable_parallelism``).

    Each process runs its part of the tokens or of the weights, and waits for the others inside a forward. No process
    may skip a forward that the others compute.
    """
    return [n for n, m in denoisers(host).items() if getattr(unwrapped(m), "_parallel_config", None) is not None]


def demand_one_process(host: Any) -> None:
    """Raise UnsupportedModel if several processes run a denoiser together.

    Each process would see a part of the denoiser, and would end its search at another moment than the others.
    """
    for name in in_parts(host):
        raise UnsupportedModel(
            f"the {name} of this {type(host).__name__} is run by several processes together (enable_parallelism). "
            "Measure and optimize before enable_parallelism, in one process or with a share of the calls in each; the "
            "schedule that comes of it serves the parallel pipeline too."
        )
