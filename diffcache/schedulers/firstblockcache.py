"""Run the first block, and the rest when its residual has changed enough (FirstBlockCache).

Decided in the run. The residual of all that follows the first block is reused: over several stacks, each reusing its
own, the sums telescope to the one residual that FirstBlockCache keeps.
"""

from __future__ import annotations

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import Online, SitePlan
from diffcache.documents.sites import location
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Grid, Planned
from diffcache.schedulers._greedy import (
    always_done,
    asked,
    best,
    in_a_row,
    moving_stacks,
    online,
    per_decision,
    work_of,
)
from diffcache.schedulers._threshold import candidates, walks

SOURCE = "ParaAttention, chengzeyi/ParaAttention; diffusers' hooks/first_block_cache.py"
NEEDS = "stacks and first blocks"
GRANULARITY = "stack"
ALIASES: Aliases = {"first_block": {}, "first_block_cache": {}, "fbcache": {}}


def rule(grid: Grid, *, threshold: float = 0.05, most: int | None = None) -> tuple[SitePlan, Online]:
    """``threshold``: relative L1 change of the first block's residual since the newest computed step, as in diffusers.
    ``most``: steps in a row that may be predicted."""
    return asked(grid.steps, grid.start + 1), online("first_block", grid.steps, threshold, most=most)


def plan(
    profile: Profile, computed_steps: float, *, threshold: float | None = None, most: int | None = None
) -> Planned:
    """Work is to come as near to ``computed_steps`` as a threshold brings it, and not above.

    threshold  as in ``rule``; None: found by playing the rule on the residual tables of the first block. Given, it is
               used whatever the budget
    most       steps in a row that may be predicted; None: any number

    Work counts what runs at predicted steps too: the first block, and what lies outside the stacks. Raises BadOption,
    also for a profile that lacks the stacks, or the first block where it is needed.
    """
    stacks = moving_stacks(profile)
    notes = {}
    if threshold is None:
        threshold, work = _threshold(profile, list(stacks), computed_steps, in_a_row(most, profile.steps))
        notes["work"] = f"{work:.6g} full steps"
    return Planned(
        sites=dict.fromkeys(stacks, asked(profile.steps, 1)),
        online=online("first_block", profile.steps, threshold, most=most),
        notes=notes | {"threshold": f"{threshold:.6g}"},
    )


def _threshold(profile: Profile, stacks: list[str], computed_steps: float, most: int) -> tuple[float, float]:
    ((_, denoiser),) = profile.denoisers.items()
    first = f"block:{location(stacks[0]).stack}.0"
    found = denoiser.sites.get(first)
    if found is None or found.residual is None:
        there = "its residual" if found else "it"
        raise BadOption("profile", f"one without {first!r}", f"one that measured {there}, or threshold=…")
    error = per_decision(profile, found.residual.relative_l1).swapaxes(1, 2)  # at [a, i]
    limits = candidates(error)
    masks = walks(error, limits, most, 1)
    return best(limits, work_of(masks, always_done(profile, skipped=stacks, kept=[first])), computed_steps)
