"""A mask for every sublayer by cosine similarity, with bubbled updates (BAC).

The adaptive caching scheduler (ACS) cuts each sublayer's outputs into runs. Similarity is that of a step to the
computed step whose output it reuses, as in the authors' code. A sum of similarities to the step before would only pick
the K − 1 largest single changes, however close together.

Bubbling updates (BUA) follow. If sublayers before a feed-forward are stale, their errors reach its input. An output
computed from that input can have a larger error than a reused one. So the ``n`` sublayers whose outputs differ most
over the run are also computed whenever a feed-forward after them is. The plain masks have S updates each, and their
unions more. S is the largest number that does not exceed the budget.

The position of a sublayer is read from its name (``_sites.at``). For the usual names of lists of blocks it is known
which list runs first; ``stacks`` overrides it. A feed-forward is downstream of the blocks before its block, and of the
attention in its block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.sites import feeds_forward, location
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Planned, _partition
from diffcache.schedulers._cuts import Cheapest, anchored
from diffcache.schedulers._sites import at, count, flag, shares
from diffcache.schedulers.uniform import reuse

SOURCE = f"BAC, arXiv 2506.13456, ky-ji/HAS @2ddd2a6, BACInfer; {_partition.SOURCE}"
NEEDS = "sublayers"
GROUP = "inside the network"
ALIASES: Aliases = {"bubbling": {}, "partition:kind=acs": {"n": 0}}
ACS = {"sites": "sublayer", "norm": "cosine", "weighted": False, "bounded": False, "per_site": True}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    n: int = 5,
    stacks: str | None = None,
    unified: bool = False,
    sites: str = "sublayer",
    norm: str = "cosine",
    weighted: bool = False,
    bounded: bool = False,
    per_site: bool = True,
) -> Planned:
    """Plan the work of the sublayers: as much as whole updates allow, and not above ``computed_steps``.

    Args:
        profile: The measured tables of all sublayers.
        computed_steps: The work to do, in full steps; a whole number without bubbling.
        n: How many sublayers have their updates bubbled (the paper: 5 in simulation, 3 on robots), chosen by the mean
            L1 distance between their outputs at all pairs of steps. 0 turns bubbling off.
        stacks: Lists of blocks in the order in which they run, "transformer_blocks+single_transformer_blocks". None
            orders them by name.
        unified: Whether the mask of the first sublayer serves all of them, without bubbling: the ablation of the paper.
        sites: The granularity. This and the options that follow need ``n=0``, or ``unified``.
        norm: "l1", "l2" (squared), "cosine" (1 − similarity) or "coherent" (the error of a whole run).
        weighted: Whether a step's error counts by how far the step moves the final state.
        bounded: Whether runs take ceil(N/2) to 2N steps, N = ceil(T/K).
        per_site: Whether every sublayer has a mask. Otherwise one serves all, by the sum of their errors.

    Raises:
        BadOption: For an option out of range, or a budget below one update of each sublayer.
    """
    acs = {"sites": sites, "norm": norm, "weighted": weighted, "bounded": bounded, "per_site": per_site}
    if not count("n", n) or flag("unified", unified):
        return _partition.planned(profile, computed_steps, unified=unified, **acs)  # type: ignore[arg-type]
    if acs != ACS:
        changed = ", ".join(f"{name}={value}" for name, value in acs.items() if value != ACS[name])
        raise BadOption("n", n, f"0 with {changed}: updates bubble only between sublayers with the masks of the paper")
    return _with_bubbling(profile, computed_steps, n, stacks)


def _with_bubbling(profile: Profile, computed_steps: float, n: int, stacks: str | None) -> Planned:
    """Plan one mask per sublayer, joined with the masks of feed-forwards downstream.

    Args:
        profile: The measured tables of all sublayers.
        computed_steps: The work to do, in full steps.
        n: The number of sublayers with updates that bubble.
        stacks: As in ``plan``.

    Raises:
        BadOption: For unknown stacks, or a budget below 1.
    """
    order = stacks.split("+") if stacks is not None else []
    measured = at(profile, "sublayer", order)
    there = {location(name).stack for name in measured}
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
    for updates in range(most, 0, -1):  # a single update is at the first step, at which all sublayers are computed
        masks = bubbled(dict(zip(names, schedules.compute(updates), strict=True)), worst)
        work = float(share @ [masks[name].sum() for name in names])
        if work <= computed_steps + 1e-9:
            break
    notes = {"updates": str(updates), "bubbled": ", ".join(worst), "work": f"{work:.6g} full steps"}
    return Planned(sites={name: reuse(masks[name]) for name in names}, notes=notes)


def bubbled(masks: dict[str, np.ndarray], chosen: Collection[str]) -> dict[str, np.ndarray]:
    """Return masks in which those of the chosen sublayers are joined with those of the feed-forwards downstream.

    One pass in any order is enough: feed-forwards downstream of a feed-forward are also downstream of the chosen
    sublayer.

    Args:
        masks: Sublayer -> bool [T], all sublayers in the order in which they run.
        chosen: The names of the sublayers with updates that bubble.
    """
    names = list(masks)
    return {
        name: np.logical_or.reduce([mask, *(masks[later] for later in downstream(name, names) if name in chosen)])
        for name, mask in masks.items()
    }


def downstream(site: str, names: Sequence[str]) -> list[str]:
    """Return the feed-forwards whose input depends on the output of ``site``.

    Args:
        site: The name of a sublayer.
        names: All sublayers, in the order in which they run.
    """
    here = location(site)
    after = names[names.index(site) + 1 :]
    same_block = {name for name in after if location(name)[:2] == here[:2]}
    return [n for n in after if feeds_forward(n) and not (n in same_block and feeds_forward(site))]
