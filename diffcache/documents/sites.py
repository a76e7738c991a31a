"""Parse and sort the names of sites, the places in a network whose output can be cached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from diffcache.errors import BadOption

Granularity = Literal["model", "stack", "block", "sublayer"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

# Words in the name of a list of blocks. Text, context and control streams are computed first (Lumina 2, Z-Image,
# Kandinsky 5, Wan VACE); blocks with one stream follow those with two (Flux, HunyuanVideo, HiDream, AuraFlow).
EARLY = {"refiner", "context", "text", "txt", "vace"}
LATE = {"single"}
CROSS = {"cross", "multihead"}  # attention to another sequence; torch's decoder calls it multihead


class Site(NamedTuple):
    """The name of a site: ``model`` (the whole denoiser), ``stack:PATH``, ``block:PATH`` or ``sublayer:PATH``.

    Attributes:
        granularity: The part before the colon.
        path: The path of the module in the denoiser. It is empty for ``model``.
    """

    granularity: Granularity
    path: str

    def __str__(self) -> str:
        return f"{self.granularity}:{self.path}" if self.path else self.granularity


def parse(name: str) -> Site:
    """Return the granularity and the path of a site's name.

    Raises:
        BadOption: If it is not the name of a site.
    """
    granularity, _, path = name.partition(":")
    if granularity not in GRANULARITIES or (granularity == "model") == bool(path):
        raise BadOption("site", name, "'model', 'stack:PATH', 'block:PATH' or 'sublayer:PATH'")
    return Site(granularity, path)


class SiteLocation(NamedTuple):
    """The parts of a path: ``transformer_blocks.3.attn`` is part ``attn`` of block 3 of ``transformer_blocks``."""

    stack: str
    block: int
    part: str


def location(site: str) -> SiteLocation:
    """Return the list of blocks, the block and the part that a site's name contains.

    The list is the path up to its first number. A path without a number is in block 0.
    """
    parts = parse(site).path.split(".")
    for n, part in enumerate(parts):
        if part.isdecimal():
            return SiteLocation(".".join(parts[:n]), int(part), ".".join(parts[n + 1 :]))
    return SiteLocation(".".join(parts[:-1]) or parts[0], 0, parts[-1] if len(parts) > 1 else "")


def family(site: str) -> str:
    """Return a site's type of layer: the last part of a sublayer's path, the list of a block, else the name."""
    granularity, path = parse(site)
    return (
        path.rpartition(".")[2]
        if granularity == "sublayer"
        else location(site).stack
        if granularity == "block"
        else site
    )


def feeds_forward(site: str) -> bool:
    """Return whether a sublayer is a feed-forward (``ff``, ``mlp``, ``ffn``) and not attention (``attn``)."""
    return "att" not in location(site).part


def in_order(sites: Iterable[str], stacks: Sequence[str] = ()) -> list[str]:
    """Sort names into the order in which the sites run, as far as names show it.

    Lists of blocks come in the order of ``stacks``. Other lists follow, by the words in their names: EARLY ones, lists
    without such a word, LATE ones; then as text. In a list, blocks are sorted by number. In a block, attention comes
    before feed-forwards, and self-attention before cross-attention.
    """
    known = list(stacks)

    def key(site: str) -> tuple[int, int, str, int, bool, bool, str]:
        stack, block, part = location(site)
        words = set(re.split(r"[._]", stack))
        rank = 0 if words & EARLY else 2 if words & LATE else 1
        given = known.index(stack) if stack in known else len(known)
        return (given, rank, stack, block, feeds_forward(site), bool(CROSS & set(re.split(r"[._]", part))), part)

    return sorted(sites, key=key)
