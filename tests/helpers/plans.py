"""What tests of several schedulers share: plans of one method, and masks as cuts into runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from diffcache.documents import Profile
from diffcache.schedulers import Planned, function


def planned(found: Profile, computed_steps: float, *, kind: str, **options: Any) -> Planned:
    """Return the plan of the scheduler of this name."""
    made: Planned = function(kind, "plan", options)(found, computed_steps, **options)
    return made


def cuts(steps: int, runs: int) -> list[tuple[int, ...]]:
    """Return every way to begin ``runs`` runs, the first at step 0, each with the end."""
    return [(0, *rest, steps) for rest in itertools.combinations(range(1, steps), runs - 1)]


def cut_of(mask: np.ndarray) -> tuple[int, ...]:
    """Return the steps that a mask [T] computes, and the end."""
    return (*np.flatnonzero(mask).tolist(), len(mask))
