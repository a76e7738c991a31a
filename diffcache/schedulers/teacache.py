"""Recompute when the first block's modulated input has changed enough (TeaCache).

Decided in the run, from what the first normalisation makes of the input; a polynomial fitted to the profile turns its
change into the output's. The residual of every stack is reused.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.errors import BadOption
from diffcache.schedulers import Planned
from diffcache.schedulers._greedy import (
    always_done,
    asked,
    best,
    in_a_row,
    moving_stacks,
    online,
    per_decision,
    work_of,
)
from diffcache.schedulers._sites import at, count
from diffcache.schedulers._threshold import candidates, walks

SOURCE = "TeaCache, arXiv 2411.19108, ali-vilab/TeaCache @7c10efc; with coefficients that are not negative"
NEEDS = "stacks"
HIGHEST = 8  # of the polynomial's degrees: the fit tries every set of powers


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    degree: int = 4,
    warmup: int = 1,
    threshold: float | None = None,
    most: int | None = None,
) -> Planned:
    """Work is to come as near to ``computed_steps`` as a threshold brings it, and not above.

    degree     of the polynomial, by least squares over all pairs of neighbouring steps; 0 to 8
    warmup     steps at the beginning that are always computed (TeaCache's ret_steps: 1 or 5)
    threshold  of the added changes, relative L1; None: found by playing the rule on the profile. Given, it is used
               whatever the budget
    most       steps in a row that may be predicted; None: any number

    Raises BadOption, also for a profile without stacks, or without what their first normalisation made.
    """
    if count("degree", degree) > HIGHEST:
        raise BadOption("degree", degree, f"0 to {HIGHEST}")
    first, row = count("warmup", warmup, least=1), in_a_row(most, profile.steps)
    stacks = moving_stacks(profile)
    name, head = next(iter(stacks.items()))
    if head.modulated_change is None:
        raise BadOption(
            "profile", f"one without modulated_change of {name!r}", "one whose blocks normalise their input"
        )
    polynomial = fitted(head.modulated_change, _output_change(profile), degree)
    notes = {"polynomial": " ".join(f"{c:.6g}" for c in polynomial)}
    if threshold is None:
        counted = np.polyval(polynomial, per_decision(profile, head.modulated_change))
        after = np.triu(np.ones((profile.steps, profile.steps), bool), 1)
        error = np.cumsum(np.where(after, counted[:, None], 0.0), axis=2)  # at [a, i]: of the calls after a, up to i
        limits = np.maximum(candidates(error), 0)
        work = work_of(walks(error, limits, row, first), always_done(profile, skipped=stacks))
        threshold, done = best(limits, work, computed_steps)
        notes["work"] = f"{done:.6g} full steps"
    return Planned(
        sites=dict.fromkeys(stacks, asked(profile.steps, first)),
        online=online("modulated_input", profile.steps, threshold, polynomial=polynomial, most=most),
        notes=notes | {"threshold": f"{threshold:.6g}"},
    )


def fitted(change: np.ndarray, output_change: np.ndarray, degree: int) -> np.ndarray:
    """float64 [degree + 1], highest power first, nearest to ``output_change`` at ``change``, both float64 [B, T]; step
    0, before which there is none, left out.

    No coefficient is below 0. Without that, the fit is steep beyond the changes it has seen: a run that comes there
    falls below every threshold and computes no more, or computes always.
    """
    x, y = change[:, 1:].ravel(), output_change[:, 1:].ravel()
    powers = np.vander(x, degree + 1)
    size = np.maximum(np.sqrt((powers**2).sum(0)), 1e-300)
    best, least = np.zeros(degree + 1), float(y @ y)
    for used in product([False, True], repeat=degree + 1):  # few enough to try each
        chosen = np.array(used)
        coefficients = np.zeros(degree + 1)
        coefficients[chosen] = np.linalg.lstsq((powers / size)[:, chosen], y, rcond=None)[0] / size[chosen]
        error = float(((powers @ coefficients - y) ** 2).sum())
        if error < least and (coefficients >= 0).all():
            best, least = coefficients, error
    return best


def _output_change(profile: Profile) -> np.ndarray:
    """float64 [B, T], ‖F_i − F_{i-1}‖₁ / ‖F_{i-1}‖₁ of the denoiser's output; 0 at step 0."""
    relative = at(profile, "model")["model"].output.relative_l1
    return np.pad(np.diagonal(relative, offset=-1, axis1=1, axis2=2), ((0, 0), (1, 0)))
