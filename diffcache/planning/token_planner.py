"""Plan the forwards of a decoding loop from a token profile: how many positions, and which refreshes. numpy only.

A plan has a number of fresh positions and refreshes. Dynamic programming chooses the refreshes and their depths for
the least error of old keys and values within a cost. The predicted flips of a plan follow from its errors and the
margins of the tokens, on the recorded order of commits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffcache.documents.budget import Budget
from diffcache.documents.token_profile import TokenProfile
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption, Unusable
from diffcache.planning.token_refreshes import error_at, parts_of, plan_starts, seconds_of
from diffcache.simulation import drifted, stalest

FRESH = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # numbers of fresh positions that are tried
WEIGHTS = (0.0, 0.25, 1.0)  # of tokens against masks
SIMULATED = 4  # recorded sequences on which flips are predicted


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


def predicted_flips(profile: TokenProfile, fresh: int, weight: float, starts: Sequence[int]) -> float:
    """Return the predicted share of tokens that differ, on recorded sequences.

    The error of the probabilities at a commit is the drift of the position since it was computed, and that of the
    keys and values of the others by age, less what fresh positions renew. A token flips with a probability in
    proportion to its error over its margin; the trials of the profile give the factor.

    Args:
        profile: The measurements.
        fresh: The number of fresh positions of a forward.
        weight: The weight of tokens against masks.
        starts: The refreshes, as in ``TokenPlan``.
    """
    chosen = np.linspace(0, len(profile.committed) - 1, min(SIMULATED, len(profile.committed))).astype(int)
    committed, margins = profile.committed[chosen], profile.margins[chosen]
    rows, size = committed.shape
    masks = (committed > 0).sum(1)
    drift, untouched = np.zeros((rows, size)), np.zeros((rows, size))
    ages = np.zeros((rows, profile.layers))
    part = np.zeros(rows, int)
    flips = 0.0
    for forward in range(1, int(committed.max()) + 1):
        masked = committed >= forward
        just = (committed == forward - 1) & (committed > 0)
        drift = drifted(drift, just, masked, profile.drift)
        untouched = drifted(untouched, just, masked, profile.drift)
        ages += (just.sum(1) / masks)[:, None]
        now = np.minimum((masks - masked.sum(1)) * len(starts) // masks, len(starts) - 1)
        for row in np.flatnonzero(now > part):
            start = min(starts[part[row] + 1 : now[row] + 1])
            ages[row, start:] = 0
            if start < profile.layers:
                drift[row], untouched[row] = 0, 0
        part = np.maximum(part, now)
        positions = just | stalest(drift, masked, profile.drift, fresh, weight)
        drift[positions] = 0
        if forward == 1:
            drift[:], untouched[:], ages[:] = 0, 0, 0
        kept = ~masked
        left = (drift * kept).sum(1) / np.maximum((untouched * kept).sum(1), 1e-12)
        old = error_at(profile, ages) * left.clip(0, 1)
        error = drift + old[:, None]
        at = committed == forward
        flips += float(np.minimum(profile.flip_rate * error[at] / np.maximum(margins[at], 1e-6), 1).sum())
    return flips / float(masks.sum())
