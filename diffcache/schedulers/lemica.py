"""Path whose worst edge is least; the newest output is reused (LeMiCa)."""

from __future__ import annotations

from diffcache.documents.profile import Profile
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._cuts import mildest
from diffcache.schedulers._path import reused_along

SOURCE = "LeMiCa, arXiv 2511.00090"
NEEDS = "dynamics"
ALIASES: Aliases = {"path": {}, "path:kind=minimax": {}}


def plan(profile: Profile, computed_steps: float, *, edge: str = "state", most: int | None = None) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables; with dynamics for ``edge="state"``.
        computed_steps: A whole number.
        edge: "state" (the error of the final state) or "local" (the relative errors of the outputs).
        most: Steps in a row that may be predicted. None allows any number.

    Raises:
        BadOption: For an option out of range, or a budget that cannot be met.
    """
    return reused_along(profile, computed_steps, edge, most, mildest)
