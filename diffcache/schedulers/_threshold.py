"""Reuse until the error since the newest computed step reaches a threshold, for SmoothCache, ERTACache and MagCache.

The walk is greedy, and the errors are those of the full run: it does not account for the effect of earlier reuse on the
trajectory. A higher threshold does not always compute fewer steps, because anchors move. So all thresholds that make a
difference are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import SitePlan
from diffcache.documents.sites import family
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Planned
from diffcache.schedulers._sites import at, count, shares

Error = Callable[[str, SiteProfile], np.ndarray]  # (site, its profile) -> float64 [T, T]
CANDIDATES = 1 << 14  # thresholds tried, spread by rank: 3 types of 100 steps have fewer, 1000 steps a million


def planned(
    profile: Profile,
    computed_steps: float,
    error: Error,
    reused: Callable[[np.ndarray], SitePlan],
    *,
    sites: str,
    most: int | None,
    retention: float,
) -> Planned:
    """Return the plan whose work is nearest to ``computed_steps``, and not above.

    Args:
        profile: The measured tables.
        computed_steps: The work to do, in full steps.
        error: Returns, at [a, i], the error of step i if step a is the newest computed one. Sites of one type share
            the mean of their errors, and a mask.
        reused: Returns the plan of a mask, bool [T].
        sites: The granularity.
        most: Steps in a row that may be predicted. None allows any number.
        retention: The share of the steps that is always computed, from the first one on.

    Raises:
        BadOption: For an option out of range, or a budget that no threshold meets.
    """
    if most is not None:
        count("most", most, least=1)
    demand_number("retention", retention, "a share of the steps, 0 to 1", highest=1.0)
    measured = at(profile, sites)
    families: dict[str, list[str]] = {}
    for name in measured:
        families.setdefault(family(name), []).append(name)
    errors = np.stack([np.mean([error(n, measured[n]) for n in names], axis=0) for names in families.values()])
    share = dict(zip(measured, shares(measured), strict=True))
    weight = np.array([sum(share[name] for name in names) for names in families.values()])

    limits = candidates(errors)
    masks = walks(errors, limits, profile.steps if most is None else most, math.ceil(retention * profile.steps - 1e-9))
    work = masks.sum(-1) @ weight
    affordable = work <= computed_steps + 1e-9
    if not affordable.any():
        allowed = f"{work.min():.4g} or more with retention={retention:g} and most={most}"
        raise BadOption("computed_steps", computed_steps, allowed)
    best = int(np.where(affordable, work, -1).argmax())  # the lowest of those that do as much work
    return Planned(
        sites={
            name: reused(mask) for names, mask in zip(families.values(), masks[best], strict=True) for name in names
        },
        notes={"threshold": f"{limits[best]:.6g}", "work": f"{work[best]:.6g} full steps"},
    )


def demand_number(name: str, value: object, allowed: str, highest: float = math.inf) -> None:
    """Raise BadOption unless an option is a finite number from 0 to ``highest``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 <= value <= highest:  # type: ignore[operator]
        raise BadOption(name, value, allowed)


def demand_residual(name: str, site: SiteProfile) -> None:
    """Raise BadOption unless the profile has the tables of the site's residual F − x."""
    if site.residual is None or site.residual_ratio is None:
        raise Unusable(
            "profile", f"it has no residual of {name!r}", "Choose sites with inputs and outputs of the same shape"
        )


def residual_reuse(compute: np.ndarray) -> SitePlan:
    """Return the plan that predicts x_i + (F − x) of the newest computed step where ``compute`` (bool [T]) is False."""
    ones = np.where(compute, 0.0, 1.0)[None]
    return SitePlan(compute=compute, weights=ones[:, :, None], kappa=ones)


def candidates(error: np.ndarray) -> np.ndarray:
    """Return thresholds in ascending order: 0, one between any two neighbouring errors, one above all errors."""
    steps = error.shape[-1]
    values = np.unique(error[:, np.triu(np.ones((steps, steps), bool), 1)])
    if not len(values):
        return np.zeros(1)
    between = (values[1:] + values[:-1]) / 2
    if len(between) > CANDIDATES:
        between = between[np.linspace(0, len(between) - 1, CANDIDATES).astype(int)]
    return np.concatenate([[0.0], between, [2 * values[-1] + 1e-12]])


def walks(error: np.ndarray, limits: np.ndarray, most: int, first: int) -> np.ndarray:
    """Return the computed steps for each of N limits, bool [N, G, T]. A step with an error below the limit is reused.

    Args:
        error: float64 [G, T, T]. At [a, i] is the error of step i if step a is the newest computed step.
        limits: [N].
        most: Steps in a row that may be reused.
        first: Steps at the beginning that are always computed.
    """
    groups, steps, _ = error.shape
    masks = np.ones((len(limits), groups, steps), bool)
    first = max(first, 1)
    newest = np.full((len(limits), groups), first - 1)
    for i in range(first, steps):
        below = error[np.arange(groups), newest, i] < limits[:, None]
        masks[:, :, i] = ~below | (i - newest > most)
        newest[masks[:, :, i]] = i
    return masks
