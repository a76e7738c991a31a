"""Reuse a sublayer's output while its relative change is below a threshold (SmoothCache).

The change is averaged over the layers of one type. Every type has a mask; all types share one threshold.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.schedulers import Aliases, Planned, _threshold
from diffcache.schedulers.uniform import reuse

SOURCE = "SmoothCache, arXiv 2411.10510, Roblox/SmoothCache @edeb4ed"
NEEDS = "sublayers"
GROUP = "inside the network"
ALIASES: Aliases = {"threshold:kind=smoothcache": {}}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "sublayer",
    most: int | None = None,
    retention: float = 0.0,
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``.

    Args:
        profile: The measured tables.
        computed_steps: The work to do, in full steps.
        sites: The granularity.
        most: Steps in a row that may be predicted. None allows any number.
        retention: The share of the steps that is always computed, from the first one on.

    Raises:
        BadOption: For an option out of range, or a budget that no threshold meets.
    """
    return _threshold.planned(profile, computed_steps, error, reuse, sites=sites, most=most, retention=retention)


def error(name: str, site: SiteProfile) -> np.ndarray:
    """Return the relative L1 change of the output, float64 [T, T], averaged over the branches."""
    return np.asarray(site.output.relative_l1.mean(0))
