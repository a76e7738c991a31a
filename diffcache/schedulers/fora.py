"""Compute every k-th step at every attention and feed-forward (FORA)."""

from __future__ import annotations

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.schedulers import Grid, Planned, uniform
from diffcache.schedulers._sites import at

SOURCE = "FORA, arXiv 2407.01425"
NEEDS = "sublayers"
GROUP = "inside the network"
GRANULARITY = "sublayer"


def rule(grid: Grid, *, every: int = 2) -> SitePlan:
    """Compute the loop's first step, and every ``every``-th step after it."""
    return uniform.rule(grid, every=every)


def plan(profile: Profile, computed_steps: float) -> Planned:
    """Spread ``computed_steps`` computed steps evenly over the loop, at every sublayer of the profile.

    Raises:
        BadOption: For a profile without sublayers, or a budget that is not a whole number from 1 to the steps.
    """
    compute = uniform.evenly(profile.steps, computed_steps)
    return Planned(sites=dict.fromkeys(at(profile, "sublayer"), uniform.reuse(compute)))
