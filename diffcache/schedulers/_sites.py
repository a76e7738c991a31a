"""The sites of a profile as schedulers see them: of one granularity, in the order in which they run, with costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.sites import GRANULARITIES, parse
from diffcache.errors import BadOption

# Words in the name of a list of blocks. Text, context and control streams are made ready first (Lumina 2, Z-Image,
# Kandinsky 5, Wan VACE); blocks with one stream follow those with two (Flux, HunyuanVideo, HiDream, AuraFlow).
EARLY = {"refiner", "context", "text", "txt", "vace"}
LATE = {"single"}
CROSS = {"cross", "multihead"}  # attention to what is not in the sequence itself; torch's decoder calls it multihead


class Place(NamedTuple):
    """Of ``sublayer:transformer_blocks.3.attn``: the list ``transformer_blocks``, block 3, part ``attn``."""

    stack: str
    block: int
    part: str


def place(site: str) -> Place:
    """Where a site stands. The list is what comes before the first number of its path; no number counts as 0."""
    parts = parse(site).path.split(".")
    for n, part in enumerate(parts):
        if part.isdecimal():
            return Place(".".join(parts[:n]), int(part), ".".join(parts[n + 1 :]))
    return Place(".".join(parts[:-1]) or parts[0], 0, parts[-1] if len(parts) > 1 else "")


def family(site: str) -> str:
    """Its type of layer: the last part of a sublayer's path, a block's list; other sites are types of their own."""
    granularity, path = parse(site)
    return (
        path.rpartition(".")[2] if granularity == "sublayer" else place(site).stack if granularity == "block" else site
    )


def feeds_forward(site: str) -> bool:
    """Sublayers are attention or feed-forwards (``attn``, ``attn2``, ``self_attention``; ``ff``, ``mlp``, ``ffn``)."""
    return "att" not in place(site).part


def in_order(sites: Iterable[str], stacks: Sequence[str] = ()) -> list[str]:
    """The names in the order in which they run, as far as names tell: profiles list them as text, ``10`` before ``2``.

    Lists of blocks come as in ``stacks``; those not in there after them, by the words in their names: EARLY ones, then
    those without such a word, then LATE ones, as text among themselves. Inside a list by number, inside a block
    attention before feed-forwards, of attention that to the sequence itself first.
    """
    known = list(stacks)

    def key(site: str) -> tuple[int, int, str, int, bool, bool, str]:
        stack, block, part = place(site)
        words = set(re.split(r"[._]", stack))
        rank = 0 if words & EARLY else 2 if words & LATE else 1
        given = known.index(stack) if stack in known else len(known)
        return (given, rank, stack, block, feeds_forward(site), bool(CROSS & set(re.split(r"[._]", part))), part)

    return sorted(sites, key=key)


def at(profile: Profile, granularity: str, stacks: Sequence[str] = ()) -> dict[str, SiteProfile]:
    """Sites of that granularity, in the order in which they run. Raises BadOption where the profile measured none."""
    one_of("sites", granularity, GRANULARITIES)
    ((_, denoiser),) = profile.denoisers.items()
    found = in_order((name for name in denoiser.sites if parse(name).granularity == granularity), stacks)
    if not found:
        there = sorted({parse(name).granularity for name in denoiser.sites}, key=GRANULARITIES.index)
        raise BadOption("sites", granularity, f"what was measured: {', '.join(there)}. Or profile {granularity} sites")
    return {name: denoiser.sites[name] for name in found}


def shares(sites: Mapping[str, SiteProfile]) -> np.ndarray:
    """float64 [S], sum 1: of one full step's work. Work is time, operations where no time was measured, else calls."""
    calls = np.array([site.calls for site in sites.values()], float)
    for cost in ([site.seconds for site in sites.values()], [float(site.flops) for site in sites.values()]):
        if all(cost):
            calls *= cost
            break
    return np.asarray(calls / calls.sum())


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in (names := tuple(allowed)):
        raise BadOption(name, value, f"one of {', '.join(names)}")


def flag(name: str, value: object) -> bool:
    """A yes or no; specs have no word for them, so 1 and 0 will do."""
    if value not in (True, False):
        raise BadOption(name, value, "True or False, in a spec 1 or 0")
    return bool(value)


def count(name: str, value: object, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadOption(name, value, f"a whole number, {least} or more")
    return value


def whole_steps(computed_steps: float, steps: int) -> int:
    """The budget of methods that decide about whole steps."""
    if computed_steps != int(computed_steps) or not 1 <= computed_steps <= steps:
        raise BadOption("computed_steps", computed_steps, f"a whole number, 1 to {steps}")
    return int(computed_steps)
