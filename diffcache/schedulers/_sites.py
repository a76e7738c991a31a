"""Select the sites and the dynamics of a profile, and check options of schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from diffcache.documents.profile import Dynamics, Profile, SiteProfile
from diffcache.documents.sites import GRANULARITIES, in_order, parse
from diffcache.errors import BadOption, Unusable


def at(profile: Profile, granularity: str, stacks: Sequence[str] = ()) -> dict[str, SiteProfile]:
    """Return the sites of a granularity in the order in which they run.

    Args:
        profile: The profile.
        granularity: One of ``GRANULARITIES``.
        stacks: Lists of blocks in the order in which they run. Empty orders them by name.

    Raises:
        BadOption: If the profile has no such sites, or there is no such granularity.
    """
    one_of("sites", granularity, GRANULARITIES)
    ((_, denoiser),) = profile.denoisers.items()
    found = in_order((name for name in denoiser.sites if parse(name).granularity == granularity), stacks)
    if not found:
        there = sorted({parse(name).granularity for name in denoiser.sites}, key=GRANULARITIES.index)
        both = ",".join(sorted({*there, granularity}, key=GRANULARITIES.index))
        raise Unusable(
            "profile",
            f"it measured {', '.join(there)} sites, and {granularity} sites are needed",
            f"Measure both: diffcache profile … --sites {both}",
        )
    return {name: denoiser.sites[name] for name in found}


def dynamics_of(profile: Profile, otherwise: str = "") -> Dynamics:
    """Return the dynamics of a profile.

    Args:
        profile: The profile.
        otherwise: Another next step for the error, such as an option that needs no dynamics.

    Raises:
        BadOption: For a profile without dynamics.
    """
    if profile.dynamics is None:
        reason = profile.provenance.get("no_dynamics", "none were measured")
        next_step = "Pass a profile with dynamics" + (f", or {otherwise}" if otherwise else "")
        raise Unusable("profile", f"it has no dynamics ({reason})", next_step)
    return profile.dynamics


def shares(sites: Mapping[str, SiteProfile]) -> np.ndarray:
    """Return each site's share of one full step's work, float64 [S] with sum 1.

    Work is measured in seconds; in operations if no time was measured; else in calls.
    """
    calls = np.array([site.calls for site in sites.values()], float)
    for cost in ([site.seconds for site in sites.values()], [float(site.flops) for site in sites.values()]):
        if all(cost):
            calls *= cost
            break
    return np.asarray(calls / calls.sum())


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise BadOption unless the option ``name`` has an allowed value."""
    if value not in (names := tuple(allowed)):
        raise BadOption(name, value, f"one of {', '.join(names)}")


def flag(name: str, value: object) -> bool:
    """Return an option as a bool. In specs it is 1 or 0. Raise BadOption for another value."""
    if value not in (True, False):
        raise BadOption(name, value, "True or False, in a spec 1 or 0")
    return bool(value)


def count(name: str, value: object, least: int = 0) -> int:
    """Return an option that is a whole number, ``least`` or more. Raise BadOption for another value."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadOption(name, value, f"a whole number, {least} or more")
    return value


def whole_steps(computed_steps: float, steps: int) -> int:
    """Return the budget as an int, for methods that decide about whole steps.

    Raise BadOption if it is not a whole number.
    """
    if computed_steps != int(computed_steps) or not 1 <= computed_steps <= steps:
        raise BadOption("computed_steps", computed_steps, f"a whole number, 1 to {steps}")
    return int(computed_steps)
