"""Choose the refreshes of a token schedule: the points and depths with the least error of old keys and values.

The errors come from a token profile: for each layer, by the share of the masks that were committed since its keys and
values were computed. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from diffcache.documents.token_profile import TokenProfile

PARTS = 32  # the most parts of a decode, of equally many commits
ROUNDS = 16  # of the bisection of the price


def parts_of(profile: TokenProfile) -> int:
    """Return the number of parts of a decode. A loop that commits many tokens at a time has one for each forward."""
    return max(2, min(PARTS, round(profile.forwards)))


def seconds_of(profile: TokenProfile, fresh: int, starts: Sequence[int]) -> float:
    """Return the time of a decode.

    Args:
        profile: The measurements.
        fresh: The number of fresh positions of a forward.
        starts: The refreshes, as in ``TokenPlan``.
    """
    one = seconds_of_forward(profile, fresh)
    refreshes = sum(_extra(profile, one, start) for start in starts)
    return profile.forwards * (one + profile.outside) + refreshes


def seconds_of_forward(profile: TokenProfile, fresh: int) -> float:
    """Return the time of a forward without a refresh: of the fresh positions, and those that have just changed."""
    return profile.seconds_for(min(fresh + profile.masks / profile.forwards, profile.positions))


def _extra(profile: TokenProfile, one: float, start: int) -> float:
    """Return the seconds that a refresh from a layer on costs more than a forward without one."""
    return (1 - start / profile.layers) * max(float(profile.seconds[-1]) - one, 0.0)


def plan_starts(profile: TokenProfile, fresh: int, most: float, *, deep: bool) -> Iterator[tuple[int, ...]]:
    """Yield the refreshes with the least error that fit into the time, of all layers only and of two depths.

    Args:
        profile: The measurements.
        fresh: The number of fresh positions of a forward.
        most: The most seconds of a decode.
        deep: Whether a refresh may begin above the first layer.
    """
    layers = profile.layers
    found = set()
    for depths in ((0,), (0, layers // 2)) if deep and layers > 1 else ((0,),):
        low, high = 1e-4, 1e4  # the price of a second, in error
        best: tuple[int, ...] | None = None
        for _ in range(ROUNDS):
            price = math.sqrt(low * high)
            starts = cheapest(profile, fresh, price, depths)
            if seconds_of(profile, fresh, starts) <= most:
                best, high = starts, price
            else:
                low = price
        if best is not None:
            found.add(_filled(profile, fresh, best, most))
    yield from sorted(found)


def cheapest(profile: TokenProfile, fresh: int, price: float, depths: Sequence[int]) -> tuple[int, ...]:
    """Return the refreshes with the least sum of errors and priced seconds, by dynamic programming.

    The state is the age of the shallow layers and that of the deep ones, in parts. A refresh of all layers sets both to
    0; one of the deep layers sets theirs to 0.

    Args:
        profile: The measurements.
        fresh: The number of fresh positions of a forward.
        price: The price of a second, in error.
        depths: The first layers that a refresh may begin with: 0, and optionally another one.
    """
    layers, deep = profile.layers, depths[-1]
    one, parts = seconds_of_forward(profile, fresh), parts_of(profile)
    by_age = np.array([_errors(profile, age / parts) for age in range(parts + 1)])
    shallow, low = by_age[:, :deep].sum(1), by_age[:, deep:].sum(1)
    full, half = price * _extra(profile, one, 0), price * _extra(profile, one, deep)
    total = np.full((parts + 1, parts + 1), np.inf)  # the least cost so far, by the two ages
    total[0, 0] = 0
    choices = []
    for _ in range(1, parts):
        after = np.full_like(total, np.inf)
        after[1:, 1:] = total[:-1, :-1] + shallow[1:, None] + low[None, 1:]
        after[1:, 0] = total[:-1].min(1) + half + shallow[1:] if len(depths) > 1 else np.inf
        after[0, 0] = total.min() + full
        choices.append(total)
        total = after
    state = _least(total)
    starts: list[int] = []
    for before in reversed(choices):  # the ages state which refresh led to them
        if state == (0, 0):
            starts.append(0)
            state = _least(before)
        elif state[1] == 0:
            starts.append(deep)
            state = state[0] - 1, int(before[state[0] - 1].argmin())
        else:
            starts.append(layers)
            state = state[0] - 1, state[1] - 1
    return (0, *reversed(starts))


def _least(total: np.ndarray) -> tuple[int, int]:
    """Return the index of the least value of a table."""
    row, column = np.unravel_index(int(total.argmin()), total.shape)
    return int(row), int(column)


def _filled(profile: TokenProfile, fresh: int, starts: tuple[int, ...], most: float) -> tuple[int, ...]:
    """Return the refreshes with further ones of all layers, as long as the time allows.

    A price finds plans on the convex hull of error and time, so time may be left. Each further refresh is the one that
    lowers the error most.
    """
    while True:
        wider = [
            (*starts[:part], 0, *starts[part + 1 :]) for part in range(1, len(starts)) if starts[part] == profile.layers
        ]
        fitting = [one for one in wider if seconds_of(profile, fresh, one) <= most]
        if not fitting:
            return starts
        starts = min(fitting, key=lambda one: total_error(profile, one))


def total_error(profile: TokenProfile, starts: Sequence[int]) -> float:
    """Return the sum over the parts of the errors of keys and values, with the ages that refreshes leave."""
    ages, total = np.zeros(profile.layers), 0.0
    for start in starts[1:]:
        ages += 1 / len(starts)
        ages[start:] = 0
        total += float(error_at(profile, ages))
    return total


def _errors(profile: TokenProfile, age: float) -> np.ndarray:
    """Return the error of each layer at an age, float64 [L]. Beyond the oldest measured, it grows no more."""
    return np.array([np.interp(age, profile.ages, of_layer) for of_layer in profile.errors])


def error_at(profile: TokenProfile, ages: np.ndarray) -> np.ndarray:
    """Return the sum of the errors of the layers, each at its own age.

    Args:
        profile: The measurements.
        ages: float64 [..., L], shares of the masks that were committed.
    """
    layers = zip(np.moveaxis(ages, -1, 0), profile.errors, strict=True)
    return np.asarray(sum(np.interp(age, profile.ages, row) for age, row in layers))
