"""Run the first block, and the rest when its residual has changed enough (FirstBlockCache).

The decision is taken in the run. The residual of everything after the first block is reused. If several stacks each
reuse their residual, the sums telescope to the one residual that FirstBlockCache keeps.
"""

from __future__ import annotations

from diffcache import presets
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import Online, SitePlan
from diffcache.documents.sites import location
from diffcache.errors import Unusable
from diffcache.schedulers import Aliases, Grid, Planned, Ruled
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


def rule(
    grid: Grid, *, threshold: float = 0.05, most: int | None = None, preset: str | None = None
) -> tuple[SitePlan, Online] | Ruled:
    """Compute a step if the first block's residual has changed enough.

    Args:
        grid: The loop.
        threshold: The relative L1 change of the residual since the newest computed step, as in diffusers.
        most: Steps in a row that may be predicted. None allows any number.
        preset: The name of published settings (``diffcache presets --method firstblockcache``), whose threshold
            replaces ``threshold``. None uses ``threshold``.

    Raises:
        BadOption: For an option out of range.
        UnknownName: For an unknown preset.
        UnsupportedModel: For a preset of another network.
    """
    plan = asked(grid.steps, grid.start + 1)
    if preset is None:
        return plan, online("first_block", grid.steps, threshold, most=most)
    found = presets.find("firstblockcache", grid.networks, preset)
    limit = found.preset.recommended[0]["threshold"]
    decision = online("first_block", grid.steps, limit, most=most)
    return Ruled(plan=plan, online=decision, stacks=found.preset.stacks, notes=found.notes())


def check(*, threshold: float = 0.05, most: int | None = None, preset: str | None = None) -> None:
    """Raise BadOption or UnknownName for options of ``rule`` that no network allows."""
    online("first_block", 1, threshold, most=most)
    presets.check_name("firstblockcache", preset)


def plan(
    profile: Profile, computed_steps: float, *, threshold: float | None = None, most: int | None = None
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``.

    Work includes the parts that run at predicted steps: the first block, and everything outside the stacks.

    Args:
        profile: The measured tables of the stacks, and of the first block if ``threshold`` is None.
        computed_steps: The work to do, in full steps.
        threshold: As in ``rule``. None simulates the rule on the residual tables of the first block to find it. A given
            threshold is used at any budget.
        most: Steps in a row that may be predicted. None allows any number.

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile without these tables.
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
    """Return the threshold for a budget, and its work in full steps.

    Args:
        profile: The measured tables.
        stacks: The stacks that are predicted, the first one first.
        computed_steps: The budget, in full steps.
        most: Steps in a row that may be predicted.

    Raises:
        BadOption: If the profile has no residual of the first block, or no threshold meets the budget.
    """
    ((_, denoiser),) = profile.denoisers.items()
    first = f"block:{location(stacks[0]).stack}.0"
    found = denoiser.sites.get(first)
    if found is None or found.residual is None:
        missing = f"the residual of {first!r}" if found else f"{first!r}"
        raise Unusable(
            "profile", f"it does not hold {missing}", f"Pass a profile that measured {missing}, or threshold=…"
        )
    error = per_decision(profile, found.residual.relative_l1).swapaxes(1, 2)  # at [a, i]
    limits = candidates(error)
    masks = walks(error, limits, most, 1)
    return best(limits, work_of(masks, always_done(profile, skipped=stacks, kept=[first])), computed_steps)
