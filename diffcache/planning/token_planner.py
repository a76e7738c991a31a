"""Plan the forwards of a decoding loop from a token profile: how many positions, and which refreshes. numpy only.

A plan has a number of fresh positions and refreshes. Dynamic programming chooses the refreshes and their depths for
the least error of old keys and values within a cost. The predicted flips of a plan follow from its errors and the
margins of the tokens, on the recorded order of commits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from diffcache.documents.budget import Budget
from diffcache.documents.token_profile import TokenProfile
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption, Unusable
from diffcache.planning.token_flips import predicted_flips
from diffcache.planning.token_refreshes import parts_of, plan_starts, seconds_of

FRESH = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # numbers of fresh positions that are tried
WEIGHTS = (0.0, 0.25, 1.0)  # of tokens against masks


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """A plan, its cost and its predicted error.

    Attributes:
        fresh: The number of positions in each row that a forward computes, next to those that have changed.
        weight: The weight of tokens against masks.
        starts: For each part of the decode, the first layer that its first forward computes in full.
        seconds: The time of a decode. For a budget of computed steps, in forwards of all positions.
        flips: The predicted share of tokens that differ from the full loop's, without those that follow from others.
        speedup: The ratio of the time of a full decode to ``seconds``.
    """

    fresh: int
    weight: float
    starts: tuple[int, ...]
    seconds: float
    flips: float
    speedup: float

    def schedule(self, profile: TokenProfile) -> TokenSchedule:
        """Return the document."""
        return TokenSchedule(
            class_name=profile.class_name,
            config_digest=profile.config_digest,
            layers=profile.layers,
            positions=profile.positions,
            fresh=self.fresh,
            weight=self.weight,
            drift=profile.drift,
            starts=np.array(self.starts, float),
        )


def token_plans(profile: TokenProfile, budget: Budget, *, deep: bool = True) -> list[TokenPlan]:
    """Return plans within a budget, the one with the fewest predicted flips first.

    Args:
        profile: The measurements.
        budget: A goal of speed-up, or of computed steps: the work of a decode in forwards of all positions.
        deep: Whether a refresh may begin above the first layer. Not every model can.

    Raises:
        Unusable: The budget has another goal, or no plan meets it. The error states the most that can be reached.
    """
    if budget.memory_bytes is not None:
        raise Unusable("budget", "it sets memory_bytes, which language models do not support", "Leave out memory_bytes")
    profile = _in_units_of(profile, budget)
    most = _seconds_allowed(profile, budget)
    plans = []
    for fresh in [n for n in FRESH if n < profile.positions]:
        for start in plan_starts(profile, fresh, most, deep=deep):
            seconds = seconds_of(profile, fresh, start)
            speedup = profile.full_seconds / seconds
            for weight in WEIGHTS:
                flips = predicted_flips(profile, fresh, weight, start)
                plans.append(TokenPlan(fresh, weight, start, seconds, flips, speedup))
    if not plans:
        least = seconds_of(profile, FRESH[0], (0, *[profile.layers] * (parts_of(profile) - 1)))
        if budget.computed_steps is not None:
            raise Unusable(
                "budget",
                f"no plan computes as little as {budget.computed_steps:g} forwards; the least is {least:.1f}",
                "Allow more computed steps",
            )
        raise Unusable(
            "budget",
            f"no plan is {budget.speedup:g}x as fast; {FRESH[0]} positions without a refresh reach "
            f"{profile.full_seconds / least:.1f}x",
            "Ask for a lower speed-up, or pass larger batches, in which a position costs less",
        )
    return sorted(plans, key=lambda plan: (plan.flips, plan.seconds))


def _in_units_of(profile: TokenProfile, budget: Budget) -> TokenProfile:
    """Return the profile with the unit of the budget: for computed steps, a forward of all positions is one second."""
    if budget.computed_steps is None:
        return profile
    counts = np.array([0.5, profile.positions])
    return dataclasses.replace(profile, counts=counts, seconds=counts / profile.positions, outside=0.0)


def _seconds_allowed(profile: TokenProfile, budget: Budget) -> float:
    """Return the most seconds that a decode may take, in the unit of the budget."""
    if budget.speedup is not None:
        return profile.full_seconds / budget.speedup
    if budget.computed_steps is not None:
        if budget.computed_steps > profile.forwards:
            allowed = f"up to {profile.forwards:g}, the forwards of a decode"
            raise BadOption("computed_steps", budget.computed_steps, allowed)
        return budget.computed_steps
    raise Unusable(
        "budget",
        f"it sets {budget}, and answers of a language model have no PSNR",
        "Use Budget(speedup=3), or a number of computed steps",
    )
