"""Spread a compute budget over sites and steps by their effect on the final state (this project).

The result is a table of sites and steps like the tables that HarmoniCa and Learning-to-Cache train. Here nothing is
trained. If an output F_a, kept from step a, replaces F_t, the mean square error of the final state is estimated as

    e[t, a] = (reach of step t)² · influence of the site at t · mean square of F_a − F_t

The influence converts the site's error into the denoiser's error. The reach is how far the final state moves per unit
of error in the output of step t, if all later steps respond to the error of the state. Errors of different sites and
steps are added up as if they were independent. Errors of sites that are reused together can partly cancel, which tables
of single sites do not show. With this assumption a price on work separates the sites. For each site an exact dynamic
program over its steps finds the best choice. The price is raised until the budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Planned, uniform
from diffcache.schedulers._cuts import Cheapest, anchored, following
from diffcache.schedulers._sites import at, count, one_of
from diffcache.simulation.runs import step_influence

SOURCE = (
    "this project; tables of HarmoniCa, arXiv 2410.01723, and Learning-to-Cache, arXiv 2406.01733, without training"
)
NEEDS = "the sites that it plans"
GROUP = "inside the network"
ROUNDING = 1e-9  # tolerance relative to the budget, because the sums of costs depend on the order of addition


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "block",
    reuse: str | None = None,
    cost: str = "measured",
    max_age: int | None = None,
) -> Planned:
    """Plan to the work of ``computed_steps`` full steps.

    Work includes everything outside the sites, which always runs.

    Args:
        profile: The measured tables of the sites, with influence.
        computed_steps: The work to do, in full steps.
        sites: The granularity.
        reuse: "output" or "residual" (what the site adds to its input). None reuses the output of sublayers and the
            residual of blocks and stacks, because an old output of these would discard the work of the sites before
            them.
        cost: The cost of a site's call: "seconds", "flops", or "measured" (seconds if the profile has them, else
            operations).
        max_age: The most steps that an output may be reused for. None allows any number.

    Raises:
        BadOption: For an option out of range, a profile without influence, or a budget that the work outside the sites
            uses up.
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
            "them and always runs, and each site runs until an output of it is kept",
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
    """Return the errors e of the module's formula, float64 [S, T, T] at [site, a, t], averaged over the branches.

    Without dynamics, the reach of every step is 1.

    Args:
        profile: The measured tables.
        sites: Site -> its profile.
        reuse: "output" or "residual".
    """
    weight = np.ones(profile.steps)
    if profile.dynamics is not None:  # influence of step t, if all steps from t + 1 on respond
        weight = np.diagonal(step_influence(profile.dynamics)[1:]) ** 2
    return np.stack([weight * _moved(name, site, reuse) for name, site in sites.items()])


def counts_within(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Return how often each site is computed within a budget, int [S].

    Of the prices that change the choice, take the lowest one whose choice costs at most the budget. Then add the steps
    that reduce the error most per cost, as long as they fit. The rest of the budget is less than the cheapest further
    step, or no further step would help.

    Args:
        errors: float64 [S, T], the error of the best plan with exactly k computed steps, at [site, k − 1]. It is inf if
            there is no such plan.
        costs: float64 [S], the cost of one computed step of each site.
        budget: The limit of the total cost. It is enough for the fewest steps that each site needs.
    """
    most = errors.shape[1]
    budget += ROUNDING * abs(budget)
    fewer, more = np.triu_indices(most, 1)
    with np.errstate(invalid="ignore"):  # inf − inf
        slopes = (errors[:, fewer] - errors[:, more]) / ((more - fewer) * costs[:, None])
    prices = np.unique(np.append(slopes[np.isfinite(slopes) & (slopes > 0)], 0.0))
    prices = np.append(prices, 2 * prices[-1])  # no step is worth this price, regardless of rounding
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
    """Return how often each site is computed at a price of work, int [S].

    Of equal choices, the one with fewer steps is taken.
    """
    paid = price * costs[:, None] * np.arange(1, errors.shape[1] + 1)
    return np.asarray((errors + paid).argmin(-1) + 1)


def _moved(name: str, site: SiteProfile, reuse: str) -> np.ndarray:
    """Return the mean square change of the denoiser's output if a site's step t reuses the value of step a.

    Args:
        name: The name of the site.
        site: The profile of the site.
        reuse: "output" or "residual".

    Returns:
        float64 [T, T], at [a, t].

    Raises:
        BadOption: If the profile has no influence, or no residual, of the site.
    """
    if site.influence is None:
        kind = name.partition(":")[0]
        raise Unusable(
            "profile",
            f"it has no influence of {name!r}",
            f"Pass a profile that measured it: diffcache.measure(pipe, calls, sites={kind!r})",
        )
    tables = site.output if reuse == "output" else site.residual
    if tables is None:
        raise BadOption("reuse", reuse, f"output: {name!r} has no residual, because its input has another shape")
    return np.asarray(site.influence * tables.squared.mean(0))


def work(profile: Profile, sites: Mapping[str, SiteProfile], cost: str = "measured") -> tuple[np.ndarray, float]:
    """Return the cost of one step: float64 [S] of the sites, and that of everything outside the sites.

    Args:
        profile: The measured tables.
        sites: Site -> its profile.
        cost: "seconds", "flops" or "measured", as in ``plan``.

    Raises:
        BadOption: If the profile did not measure the cost of every site.
    """
    one_of("cost", cost, ("measured", "seconds", "flops"))
    everything = [at(profile, "model")["model"], *sites.values()]
    for unit in ("seconds", "flops") if cost == "measured" else (cost,):
        model, *inside = (float(getattr(site, unit)) * site.calls for site in everything)
        if all(inside):  # measured apart, parts can add up to more than the whole
            return np.array(inside), max(model - sum(inside), 0.0)
    raise Unusable(
        f"cost={cost!r}", "the profile did not measure it for every site", "Measure the pipeline again, on its device"
    )


def _plan(mask: np.ndarray, reuse: str) -> SitePlan:
    """Return the plan of one site: reuse of its output or residual where ``mask`` (bool [T]) is False."""
    found = uniform.reuse(mask)
    if reuse == "output":
        return found
    return SitePlan(compute=mask, weights=found.weights, kappa=found.weights[:, :, 0])
