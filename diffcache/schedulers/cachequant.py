"""Runs of similar outputs by L1 distance, with one mask for all sites (CacheQuant).

This is the dynamic programming schedule (DPS) of the paper. Runs take ceil(N/2) to 2N steps, N = ceil(T/K). The
distance of each step is weighted by how far the step moves the final state. The paper does not weight it
(``weighted=0``).
"""

from __future__ import annotations

from diffcache.documents.profile import Profile
from diffcache.schedulers import Aliases, Planned, _partition

SOURCE = f"CacheQuant, arXiv 2503.01323, BienLuky/CacheQuant @9470ddf; {_partition.SOURCE}"
NEEDS = ""
ALIASES: Aliases = {"partition": {}, "partition:kind=dps": {}}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "model",
    norm: str = "l1",
    weighted: bool = True,
    bounded: bool = True,
    per_site: bool = False,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables.
        computed_steps: A whole number.
        sites: The granularity.
        norm: "l1", "l2" (squared), "cosine" (1 − similarity) or "coherent" (the error of a whole run).
        weighted: Whether a step's distance counts by how far the step moves the final state.
        bounded: Whether runs take ceil(N/2) to 2N steps.
        per_site: Whether every site has a mask.

    Raises:
        BadOption: For an option out of range, or if there is no such cut.
    """
    return _partition.planned(
        profile, computed_steps, sites=sites, norm=norm, weighted=weighted, bounded=bounded, per_site=per_site
    )
