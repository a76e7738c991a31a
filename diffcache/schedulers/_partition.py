"""Cut the loop into exactly K runs of similar outputs, for CacheQuant and BAC. The first output of each run is reused.

The costs do not show that errors of a run add up because they point the same way. ``norm="coherent"`` accounts for
that. It is the squared norm of the weighted sum of a run's differences, from the Gram table. It is exact for the final
state if no step responds to errors.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.schedulers import Planned
from diffcache.schedulers._cuts import Cheapest, anchored, demand_room, following
from diffcache.schedulers._sites import at, flag, one_of, whole_steps
from diffcache.schedulers.uniform import reuse
from diffcache.simulation.runs import constant, reused, step_weights

SOURCE = "Fisher's ordered samples, JASA 53 (1958)"
NORMS = ("l1", "l2", "cosine", "coherent")


def planned(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str,
    norm: str,
    weighted: bool,
    bounded: bool,
    per_site: bool,
    unified: bool = False,
) -> Planned:
    """Return the best cut into exactly ``computed_steps`` runs, with plain reuse within them.

    Args:
        profile: The measured tables.
        computed_steps: The number of runs, a whole number.
        sites: The granularity.
        norm: "l1", "l2" (squared), "cosine" (1 − similarity) or "coherent"; means over elements and branches.
        weighted: Whether each step's error counts by the absolute weight that the sampler gives the step. The weight
            is squared for "l2" and "cosine".
        bounded: Whether runs take ceil(N/2) to 2N steps, N = ceil(T/K).
        per_site: Whether every site has a mask. Otherwise one mask serves all, and their errors are added up.
        unified: Whether the best mask of the site that runs first serves all sites, as in BAC's ablation.

    Raises:
        BadOption: For an option out of range, or if there is no such cut.
    """
    one_of("norm", norm, NORMS)
    weighted, bounded, per_site = flag("weighted", weighted), flag("bounded", bounded), flag("per_site", per_site)
    unified = flag("unified", unified)
    runs = whole_steps(computed_steps, profile.steps)
    least, most = bounds(profile.steps, runs) if bounded else (1, profile.steps)
    demand_room(profile.steps, runs, least, most)
    measured = at(profile, sites)
    weights = step_weights(profile) if weighted else np.ones(profile.steps)
    counted = list(measured)[:1] if unified else list(measured)  # sites whose errors count, in the order of execution
    cost = np.stack([costs(profile, name, measured[name], norm, weights) for name in counted])
    cost = np.where(following(profile.steps, least, most), cost, np.inf)
    if per_site and not unified:
        masks = Cheapest(cost, runs).compute(runs)
    else:
        masks = np.broadcast_to(Cheapest(cost.sum(0), runs).compute(runs), (len(measured), profile.steps))
    notes = {"unified": counted[0]} if unified else {}
    return Planned(sites={name: reuse(mask) for name, mask in zip(measured, masks, strict=True)}, notes=notes)


def bounds(steps: int, runs: int) -> tuple[int, int]:
    """Return the lengths of the shortest and the longest run that CacheQuant allows, in steps.

    Such runs always exist, because T/K is above N − 1 and not above N.
    """
    usual = math.ceil(steps / runs)
    return math.ceil(usual / 2), 2 * usual


def costs(profile: Profile, name: str, site: SiteProfile, norm: str, weights: np.ndarray) -> np.ndarray:
    """Return the costs of reusing the site's output of step a up to the step before b, float64 [T, T + 1] at [a, b].

    Args:
        profile: The measured tables.
        name: The name of the site.
        site: The profile of the site.
        norm: As in ``planned``.
        weights: float64 [T], the weights of the steps.
    """
    if norm == "l1":
        return anchored(site.output.l1.mean(0) * np.abs(weights))
    if norm == "l2":
        return anchored(site.output.squared.mean(0) * weights**2)
    if norm == "cosine":
        return anchored((1 - site.output.cosine.mean(0)) * weights**2)
    guided = name == "model" and profile.dynamics is not None  # then products of the loop's guided outputs are known
    return reused(profile.dynamics.gram if guided else site.output.gram.mean(0), constant(weights))  # type: ignore[union-attr]
