"""Plan from trained tables of sites and steps, for Learning-to-Cache and HarmoniCa.

A router states for every attention and feed-forward of a DiT, at every step, whether it runs. It is trained for one
network, one number of steps, one sampler and one budget. Its file is a torch file.
``diffcache.profiling.router_file`` reads it, and makes a schedule from it without a profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffcache.documents import files
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption, DocumentError, Unusable
from diffcache.schedulers import Planned
from diffcache.schedulers._sites import at
from diffcache.schedulers.allocate import work
from diffcache.schedulers.uniform import reuse

LEARNING_TO_CACHE = "Learning-to-Cache, arXiv 2406.01733, horseee/learning-to-cache @23d8045"
HARMONICA = "HarmoniCa, arXiv 2410.01723, ModelTC/HarmoniCa @5d7f78d"
STACK, PARTS = "transformer_blocks", ("attn1", "ff")  # names in diffusers' DiT, for the routers' entries 2i and 2i + 1


@dataclass(frozen=True, eq=False)
class Router:
    """The table of a trained router.

    Attributes:
        compute: bool [T, 2 · depth], in the order in which steps and sites run. The first step is all True.
        name: The name of the router in errors and notes.

    Raises:
        BadOption: The table has another dtype or shape, or skips at the first step.
    """

    compute: np.ndarray
    name: str = "a router"

    def __post_init__(self) -> None:
        table = self.compute
        if table.dtype != bool or table.ndim != 2 or not table.shape[0] or not table.shape[1] or table.shape[1] % 2:
            raise Unusable(
                "router",
                f"it is a {table.dtype} array of shape {list(table.shape)}",
                "Pass a bool array of shape [steps, 2 · blocks]",
            )
        if not table[0].all():
            raise Unusable(
                "router", "it skips a sublayer at the first step", "Set all columns of the first row to True"
            )

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.compute)

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites, one per column."""
        blocks = range(self.compute.shape[1] // len(PARTS))
        return tuple(f"sublayer:{STACK}.{i}.{part}" for i in blocks for part in PARTS)

    def plans(self) -> dict[str, SitePlan]:
        """Return the plan of each site: reuse of its newest output where the table is False."""
        return {name: reuse(column) for name, column in zip(self.sites, self.compute.T, strict=True)}

    def check_sites(self, there: Iterable[str]) -> None:
        """Raise BadOption unless the sublayers among ``there`` are exactly those of the router."""
        found = {name for name in there if name.startswith("sublayer:")}
        if apart := sorted(found ^ set(self.sites)):
            raise Unusable(
                "file",
                f"{self} is a router for {len(self.sites)} sublayers in {self.compute.shape[1] // 2} blocks of a DiT, "
                f"and the network has {len(found)} sublayers; {apart[0]!r} is in only one of the two",
                "Pass a router that was made for this network",
            )

    def __str__(self) -> str:
        return self.name


def planned(profile: Profile, computed_steps: float, file: Router | str) -> Planned:
    """Return the plan of a router's table.

    Args:
        profile: The measured tables of the sublayers.
        computed_steps: The most work, in full steps.
        file: The result of ``diffcache.profiling.router_file.read``, or the path of a ``.npy`` file with such a table.

    Raises:
        BadOption: If the table's work is above ``computed_steps``, or the profile has another number of steps or other
            sublayers.
    """
    router = file if isinstance(file, Router) else _from_npy(file)
    if profile.start or profile.after or profile.steps != router.steps:
        late = f" of {profile.grid_steps}, from step {profile.start} on" if profile.start or profile.after else ""
        raise Unusable(
            "file",
            f"{router} is a router of {router.steps} steps, and the profile has {profile.steps} steps{late}",
            f"Pass a router of {profile.steps} steps and a profile of a loop that takes every step from step 0 on",
        )
    measured = at(profile, "sublayer")
    router.check_sites(measured)
    costs, outside = work(profile, {name: measured[name] for name in router.sites})
    done = router.steps * outside + float(router.compute.sum(0) @ costs)
    steps = done / (outside + costs.sum())
    if computed_steps < steps * (1 - 1e-9):
        least = math.ceil(steps * 1e4) / 1e4
        raise BadOption("computed_steps", computed_steps, f"{least} or more: the work of {router}, which is fixed")
    return Planned(sites=router.plans(), notes={"work": f"{steps:.4g} of {profile.steps} full steps"})


def _from_npy(path: str) -> Router:
    """Read the table of a router from a ``.npy`` file. Raise BadOption if the file holds no such table."""
    allowed = (
        "diffcache.profiling.router_file.read(path), for a file of Learning-to-Cache or HarmoniCa; or the path of a "
        ".npy file with its table: numpy.save(path, router.compute)"
    )
    if not path:
        raise Unusable(
            "file", "no trained router was given", "Pass file=router.npy, or in Python router_file.read(path)"
        )
    if not path.endswith(".npy"):
        raise BadOption("file", path, allowed)
    try:
        return Router(files.read_arrays(Path(path)).get("", np.empty(0)), Path(path).name)
    except (DocumentError, BadOption) as error:
        raise BadOption("file", path, f"{allowed}. Found: {error}") from error
