"""Kinds of hosts: one file, one kind. A host is an object that runs a sampling loop around a network.

A file defines ``KIND``, an instance of a subclass of :class:`Kind`. A class of another package becomes a host with an
attribute ``DIFFCACHE_KIND``, which holds such an instance.
"""

from __future__ import annotations

import functools
from typing import Any

from diffcache import registry
from diffcache.errors import UnsupportedModel
from diffcache.host.kinds._kind import Kind, LoopWatch, unsupported

__all__ = ["Kind", "LoopWatch", "kind_of", "kinds", "unsupported"]


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """Return every kind of this folder, those that take anything last."""
    found: list[Kind] = [module.KIND for module in registry.modules(__name__).values()]
    return tuple(sorted(found, key=lambda kind: kind.fallback))


def kind_of(value: Any) -> Kind:
    """Return the kind of a host, or of an object that becomes one.

    Raises:
        UnsupportedModel: If it is of no known kind, or its ``DIFFCACHE_KIND`` is not an instance of :class:`Kind`.
    """
    own = getattr(type(value), "DIFFCACHE_KIND", None)
    if isinstance(own, Kind):
        return own
    if own is not None:
        found = f"the class {own.__name__}" if isinstance(own, type) else f"a {type(own).__name__}"
        raise UnsupportedModel(
            f"{type(value).__name__}.DIFFCACHE_KIND is {found}. Allowed: an instance of a subclass of "
            "diffcache.host.Kind."
        )
    for kind in kinds():
        if kind.recognises(value):
            return kind
    raise unsupported(value)
