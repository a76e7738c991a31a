"""The sites of a profile as schedulers see them: of one granularity, in the order in which they run, with costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.sites import GRANULARITIES, in_order, parse
from diffcache.errors import BadOption


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
