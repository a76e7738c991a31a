"""Spread a compute budget over sites and steps by their effect on the final state (this project).

The result is a table of sites and steps as HarmoniCa and Learning-to-Cache train one. Here nothing is trained: in the
place of F_t, an output F_a kept from step a makes an error in the final state of

    e[t, a] = (reach of step t)² · influence of the site at t · mean square of F_a − F_t

Influence turns the site's error into the denoiser's; the reach is how far the final state moves per unit of what step t
is handed, with all later steps answering the state's error. Errors of different sites and steps are added up as if they
were independent; sites that age together can make smaller ones, of which no table of single sites tells. Then sites do
not know of each other, and a price on work decides for each of them alone, exactly, by a dynamic program over its
steps; the price is raised until the budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Planned, uniform
from diffcache.schedulers._cuts import Cheapest, anchored, following
from diffcache.schedulers._sites import at, count, one_of
from diffcache.simulation.runs import step_influence

SOURCE = (
    "this project; tables of HarmoniCa, arXiv 2410.01723, and Learning-to-Cache, arXiv 2406.01733, without training"
)
NEEDS = "the sites that it plans"
GROUP = "inside the network"
ROUNDING = 1e-9  # of the budget: sums of costs come in any order


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "block",
    reuse: str | None = None,
    cost: str = "measured",
    max_age: int | None = None,
) -> Planned:
    """``computed_steps``: work of that many full steps, what lies outside the sites included. That part always runs.

    sites    granularity
    reuse    "output", or "residual": what the site adds to its input. None: the residual of blocks and stacks, for with
             an old output they would hand on nothing of what ran before them; else the output
    cost     of a site's call: "seconds", "flops", or "measured": seconds where the profile has them, else operations
    max_age  most steps that one output may serve after its own

    Raises BadOption; for a profile without influence, and for a budget that what always runs uses up.
    """
    reuse = reuse or ("output" if sites == "sublayer" else "residual")
    one_of("reuse", reuse, ("output", "residual"))
    measured = at(profile, sites)
    longest = None if max_age is None else count("max_age", max_age) + 1
    table = np.where(following(profile.steps, most=longest), anchored(errors(profile, measured, reuse)), np.inf)
    costs, outside = work(profile, measured, cost)
    cheapest = Cheapest(table, profile.steps)
    by_count = np.stack([cheapest.total(k) for k in range(1, profile.steps + 1)], axis=-1)
    full = outside + costs.sum()
    always = profile.steps * outside
    least = always + costs @ (np.isfinite(by_count).argmax(-1) + 1)
    if computed_steps * full < least * (1 - ROUNDING):
        raise BadOption(
            "computed_steps",
            computed_steps,
            f"{least / full:.4g} to {profile.steps} for {sites} sites: {outside / full:.0%} of a step lies outside "
            "them, which always runs, and they run where nothing is kept for them",
        )
    counts = counts_within(by_count, costs, computed_steps * full - always)
    masks = np.stack([cheapest.compute(int(k))[j] for j, k in enumerate(counts)])
    kept = sum(s.output_bytes * s.calls for s, k in zip(measured.values(), counts, strict=True) if k < profile.steps)
    return Planned(
        sites={name: _plan(mask, reuse) for name, mask in zip(measured, masks, strict=True)},
        notes={
            "work": f"{(always + costs @ counts) / full:.4g} of {profile.steps} full steps",
            "always runs": f"{outside / full:.1%} of a step, outside the sites",
            "memory": f"{kept * (2 if reuse == 'residual' else 1)} bytes kept",
        },
    )


def errors(profile: Profile, sites: Mapping[str, SiteProfile], reuse: str = "output") -> np.ndarray:
    """float64 [S, T, T], e at [site, a, t]; means over branches. Without dynamics every step reaches as far."""
    weight = np.ones(profile.steps)
    if profile.dynamics is not None:  # of step t, when all steps from t + 1 on answer
        weight = np.diagonal(step_influence(profile.dynamics)[1:]) ** 2
    return np.stack([weight * _moved(name, site, reuse) for name, site in sites.items()])


def counts_within(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """int [S]: how often each site is computed.

    errors  float64 [S, T], of the best plan with exactly k computed steps, at [site, k - 1]; inf where there is none
    costs   float64 [S], of one computed step
    budget  of what they cost together; enough for the fewest steps that each site can do with

    Of the prices that matter, the lowest that keeps to the budget; then, for what it leaves, the best steps that still
    fit. What stays unspent buys nothing: it is less than the cheapest further step, or no step would help.
    """
    most = errors.shape[1]
    budget += ROUNDING * abs(budget)
    fewer, more = np.triu_indices(most, 1)
    with np.errstate(invalid="ignore"):  # inf less inf
        slopes = (errors[:, fewer] - errors[:, more]) / ((more - fewer) * costs[:, None])
    prices = np.unique(np.append(slopes[np.isfinite(slopes) & (slopes > 0)], 0.0))
    prices = np.append(prices, 2 * prices[-1])  # nothing is worth this, whatever the rounding
    low, high = 0, len(prices) - 1
    while low < high:
        middle = (low + high) // 2
        if costs @ at_price(errors, costs, prices[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    counts = at_price(errors, costs, prices[low])
    every = np.arange(1, most + 1)
    while True:
        gain = errors[np.arange(len(counts)), counts - 1][:, None] - errors
        extra = (every - counts[:, None]) * costs[:, None]
        fits = (extra > 0) & (extra <= budget - costs @ counts) & (gain > 0)
        if not fits.any():
            return counts
        site, index = np.unravel_index(np.where(fits, gain / np.where(fits, extra, 1), -1).argmax(), gain.shape)
        counts[site] = every[index]


def at_price(errors: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """int [S]: how often each site is computed where work has this price; on a tie, less often."""
    paid = price * costs[:, None] * np.arange(1, errors.shape[1] + 1)
    return np.asarray((errors + paid).argmin(-1) + 1)


def _moved(name: str, site: SiteProfile, reuse: str) -> np.ndarray:
    """float64 [T, T], at [a, t]: how far the denoiser's output moves, mean square, when step t gets what step a had."""
    if site.influence is None:
        kind = name.partition(":")[0]
        allowed = f"a profile that measured it: diffcache.measure(pipe, calls, sites={kind!r})"
        raise BadOption("profile", f"one without the influence of {name!r}", allowed)
    tables = site.output if reuse == "output" else site.residual
    if tables is None:
        raise BadOption("reuse", reuse, f"output: {name!r} has no residual, its output is shaped unlike its input")
    return np.asarray(site.influence * tables.squared.mean(0))


def work(profile: Profile, sites: Mapping[str, SiteProfile], cost: str = "measured") -> tuple[np.ndarray, float]:
    """What one step costs: float64 [S], of each site; and of what lies outside them all. ``cost`` as for plan."""
    one_of("cost", cost, ("measured", "seconds", "flops"))
    everything = [at(profile, "model")["model"], *sites.values()]
    for unit in ("seconds", "flops") if cost == "measured" else (cost,):
        model, *inside = (float(getattr(site, unit)) * site.calls for site in everything)
        if all(inside):  # measured apart, parts can add up to more than the whole
            return np.array(inside), max(model - sum(inside), 0.0)
    raise BadOption("cost", cost, "what the profile measured; it says neither seconds nor flops of every site")


def _plan(mask: np.ndarray, reuse: str) -> SitePlan:
    found = uniform.reuse(mask)
    if reuse == "output":
        return found
    return SitePlan(compute=mask, weights=found.weights, kappa=found.weights[:, :, 0])
