"""Reuse until the error since the newest computed step reaches a threshold (SmoothCache, ERTACache, MagCache).

``kind`` says which error, and what is reused:

smoothcache  relative L1 change of a sublayer's output, averaged over the layers of one type; every type has a mask of
             its own, all types one threshold; outputs are reused
ertacache    relative L1 change of the residual F − x of the whole model; the residual is reused
magcache     |1 − product of the residual's ratios since the newest computed step|, added up step by step; the residual
             is reused

The walk is greedy, and the errors are those of the full run: how earlier reuse bends the trajectory is not seen.
Whether a higher threshold computes fewer steps is not certain either (anchors move), so all thresholds that make a
difference are tried.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.errors import BadOption
from diffcache.profile import Profile, SiteProfile
from diffcache.schedule import SitePlan
from diffcache.schedulers import Planned
from diffcache.schedulers._sites import at, count, family, one_of, shares
from diffcache.schedulers.uniform import reuse

SOURCE = (
    "SmoothCache, arXiv 2411.10510, Roblox/SmoothCache @edeb4ed; ERTACache, arXiv 2508.21091, stage A; "
    "MagCache, arXiv 2506.09045, Zehong-Ma/MagCache @df81cb1"
)
SITES = {"smoothcache": "sublayer", "ertacache": "model", "magcache": "model"}
CANDIDATES = 1 << 14  # thresholds tried, spread by rank: 3 types of 100 steps have fewer, 1000 steps a million


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    kind: str = "ertacache",
    sites: str | None = None,
    most: int | None = None,
    retention: float = 0.0,
) -> Planned:
    """Work comes as near to ``computed_steps`` as a threshold brings it, and not above.

    kind       "smoothcache", "ertacache" or "magcache"
    sites      granularity; None: sublayers for smoothcache, the model for the others
    most       steps in a row that may be predicted (MagCache's K: 3 to 6); None: any number
    retention  share of the steps, the first ones, that are always computed (MagCache: 0.1 to 0.2)

    Raises BadOption; also for a profile without residuals, where they are what is reused.
    """
    one_of("kind", kind, SITES)
    if most is not None:
        count("most", most, least=1)
    if isinstance(retention, bool) or not isinstance(retention, int | float) or not 0 <= retention <= 1:
        raise BadOption("retention", retention, "a share of the steps, 0 to 1")
    measured = at(profile, sites or SITES[kind])
    families: dict[str, list[str]] = {}
    for name in measured:
        families.setdefault(family(name), []).append(name)
    error = np.stack([np.mean([_error(kind, n, measured[n]) for n in names], axis=0) for names in families.values()])
    share = dict(zip(measured, shares(measured), strict=True))
    weight = np.array([sum(share[name] for name in names) for names in families.values()])

    limits = candidates(error)
    masks = walks(error, limits, profile.steps if most is None else most, math.ceil(retention * profile.steps - 1e-9))
    work = masks.sum(-1) @ weight
    affordable = work <= computed_steps + 1e-9
    if not affordable.any():
        allowed = f"{work.min():.4g} or more with retention={retention:g} and most={most}"
        raise BadOption("computed_steps", computed_steps, allowed)
    best = int(np.where(affordable, work, -1).argmax())  # the lowest of those that do as much work
    return Planned(
        sites={
            name: reuse(mask) if kind == "smoothcache" else residual_reuse(mask)
            for names, mask in zip(families.values(), masks[best], strict=True)
            for name in names
        },
        notes={"threshold": f"{limits[best]:.6g}", "work": f"{work[best]:.6g} full steps"},
    )


def residual_reuse(compute: np.ndarray) -> SitePlan:
    """x_i + (F − x) of the newest computed step, at every step that ``compute`` (bool [T]) leaves out."""
    ones = np.where(compute, 0.0, 1.0)[None]
    return SitePlan(compute=compute, weights=ones[:, :, None], kappa=ones)


def candidates(error: np.ndarray) -> np.ndarray:
    """Thresholds, rising: 0 (all computed), one between any two errors next to each other, one above them all."""
    steps = error.shape[-1]
    values = np.unique(error[:, np.triu(np.ones((steps, steps), bool), 1)])
    if not len(values):
        return np.zeros(1)
    between = (values[1:] + values[:-1]) / 2
    if len(between) > CANDIDATES:
        between = between[np.linspace(0, len(between) - 1, CANDIDATES).astype(int)]
    return np.concatenate([[0.0], between, [2 * values[-1] + 1e-12]])


def walks(error: np.ndarray, limits: np.ndarray, most: int, first: int) -> np.ndarray:
    """bool [N, G, T], computed steps for each of N limits: a step is reused where its error is below the limit.

    error  float64 [G, T, T], at [a, i]: of step i if step a is the newest that was computed
    most   steps in a row that may be reused
    first  steps at the beginning that are computed whatever the error
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


def _error(kind: str, name: str, site: SiteProfile) -> np.ndarray:
    """float64 [T, T], at [a, i]: of step i when step a is the newest computed one; mean over the branches."""
    if kind == "smoothcache":
        return np.asarray(site.output.relative_l1.mean(0))
    if site.residual is None or site.residual_ratio is None:
        raise BadOption("profile", f"one without a residual of {name!r}", "sites whose input has the output's shape")
    if kind == "ertacache":
        return np.asarray(site.residual.relative_l1.mean(0))
    return np.asarray(np.mean([_drift(ratio) for ratio in site.residual_ratio], axis=0))


def _drift(ratio: np.ndarray) -> np.ndarray:
    """float64 [T, T], at [a, i]: sum over the steps j after a, up to i, of |1 − ratio_{a+1} ⋯ ratio_j|."""
    steps = len(ratio)
    after = np.triu(np.ones((steps, steps), bool), 1)
    products = np.cumprod(np.where(after, ratio, 1.0), axis=1)
    return np.cumsum(np.where(after, np.abs(1 - products), 0.0), axis=1)
