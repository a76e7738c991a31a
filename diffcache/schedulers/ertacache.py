"""Reuse the residual while its relative L1 change is below a threshold (ERTACache).

The residual is F − x. ERTACache also moves the noise levels: ``timestep_adjustment`` does that for any mask.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.schedulers import Aliases, Planned, _threshold

SOURCE = "ERTACache, arXiv 2508.21091, stage A"
NEEDS = "residuals"
ALIASES: Aliases = {"threshold": {}, "threshold:kind=ertacache": {}}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "model",
    most: int | None = None,
    retention: float = 0.0,
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``.

    Args:
        profile: The measured tables, with residuals.
        computed_steps: The work to do, in full steps.
        sites: The granularity.
        most: Steps in a row that may be predicted. None allows any number.
        retention: The share of the steps that is always computed, from the first one on.

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile without residuals.
    """
    return _threshold.planned(
        profile, computed_steps, error, _threshold.residual_reuse, sites=sites, most=most, retention=retention
    )


def error(name: str, site: SiteProfile) -> np.ndarray:
    """Return the relative L1 change of the residual, float64 [T, T], averaged over the branches."""
    _threshold.demand_residual(name, site)
    return np.asarray(site.residual.relative_l1.mean(0))  # type: ignore[union-attr]
