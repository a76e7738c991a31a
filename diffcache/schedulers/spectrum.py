"""Forecast with Chebyshev polynomials, fitted to all computed outputs by ridge regression (Spectrum).

The outputs are functions of the step's number, which is mapped from 0 … T to −1 … 1. The ridge fit is linear in the
outputs, so a forecast is a weighted sum of computed outputs, and the weights depend on the computed steps alone. The
penalty includes the constant, as in the authors' code, so the weights of a forecast do not add up to 1.
Distances between computed steps grow: the first is ``window`` steps, and each one is ``growth`` steps longer than the
one before, rounded down.

Three details are readings. The authors' code maps 0 … 50 to −1 … 1, and all published runs have 50 steps; here T takes
the place of 50, and a loop that begins late is mapped from its first step. The authors set ``growth`` by hand; ``plan``
takes the middle of the range that computes as many steps as the budget allows, which is near the published values (0.75
for 14 and 3.0 for 10 of 50 steps). The published settings compute 10 steps or more; for fewer, half of the budget is
warm-up.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import chebyshev

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._sites import count, whole_steps
from diffcache.schedulers._threshold import demand_number

SOURCE = "Spectrum, arXiv 2603.01623, hanjq17/Spectrum @f7b7841"
NEEDS = ""
FINE = 1000  # the lengths of windows are multiples of 1 / FINE steps, as in the authors' code
HIGHEST = 16  # the highest degree


def rule(
    grid: Grid,
    *,
    window: int = 2,
    growth: float = 0.75,
    warmup: int = 5,
    degree: int = 4,
    ridge: float = 0.1,
    blend: float = 1.0,
    anchors: int = 100,
) -> SitePlan:
    """Compute the first steps and the last step of every window, and forecast the others.

    Args:
        grid: The loop.
        window: The length of the first window, in steps (window_size in the authors' code).
        growth: The number of steps by which each window is longer than the one before (flex_window, α in the paper).
        warmup: Steps at the beginning that are always computed.
        degree: The degree of the polynomial (m).
        ridge: The weight of the penalty (lam, λ in the paper).
        blend: The share of the polynomial in the forecast (w). The rest is linear extrapolation from the two newest
            computed outputs. The authors recommend 0.5 to 1.
        anchors: Computed steps that a forecast may use, the newest ones.

    Raises:
        BadOption: For an option out of range.
    """
    demand_number("growth", growth, "a number, 0 or more")
    first, length = count("warmup", warmup, least=1), count("window", window, least=1)
    compute = np.ones(grid.steps, bool)
    compute[grid.start :] = windows(grid.steps - grid.start, first, length, round(growth * FINE))
    return forecast(compute, grid.start, degree=degree, ridge=ridge, blend=blend, anchors=anchors)


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    window: int = 2,
    warmup: int = 5,
    degree: int = 4,
    ridge: float = 0.1,
    blend: float = 1.0,
    anchors: int = 100,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables.
        computed_steps: A whole number.
        window: As in ``rule``.
        warmup: Steps at the beginning that are always computed: no more than half of the budget, and more where windows
            of the given length compute fewer steps than the budget.
        degree: As in ``rule``.
        ridge: As in ``rule``.
        blend: As in ``rule``.
        anchors: As in ``rule``.

    Raises:
        BadOption: For an option or a budget out of range.
    """
    budget, steps = whole_steps(computed_steps, profile.steps), profile.steps
    first, length = count("warmup", warmup, least=1), count("window", window, least=1)
    first = min(first, max(budget // 2, 1))
    length = steps if budget == 1 else length  # any window would compute a second step
    growth = _growth(steps, first, length, budget)
    while windows(steps, first, length, growth).sum() < budget:
        first += 1
    compute = windows(steps, first, length, growth)
    return Planned(
        sites={"model": forecast(compute, degree=degree, ridge=ridge, blend=blend, anchors=anchors)},
        notes={"growth": f"{growth / FINE:g}", "warmup": f"{first}"},
    )


def windows(steps: int, warmup: int, window: int, growth: int) -> np.ndarray:
    """Return the computed steps, bool [T]: those of the warm-up, and the last step of every window after it.

    Args:
        steps: The number of steps T.
        warmup: The number of steps of the warm-up.
        window: The length of the first window, in steps.
        growth: The number of steps by which windows grow, times FINE.
    """
    compute = np.arange(steps) < warmup
    length = window * FINE
    newest = warmup - 1
    while (newest := newest + length // FINE) < steps:
        compute[newest] = True
        length += growth
    return compute


def forecast(compute: np.ndarray, start: int = 0, *, degree: int, ridge: float, blend: float, anchors: int) -> SitePlan:
    """Return the plan that forecasts where ``compute`` (bool [T]) is False.

    Args:
        compute: bool [T], the computed steps.
        start: The step at which the loop begins. Steps before it are no anchors.
        degree: The degree of the polynomial.
        ridge: The weight of the penalty.
        blend: The share of the polynomial in the forecast.
        anchors: Computed steps that a forecast may use.

    Raises:
        BadOption: For an option out of range.
    """
    if count("degree", degree) > HIGHEST:
        raise BadOption("degree", degree, f"0 to {HIGHEST}")
    positive = "a number above 0: without a penalty, few outputs do not determine the fit"
    demand_number("ridge", ridge, positive)
    if not ridge:
        raise BadOption("ridge", ridge, positive)
    demand_number("blend", blend, "0 (linear extrapolation) to 1 (the polynomial)", highest=1.0)
    most = count("anchors", anchors, least=1)
    steps = len(compute)
    places = 2 * (np.arange(steps) - start) / (steps - start) - 1
    basis = chebyshev.chebvander(places, degree)
    weights = np.zeros((1, steps, max(min(int(compute[start:].sum()), most), 1)))
    for i in np.flatnonzero(~compute):
        used = (start + np.flatnonzero(compute[start:i]))[::-1][:most]
        seen = basis[used]
        fit = np.linalg.solve(seen.T @ seen + ridge * np.eye(degree + 1), seen.T)
        weights[0, i, : len(used)] = blend * (basis[i] @ fit)
        ahead = (i - used[0]) / (used[0] - used[1]) if len(used) > 1 else 0.0
        weights[0, i, :2] += (1 - blend) * np.array([1 + ahead, -ahead])[: weights.shape[2]]
    return SitePlan(compute=compute, weights=weights)


def _growth(steps: int, warmup: int, window: int, budget: int) -> int:
    """Return the middle of the growths that compute most steps within the budget, times FINE.

    A larger growth never computes more steps.
    """

    def least(allowed: int) -> int:
        """Return the least growth, times FINE, that computes no more than ``allowed`` steps."""
        low, high = 0, steps * FINE
        while low < high:
            middle = (low + high) // 2
            if windows(steps, warmup, window, middle).sum() <= allowed:
                high = middle
            else:
                low = middle + 1
        return low

    begins = least(budget)
    return (begins + least(int(windows(steps, warmup, window, begins).sum()) - 1)) // 2
