"""Choose the format in which each site keeps its outputs: the least error that fits into memory.

An output kept in a format has a measured error e. A prediction from such outputs with weights w has the error
Σ_k w_k² e. In the final state this is, summed over the predicted steps t of a site,

    (reach of step t)² · influence of the site at t · Σ_k w_k² · e

if errors of sites and steps are independent. Choosing the formats of all sites is a knapsack problem with one choice
for each site. It is filled as its linear relaxation suggests. Then the remaining bytes are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import get_args

import numpy as np

from diffcache.documents.profile import KeptProfile, Profile, SiteProfile
from diffcache.documents.schedule import SitePlan, StoreFormat
from diffcache.errors import Unusable
from diffcache.schedulers import Planned
from diffcache.simulation.runs import step_influence


def fit_formats(profile: Profile, sites: Mapping[str, SiteProfile], planned: Planned, most: int) -> Planned | None:
    """Choose a format for every site, so that at most ``most`` bytes are kept at one time.

    Args:
        profile: The measured tables.
        sites: Site -> its profile.
        planned: The plan.
        most: The most bytes at one time.

    Returns:
        The plan with the formats. None if no choice fits.
    """
    names = [name for name, plan in planned.sites.items() if plan.anchors]
    offers = {name: _offers(profile, name, sites[name], planned.sites[name]) for name in names}
    chosen = dict.fromkeys(names, 0)

    def bytes_with(changes: Mapping[str, int]) -> np.ndarray:
        found = np.zeros(profile.steps, np.int64)
        for name in names:
            found += offers[name][changes.get(name, chosen[name])].bytes
        return found

    while (held := bytes_with({})).max() > most:
        at = int(held.argmax())
        best, least = None, np.inf
        for name in names:
            here = offers[name][chosen[name]]
            for k, there in enumerate(offers[name]):
                saved = int(here.bytes[at] - there.bytes[at])
                price = (there.error - here.error) / saved if saved > 0 else np.inf
                if price < least:
                    best, least = (name, k), price
        if best is None:
            return None
        chosen[best[0]] = best[1]
    while True:
        gains = {
            (name, k): offers[name][chosen[name]].error - there.error
            for name in names
            for k, there in enumerate(offers[name])
            if there.error < offers[name][chosen[name]].error and bytes_with({name: k}).max() <= most
        }
        if not gains:
            break
        name, k = max(gains, key=gains.__getitem__)
        chosen[name] = k
    formats = {name: offers[name][k].store for name, k in chosen.items()}
    kept = {s: dataclasses.replace(p, store=formats.get(s)) for s, p in planned.sites.items()}
    return dataclasses.replace(planned, sites=kept)


def bytes_held(site: SiteProfile, plan: SitePlan, anchors: int | None = None) -> np.ndarray:
    """Return the bytes that a site keeps at each step, int64 [T], as the executor's store does.

    Args:
        site: The profile of the site.
        plan: Its plan.
        anchors: Count as if predictions used this number of newest outputs only.

    Raises:
        BadOption: The profile has no size for the plan's format.
    """
    size = site.output_bytes if plan.store is None else _kept(site, plan.store).bytes
    return size * site.calls * held(plan, anchors)


def held(plan: SitePlan, anchors: int | None = None) -> np.ndarray:
    """Return the number of tensors of one output's size that the site keeps at each step, int64 [T]."""
    last_use: dict[int, int] = {}
    with_input: set[int] = set()
    for step, (indices, kept) in plan.anchors_by_step().items():
        used = {k: anchor for k, anchor in zip(indices, kept.tolist(), strict=True) if anchors is None or k < anchors}
        last_use |= dict.fromkeys(used.values(), step)
        if plan.kappa is not None and plan.kappa[:, step].any():
            with_input.add(used[0])
        if plan.inputs is not None:
            with_input |= {anchor for k, anchor in used.items() if plan.inputs[:, step, k].any()}
    if plan.store is not None:
        with_input -= set(np.flatnonzero(plan.differences).tolist())
    found = np.zeros(len(plan.compute), np.int64)
    for anchor, last in last_use.items():
        found[anchor : last + 1] += 1 + (anchor in with_input)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Offer:
    """One format for one site.

    Attributes:
        store: The format; None keeps outputs as they are.
        bytes: int64 [T], the bytes at each step.
        error: The mean square error in the final state.
    """

    store: StoreFormat | None
    bytes: np.ndarray
    error: float


def _offers(profile: Profile, name: str, site: SiteProfile, plan: SitePlan) -> list[_Offer]:
    """Return the formats that the profile measured, the exact one first."""
    squares = np.square(plan.weights).sum(-1).mean(0) * ~plan.compute
    if site.influence is not None:
        squares = squares * site.influence
    if profile.dynamics is not None:
        squares = squares * np.diagonal(step_influence(profile.dynamics)[1:]) ** 2
    weight = float(squares.sum())
    if plan.differences.any() and site.residual is not None:  # residuals are smaller than outputs, and so is the error
        weight *= float(min(1.0, site.residual.energy.mean() / max(site.output.energy.mean(), 1e-300)))
    if not site.kept:
        _kept(site, "int8")
    offers = [_Offer(None, bytes_held(site, dataclasses.replace(plan, store=None)), 0.0)]
    for store in get_args(StoreFormat):
        if store in site.kept:
            held_so = bytes_held(site, dataclasses.replace(plan, store=store))
            offers.append(_Offer(store, held_so, weight * site.kept[store].error))
    return offers


def _kept(site: SiteProfile, store: str) -> KeptProfile:
    """Return the measurement of a format. Raise BadOption if the profile has none."""
    if store not in site.kept:
        found = f"the bytes of {', '.join(site.kept)} only" if site.kept else "the bytes of no format"
        raise Unusable(f"store={store!r}", f"the profile measured {found}", "Measure the pipeline again")
    return site.kept[store]
