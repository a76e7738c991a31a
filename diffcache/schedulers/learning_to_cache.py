"""Skip the sublayers that a trained router skips, step by step (Learning-to-Cache)."""

from __future__ import annotations

from diffcache.documents.profile import Profile
from diffcache.schedulers import Aliases, Planned, _router

Router = _router.Router

SOURCE = _router.LEARNING_TO_CACHE
NEEDS = "sublayers, and a trained router"
GROUP = "inside the network"
ALIASES: Aliases = {"routers": {}, "l2c": {}}


def plan(profile: Profile, computed_steps: float, *, file: Router | str = "") -> Planned:
    """Use the router as it is. The router decides which work is done.

    Args:
        profile: The measured tables of the sublayers.
        computed_steps: The most work, in full steps.
        file: The result of ``diffcache.profiling.router_file.read``, or the path of a ``.npy`` file with such a table.

    Raises:
        BadOption: If the router's work is above ``computed_steps``, or the profile has another number of steps or other
            sublayers.
    """
    return _router.planned(profile, computed_steps, file)
