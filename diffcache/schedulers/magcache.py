"""Reuse the residual while the drift of its magnitude is below a threshold (MagCache).

The drift is |1 − product of the residual's ratios since the newest computed step|, added up step by step.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.schedulers import Aliases, Planned, _threshold

SOURCE = "MagCache, arXiv 2506.09045, Zehong-Ma/MagCache @df81cb1"
NEEDS = "residuals"
ALIASES: Aliases = {"threshold:kind=magcache": {}}


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
        most: Steps in a row that may be predicted (K of the paper, 3 to 6). None allows any number.
        retention: The share of the steps that is always computed, beginning with the first (the paper uses 0.1 to 0.2).

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile without residuals.
    """
    return _threshold.planned(
        profile, computed_steps, error, _threshold.residual_reuse, sites=sites, most=most, retention=retention
    )


def error(name: str, site: SiteProfile) -> np.ndarray:
    """Return the drift of the residual's magnitude, float64 [T, T], averaged over the branches."""
    _threshold.demand_residual(name, site)
    return np.asarray(np.mean([drift(ratio) for ratio in site.residual_ratio], axis=0))  # type: ignore[union-attr]


def drift(ratio: np.ndarray) -> np.ndarray:
    """Return the drift of a residual's magnitude, float64 [T, T].

    At [a, i] is the sum of |1 − ratio_{a+1} ⋯ ratio_j| over the steps j after a, up to i.

    Args:
        ratio: float64 [T], the ratio of the residual's magnitude to that of the step before.
    """
    steps = len(ratio)
    after = np.triu(np.ones((steps, steps), bool), 1)
    products = np.cumprod(np.where(after, ratio, 1.0), axis=1)
    return np.cumsum(np.where(after, np.abs(1 - products), 0.0), axis=1)
