"""BudCache's search with real runs, for ``methods.py``: the error of a mask is measured, not simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffcache import CacheSchedule, accelerated
from diffcache.documents import DenoiserPlan
from diffcache.profiling.recording import final_states
from diffcache.schedulers.budcache import searched
from diffcache.schedulers.uniform import reuse


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        schedule: The schedule of the best mask. It reuses the newest output of the network.
        error: The mean squared error of its final latents.
        masks: The number of masks that were run.
        full_runs: The cost: the forwards of all runs, divided by those of one sample's full run.
    """

    schedule: CacheSchedule
    error: float
    masks: int
    full_runs: float


def search(pipe: Any, call: Mapping[str, Any], computed: int, **options: Any) -> Found:
    """Search the mask with the least error of the final latents, over real runs of one call.

    The paper searches on one prompt. A call with several samples averages over them.

    Args:
        pipe: The pipeline.
        call: The arguments of a call, with a list of generators, one for each sample.
        computed: The number of computed steps.
        **options: Options of ``diffcache.schedulers.budcache.searched``.
    """
    steps, samples = call["num_inference_steps"], len(call["generator"])
    (end,) = final_states(pipe, [call])
    errors: dict[bytes, float] = {}

    def error(mask: np.ndarray) -> float:
        with accelerated(pipe, schedule_of(mask)):
            (found,) = final_states(pipe, [call])
        errors[mask.tobytes()] = value = float((found - end).square().mean())
        return value

    best = searched(steps, computed, error, **options)
    cost = samples * (1 + len(errors) * computed / steps)
    return Found(schedule_of(best), errors.get(best.tobytes(), float("nan")), len(errors), cost)


def schedule_of(mask: np.ndarray) -> CacheSchedule:
    """Return the schedule that computes the steps of a mask, bool [steps], and reuses the newest output at others."""
    return CacheSchedule(steps=len(mask), denoisers={"transformer": DenoiserPlan(sites={"model": reuse(mask)})})
