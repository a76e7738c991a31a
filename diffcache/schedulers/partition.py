"""The loop cut into exactly K runs of like outputs, the first of each standing for the rest (CacheQuant; BAC).

``kind`` sets the options that are left at None:

dps  CacheQuant's schedule: one mask for all sites, L1 distances added up over them, runs of ceil(N/2) to 2N steps for
     N = ceil(T/K). Each step's distance is weighed by how far the step moves the final state; the paper does without
     (``weighted=0``).
acs  BAC's adaptive caching scheduler: every sublayer has a mask of its own, cosine similarity, lengths free.
     Similarity is that of each step to the computed step whose output it is given (the authors' code), not to the step
     before it: a sum over those would only pick the K - 1 largest single changes, however close together.
     ``unified=1`` is the schedule that BAC's ablation calls unified: the first sublayer's mask for all of them.

Neither sees that errors of a run add up: they point the same way. ``norm="coherent"`` does: of each run, the square of
the weighed sum of its differences, from the Gram table; exact for the final state if nothing answers to errors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffcache.errors import BadOption
from diffcache.profile import Profile, SiteProfile
from diffcache.schedulers import Planned
from diffcache.schedulers._cuts import Cheapest, anchored, demand_room, following
from diffcache.schedulers._runs import constant, reused, step_weights
from diffcache.schedulers._sites import at, flag, one_of, whole_steps
from diffcache.schedulers.uniform import reuse

SOURCE = (
    "CacheQuant, arXiv 2503.01323, BienLuky/CacheQuant @9470ddf (dps); "
    "BAC, arXiv 2506.13456, ky-ji/HAS @2ddd2a6 (acs); Fisher's ordered samples, JASA 53 (1958)"
)
NORMS = ("l1", "l2", "cosine", "coherent")
KINDS: dict[str, dict[str, Any]] = {
    "dps": {"sites": "model", "norm": "l1", "weighted": True, "bounded": True, "per_site": False},
    "acs": {"sites": "sublayer", "norm": "cosine", "weighted": False, "bounded": False, "per_site": True},
}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    kind: str = "dps",
    sites: str | None = None,
    norm: str | None = None,
    weighted: bool | None = None,
    bounded: bool | None = None,
    per_site: bool | None = None,
    unified: bool = False,
) -> Planned:
    """Exactly ``computed_steps`` runs; plain reuse within them.

    kind      "dps" or "acs": what the other options are where they are None
    sites     granularity
    norm      "l1", "l2" (squared), "cosine" (1 - similarity) or "coherent"; means over elements and branches
    weighted  each step's error by the sampler's own weight of the step, absolute; squared for "l2" and "cosine"
    bounded   no run shorter than ceil(N/2) or longer than 2N steps, N = ceil(T/K)
    per_site  a mask for each site, instead of one for all, whose errors are added up
    unified   one mask for all: the best one of the site that runs first, as in BAC's ablation; instead of ``per_site``

    Raises BadOption.
    """
    one_of("kind", kind, KINDS)
    given = {"sites": sites, "norm": norm, "weighted": weighted, "bounded": bounded, "per_site": per_site}
    chosen = KINDS[kind] | {name: value for name, value in given.items() if value is not None}
    one_of("norm", chosen["norm"], NORMS)
    for name in ("weighted", "bounded", "per_site"):
        chosen[name] = flag(name, chosen[name])
    if unified := flag("unified", unified):
        if per_site:
            raise BadOption("unified", True, "False, where per_site gives every site a mask of its own")
        chosen["per_site"] = False  # what the kind says is overruled; what the caller says is not
    runs = whole_steps(computed_steps, profile.steps)
    least, most = bounds(profile.steps, runs) if chosen["bounded"] else (1, profile.steps)
    demand_room(profile.steps, runs, least, most)
    measured = at(profile, chosen["sites"])
    weights = step_weights(profile) if chosen["weighted"] else np.ones(profile.steps)
    heard = list(measured)[:1] if unified else list(measured)  # whose errors count; the first runs first
    cost = np.stack([costs(profile, name, measured[name], chosen["norm"], weights) for name in heard])
    cost = np.where(following(profile.steps, least, most), cost, np.inf)
    if chosen["per_site"]:
        masks = Cheapest(cost, runs).compute(runs)
    else:
        masks = np.broadcast_to(Cheapest(cost.sum(0), runs).compute(runs), (len(measured), profile.steps))
    notes = {"unified": heard[0]} if unified else {}
    return Planned(sites={name: reuse(mask) for name, mask in zip(measured, masks, strict=True)}, notes=notes)


def bounds(steps: int, runs: int) -> tuple[int, int]:
    """Shortest and longest run that CacheQuant allows. There is always room: T/K lies above N - 1 and not above N."""
    usual = math.ceil(steps / runs)
    return math.ceil(usual / 2), 2 * usual


def costs(profile: Profile, name: str, site: SiteProfile, norm: str, weights: np.ndarray) -> np.ndarray:
    """float64 [T, T + 1], at [a, b]: of reusing the site's output of step a up to the step before b.

    weights  float64 [T], of the steps
    """
    if norm == "l1":
        return anchored(site.output.l1.mean(0) * np.abs(weights))
    if norm == "l2":
        return anchored(site.output.squared.mean(0) * weights**2)
    if norm == "cosine":
        return anchored((1 - site.output.cosine.mean(0)) * weights**2)
    guided = name == "model" and profile.dynamics is not None  # then the products of what the loop is handed are known
    return reused(profile.dynamics.gram if guided else site.output.gram.mean(0), constant(weights))  # type: ignore[union-attr]
