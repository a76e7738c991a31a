"""The random generators in the arguments of a call: copied, restored, and one for each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffcache import host
from diffcache.errors import Unusable


def with_copied_generators(value: Any) -> Any:
    """Return ``value`` with its generators copied, so that drawing from the copies leaves the originals unchanged.

    Args:
        value: An argument of a call. A generator, and each generator in a list or tuple, is replaced by a copy in the
            same state. Anything else is returned unchanged.
    """
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    return [with_copied_generators(v) for v in value] if isinstance(value, (list, tuple)) else value


def copy_of_global_generator(device: torch.device) -> torch.Generator:
    """Return a generator in the current state of torch's global generator of ``device``."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return torch.Generator(device).set_state(state)


@contextlib.contextmanager
def restored_generators(calls: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Restore the state of every generator in ``calls`` when the block ends."""
    found = {id(g): (g, g.get_state()) for call in calls for g in host.generators(call)}
    try:
        yield
    finally:
        for generator, state in found.values():
            generator.set_state(state)


def demand_own_generators(calls: Sequence[Mapping[str, Any]]) -> None:
    """Check that no two calls share a generator: several processes cannot draw from one generator in order.

    Raises:
        BadOption: Two calls hold the same generator.
    """
    seen: dict[int, int] = {}
    for index, call in enumerate(calls):
        for generator in host.generators(call):
            if seen.setdefault(id(generator), index) != index:
                raise Unusable(
                    "calls",
                    f"calls {seen[id(generator)]} and {index} share a generator, and several processes measure",
                    "Give each call a different generator",
                )
