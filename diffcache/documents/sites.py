"""The names of places whose output can be cached."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from diffcache.errors import BadOption

Granularity = Literal["model", "stack", "block", "sublayer"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


class Site(NamedTuple):
    """``model`` (path empty: the whole denoiser), ``stack:PATH``, ``block:PATH`` or ``sublayer:PATH``."""

    granularity: Granularity
    path: str

    def __str__(self) -> str:
        return f"{self.granularity}:{self.path}" if self.path else self.granularity


def parse(name: str) -> Site:
    granularity, _, path = name.partition(":")
    if granularity not in GRANULARITIES or (granularity == "model") == bool(path):
        raise BadOption("site", name, "'model', 'stack:PATH', 'block:PATH' or 'sublayer:PATH'")
    return Site(granularity, path)
