"""Recompute when the first block's modulated input has changed enough (TeaCache).

The decision is taken in the run, from the output of the first normalisation. A polynomial converts its change into the
change of the output. ``plan`` fits it to a profile. ``rule`` takes the coefficients that the authors published for the
network, and the signal that they were fitted to. The residual of every stack is reused.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from diffcache import presets
from diffcache.documents.profile import Profile
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Grid, Planned, Ruled
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
from diffcache.schedulers._threshold import candidates, residual_reuse, walks

SOURCE = "TeaCache, arXiv 2411.19108, ali-vilab/TeaCache @7c10efc; with coefficients that are not negative"
NEEDS = "stacks"
GRANULARITY = "stack"
HIGHEST = 8  # the highest degree of the polynomial; the fit tries every set of powers


def rule(grid: Grid, *, threshold: float | None = None, most: int | None = None, preset: str | None = None) -> Ruled:
    """Compute a step if the rescaled changes since the newest computed step have added up to the threshold.

    The coefficients are published for single models (``diffcache presets --method teacache``). For another network,
    plan from a profile.

    Args:
        grid: The loop.
        threshold: The limit of the added changes, relative L1. None takes the lowest one that the authors recommend.
        most: Steps in a row that may be predicted. None allows any number.
        preset: The name of a published calibration. None finds it by the network.

    Raises:
        BadOption: For an option out of range, or a network that several calibrations fit.
        UnknownName: For an unknown preset.
        UnsupportedModel: For a network that no calibration fits.
    """
    check(threshold=threshold, most=most, preset=preset)
    found = presets.find("teacache", grid.networks, preset)
    constants = found.preset.constants
    limit = found.preset.recommended[0]["threshold"] if threshold is None else threshold
    compute = np.arange(grid.steps) < grid.start + constants["first"]
    compute[grid.steps - constants["last"] :] = True
    polynomial = np.array(constants["polynomial"], float)
    return Ruled(
        plan=residual_reuse(compute),
        online=online(constants["signal"], grid.steps, limit, polynomial=polynomial, most=most),
        stacks=found.preset.stacks,
        notes=found.notes() | {"threshold": f"{limit:g}"},
    )


def check(*, threshold: float | None = None, most: int | None = None, preset: str | None = None) -> None:
    """Raise BadOption or UnknownName for options of ``rule`` that no network allows."""
    online("modulated_input", 1, 0.0 if threshold is None else threshold, most=most)
    presets.check_name("teacache", preset)


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    degree: int = 4,
    warmup: int = 1,
    threshold: float | None = None,
    most: int | None = None,
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``.

    Args:
        profile: The measured tables of the stacks.
        computed_steps: The work to do, in full steps.
        degree: The degree of the polynomial, 0 to 8. It is fitted by least squares over all pairs of neighbouring
            steps.
        warmup: Steps at the beginning that are always computed (TeaCache's ret_steps: 1 or 5).
        threshold: The limit of the added changes, relative L1. None simulates the rule on the profile to find it. A
            given threshold is used at any budget.
        most: Steps in a row that may be predicted. None allows any number.

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile without stacks or without
            the outputs of their first normalisation.
    """
    if count("degree", degree) > HIGHEST:
        raise BadOption("degree", degree, f"0 to {HIGHEST}")
    first, row = count("warmup", warmup, least=1), in_a_row(most, profile.steps)
    stacks = moving_stacks(profile)
    name, head = next(iter(stacks.items()))
    if head.modulated_change is None:
        raise Unusable(
            "profile",
            f"it has no modulated_change of {name!r}",
            "Pass a profile of a network with blocks that normalise their input",
        )
    polynomial = fitted(head.modulated_change, _output_change(profile), degree)
    notes = {"polynomial": " ".join(f"{c:.6g}" for c in polynomial)}
    if threshold is None:
        counted = np.polyval(polynomial, per_decision(profile, head.modulated_change))
        after = np.triu(np.ones((profile.steps, profile.steps), bool), 1)
        error = np.cumsum(np.where(after, counted[:, None], 0.0), axis=2)  # at [a, i]: the sum after a, up to i
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
    """Fit the polynomial that maps changes of the modulated input to changes of the output.

    No coefficient is negative. Without this condition the fit is steep outside of the changes that it was made from: a
    run with larger changes falls below every threshold and computes no more, or it always computes.

    Args:
        change: float64 [B, T], the relative L1 change of the modulated input from the step before. Step 0 is not used.
        output_change: float64 [B, T], the relative L1 change of the output from the step before.
        degree: The degree of the polynomial.

    Returns:
        float64 [degree + 1], highest power first.
    """
    x, y = change[:, 1:].ravel(), output_change[:, 1:].ravel()
    powers = np.vander(x, degree + 1)
    size = np.maximum(np.sqrt((powers**2).sum(0)), 1e-300)
    best, least = np.zeros(degree + 1), float(y @ y)
    for used in product([False, True], repeat=degree + 1):  # at most 512 sets of powers
        chosen = np.array(used)
        coefficients = np.zeros(degree + 1)
        coefficients[chosen] = np.linalg.lstsq((powers / size)[:, chosen], y, rcond=None)[0] / size[chosen]
        error = float(((powers @ coefficients - y) ** 2).sum())
        if error < least and (coefficients >= 0).all():
            best, least = coefficients, error
    return best


def _output_change(profile: Profile) -> np.ndarray:
    """Return ‖F_i − F_{i-1}‖₁ / ‖F_{i-1}‖₁ of the denoiser's output, float64 [B, T]. It is 0 at step 0."""
    relative = at(profile, "model")["model"].output.relative_l1
    return np.pad(np.diagonal(relative, offset=-1, axis1=1, axis2=2), ((0, 0), (1, 0)))
