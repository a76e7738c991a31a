"""Simulate online rules on a profile, to find the threshold for a budget.

A profile holds means over its samples. A run of one sample therefore computes about as many steps, not exactly as many.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import Online, SitePlan
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers._sites import at, count
from diffcache.schedulers._threshold import residual_reuse


def per_decision(profile: Profile, table: np.ndarray) -> np.ndarray:
    """Return the rows of a table [B, …] that each decision uses.

    Branches of separate calls decide separately. Branches of one batch decide together, from their mean.
    """
    apart = profile.guidance is not None and profile.guidance.mode == "separate"
    return table if apart else table.mean(0, keepdims=True)


def always_done(profile: Profile, *, skipped: Iterable[str], kept: Iterable[str] = ()) -> float:
    """Return the share of a full step's operations that a predicted step still does.

    Args:
        profile: The profile. If it has no operations, the share is 0.
        skipped: Sites that do not run.
        kept: Sites inside these that run nevertheless.
    """
    ((_, denoiser),) = profile.denoisers.items()

    def operations(sites: Iterable[str]) -> int:
        return sum(denoiser.sites[name].flops * denoiser.sites[name].calls for name in sites if name in denoiser.sites)

    full = operations(["model"])
    return min(max(full - operations(skipped) + operations(kept), 0) / full, 1.0) if full else 0.0


def moving_stacks(profile: Profile) -> dict[str, SiteProfile]:
    """Return the stacks with an input that changes, in the order in which they run.

    Stacks that prepare the text (Lumina 2, Z-Image) have a constant input, and nothing to decide.

    Raises:
        BadOption: The profile has no such stack.
    """
    found = {name: site for name, site in at(profile, "stack").items() if site.input_change.any()}
    if not found:
        raise Unusable(
            "profile",
            "the input of every measured stack is the same at all steps",
            "Measure a stack that takes the sample as input",
        )
    return found


def work_of(masks: np.ndarray, predicted: float) -> np.ndarray:
    """Return the work of masks bool [N, G, T] in full steps, float64 [N]. A predicted step does a share of the work."""
    computed = masks.mean(1)
    return np.asarray((computed + (1 - computed) * predicted).sum(-1))


def best(limits: np.ndarray, work: np.ndarray, computed_steps: float) -> tuple[float, float]:
    """Return the limit with the most work within the budget, the lowest of several, and its work.

    Raises:
        BadOption: Every limit does more work.
    """
    affordable = work <= computed_steps + 1e-9
    if not affordable.any():
        raise BadOption("computed_steps", computed_steps, f"{work.min():.4g} or more: so much is always done")
    chosen = int(np.where(affordable, work, -1).argmax())
    return float(limits[chosen]), float(work[chosen])


def in_a_row(most: int | None, steps: int) -> int:
    """Return how many steps in a row may be predicted. Raise BadOption for a number below 1."""
    return steps if most is None else count("most", most, least=1)


def asked(steps: int, first: int) -> SitePlan:
    """Return the plan that reuses the residual from step ``first`` on, if the run allows it."""
    return residual_reuse(np.arange(steps) < max(first, 1))


def online(
    rule: str, steps: int, threshold: float, *, polynomial: np.ndarray | None = None, most: int | None = None
) -> Online:
    """Return the decision by one threshold for all steps. Raise BadOption for a threshold out of range."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not np.isfinite(threshold) or threshold < 0:
        raise BadOption("threshold", threshold, "a number, 0 or more; 0 computes every step")
    in_a_row(most, steps)
    return Online(rule=rule, limit=np.full(steps, float(threshold)), polynomial=polynomial, most=most)
