"""Recompute when the filtered input has changed enough (SeaCache).

The decision is taken in the run, before the network begins (``executor/criteria/filtered_input.py``). The filter keeps
the part of the input that is expected to be clean at the noise level of the step. The residual of every stack is
reused. diffusers can also extrapolate the residual (``residual_order=1``, its default); here it is reused, as the
authors do (``residual_order=0``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffcache.documents.schedule import Online, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid
from diffcache.schedulers._greedy import online
from diffcache.schedulers._sites import count
from diffcache.schedulers._threshold import demand_number, residual_reuse

SOURCE = "SeaCache, arXiv 2602.18993, jiwoogit/SeaCache @802d7cd; diffusers' hooks/sea_cache.py"
GRANULARITY = "stack"


def rule(
    grid: Grid,
    *,
    threshold: float = 0.3,
    power: float = 2.0,
    rows: int = 0,
    warmup: int = 1,
    last: int = 1,
    most: int | None = None,
) -> tuple[SitePlan, Online]:
    """Compute a step if the changes of the filtered input since the newest computed step reach the threshold.

    Args:
        grid: The loop.
        threshold: The limit of the added changes, relative L1. The authors use 0.3 and 0.6 for FLUX.1, diffusers 0.25.
        power: The exponent of the clean part's power over the frequency: 2 for pictures, 3 for video.
        rows: The number of rows of tokens, for inputs [samples, tokens, channels] of a picture that is not square. 0
            takes as many rows as columns.
        warmup: Steps at the beginning that are always computed (retention_steps in diffusers).
        last: Steps at the end that are always computed (cache_end_steps in diffusers).
        most: Steps in a row that may be predicted (max_consecutive_cached in diffusers, 2 there). None allows any
            number, as the authors do.

    Raises:
        BadOption: For an option out of range.
    """
    powers = "a number above 0, 16 at most: 2 for pictures, 3 for video"
    demand_number("power", power, powers, highest=16.0)
    if not power:
        raise BadOption("power", power, powers)
    compute = np.arange(grid.steps) < grid.start + count("warmup", warmup, least=1)
    compute[grid.steps - min(count("last", last), grid.steps) :] = True
    decision = online("filtered_input", grid.steps, threshold, most=most)
    return residual_reuse(compute), replace(decision, options={"power": power, "rows": count("rows", rows)})
