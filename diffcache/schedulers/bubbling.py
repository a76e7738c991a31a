"""Each sublayer's own updates, and those of the feed-forwards downstream where outputs change most (BAC).

A feed-forward that is computed on an input bent by stale sublayers before it can be farther off than one that is
reused. So the n sublayers whose outputs differ most over the run are also computed whenever a feed-forward after them
is. Where the plain schedules of ``partition:kind=acs`` have S updates each, the unions have more; S is the largest
that keeps to the budget.

Where a sublayer stands is read from its name (``_sites.in_order``); which of several lists of blocks runs first is
known for the usual names, and may be said: ``stacks``. A feed-forward is downstream of what stands in the blocks
before its own, and of the attention in its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from diffcache.errors import BadOption
from diffcache.profile import Profile
from diffcache.schedulers import Planned
from diffcache.schedulers._cuts import Cheapest, anchored
from diffcache.schedulers._sites import at, count, feeds_forward, place, shares
from diffcache.schedulers.uniform import reuse

SOURCE = "BAC, arXiv 2506.13456, algorithm BUA; ky-ji/HAS @2ddd2a6, BACInfer"


def plan(profile: Profile, computed_steps: float, *, n: int = 5, stacks: str | None = None) -> Planned:
    """Work of the sublayers together: as much as whole S allow, and not above ``computed_steps``.

    n       sublayers of any kind whose updates grow (BAC: 5 in simulation, 3 on robots); chosen by the mean L1
            distance between their outputs at all pairs of steps
    stacks  lists of blocks in the order in which they run, "transformer_blocks+single_transformer_blocks"; None: by
            name

    Raises BadOption.
    """
    count("n", n)
    order = stacks.split("+") if stacks is not None else []
    measured = at(profile, "sublayer", order)
    there = {place(name).stack for name in measured}
    if set(order) - there or len(set(order)) < len(order):
        raise BadOption("stacks", stacks, f"each of these at most once, joined by '+': {', '.join(sorted(there))}")
    names = list(measured)
    error = np.array([site.output.l1.mean() for site in measured.values()])
    worst = [names[i] for i in np.argsort(-error, kind="stable")[:n]]
    most = int(np.floor(min(computed_steps, profile.steps) + 1e-9))
    if most < 1:
        raise BadOption("computed_steps", computed_steps, f"1 to {profile.steps}")
    schedules = Cheapest(np.stack([anchored(1 - site.output.cosine.mean(0)) for site in measured.values()]), most)
    share = shares(measured)
    for updates in range(most, 0, -1):  # one update each is at the first step, and has nothing to bubble
        masks = bubbled(dict(zip(names, schedules.compute(updates), strict=True)), worst)
        work = float(share @ [masks[name].sum() for name in names])
        if work <= computed_steps + 1e-9:
            break
    notes = {"updates": str(updates), "bubbled": ", ".join(worst), "work": f"{work:.6g} full steps"}
    return Planned(sites={name: reuse(masks[name]) for name in names}, notes=notes)


def bubbled(masks: dict[str, np.ndarray], chosen: Collection[str]) -> dict[str, np.ndarray]:
    """``masks``, those of the chosen sublayers joined with the ones of the feed-forwards downstream.

    One pass is enough, in any order: what is downstream of those is downstream of the chosen one too.

    masks  sublayer -> bool [T], all sublayers in the order in which they run
    """
    names = list(masks)
    return {
        name: np.logical_or.reduce([mask, *(masks[later] for later in downstream(name, names) if name in chosen)])
        for name, mask in masks.items()
    }


def downstream(site: str, names: Sequence[str]) -> list[str]:
    """The feed-forwards that read what ``site`` puts out. ``names``: all sublayers, in the order in which they run."""
    here = place(site)
    after = names[names.index(site) + 1 :]
    beside = {name for name in after if place(name)[:2] == here[:2]}
    return [n for n in after if feeds_forward(n) and not (n in beside and feeds_forward(site))]
