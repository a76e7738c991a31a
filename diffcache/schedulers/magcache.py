"""Reuse the residual while the drift of its magnitude is below a threshold (MagCache).

The drift is |1 − product of the residual's ratios since the newest computed step|, added up step by step. ``plan``
measures the ratios. ``rule`` takes those that the authors published for the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffcache import presets
from diffcache.documents.profile import Profile, SiteProfile
from diffcache.schedulers import Aliases, Grid, Planned, Ruled, _threshold
from diffcache.schedulers._sites import count

SOURCE = "MagCache, arXiv 2506.09045, Zehong-Ma/MagCache @df81cb1"
NEEDS = "residuals"
GRANULARITY = "stack"
ALIASES: Aliases = {"threshold:kind=magcache": {}}


def rule(
    grid: Grid,
    *,
    threshold: float | None = None,
    max_skip: int | None = None,
    retention: float | None = None,
    preset: str | None = None,
) -> Ruled:
    """Reuse the residual of the stacks while its published drift is within the threshold.

    The ratios are published for single models (``diffcache presets --method magcache``). For another number of steps
    than the authors ran, each step takes the ratio of the nearest one, as their code does. For another network, plan
    from a profile.

    Args:
        grid: The loop.
        threshold: The limit of the drift. None takes the lowest one that the authors recommend.
        max_skip: Steps in a row that may be predicted (K of the paper). None takes that of the same recommendation.
        retention: The share of the steps that is always computed, beginning with the first. None takes that of the
            same recommendation.
        preset: The name of a published calibration. None finds it by the network.

    Raises:
        BadOption: For an option out of range, or a network that several calibrations fit.
        UnknownName: For an unknown preset.
        UnsupportedModel: For a network that no calibration fits.
    """
    check(threshold=threshold, max_skip=max_skip, retention=retention, preset=preset)
    found = presets.find("magcache", grid.networks, preset)
    given = {"threshold": threshold, "max_skip": max_skip, "retention": retention}
    setting = {**found.preset.recommended[0], **{name: value for name, value in given.items() if value is not None}}
    compute = published(found.preset.constants, grid.steps, setting)
    compute[: grid.start + 1] = True
    used = {name: f"{setting[name]:g}" for name in given}
    return Ruled(plan=_threshold.residual_reuse(compute), stacks=found.preset.stacks, notes=found.notes() | used)


def check(
    *,
    threshold: float | None = None,
    max_skip: int | None = None,
    retention: float | None = None,
    preset: str | None = None,
) -> None:
    """Raise BadOption or UnknownName for options of ``rule`` that no network allows."""
    if threshold is not None:
        _threshold.demand_number("threshold", threshold, "a number, 0 or more")
    if max_skip is not None:
        count("max_skip", max_skip, least=1)
    if retention is not None:
        _threshold.demand_number("retention", retention, "a share of the steps, 0 to 1", highest=1.0)
    presets.check_name("magcache", preset)


def published(constants: Mapping[str, Any], steps: int, setting: Mapping[str, float]) -> np.ndarray:
    """Return the steps that the rule computes with published ratios, bool [steps].

    A step is computed for all branches if one of them asks for it.

    Args:
        constants: The constants of a preset.
        steps: The number of steps of the loop.
        setting: ``threshold``, ``max_skip`` and ``retention``.
    """
    ratios = [nearest(branch, steps) for branch in constants["ratios"]]
    error = [drift(np.asarray(branch)) for branch in ratios]
    within = np.less if constants["limit"] == "below" else np.less_equal
    compute = np.ones(steps, bool)
    newest = 0
    for i in range(1, steps):
        skips = [
            i >= retained(constants["first"], setting["retention"], steps, branch, len(ratios))
            and bool(within(error[branch][newest, i], setting["threshold"]))
            for branch in range(len(ratios))
        ]
        kept = round(i * (len(constants["ratios"][0]) - 1) / (steps - 1)) in constants["keep"]
        compute[i] = not all(skips) or i - newest > setting["max_skip"] or kept
        newest = i if compute[i] else newest
    return compute


def retained(rounding: str, retention: float, steps: int, branch: int, branches: int) -> int:
    """Return the first step that may be skipped, as the source rounds it.

    Args:
        rounding: "nearest", "down", or "down, in calls" of all branches.
        retention: The share of the steps that is always computed.
        steps: The number of steps.
        branch: The branch of guidance.
        branches: The number of branches, which are called in turn.
    """
    if rounding == "nearest":
        return int(retention * steps + 0.5)
    if rounding == "down":
        return int(retention * steps)
    calls = int(branches * steps * retention)
    return -(-(calls - branch) // branches)


def nearest(ratios: Sequence[float], steps: int) -> np.ndarray:
    """Return ratios for another number of steps, float64 [steps], each that of the nearest step."""
    if steps == 1:
        return np.array(ratios[-1:], float)
    at = np.round(np.arange(steps) * ((len(ratios) - 1) / (steps - 1))).astype(int)
    return np.array([ratios[i] for i in at], float)


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "model",
    most: int | None = None,
    retention: float = 0.0,
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``.

    Args:
        profile: The measured tables, with residuals.
        computed_steps: The work to do, in full steps.
        sites: The granularity.
        most: Steps in a row that may be predicted (K of the paper, 3 to 6). None allows any number.
        retention: The share of the steps that is always computed, beginning with the first (the paper uses 0.1 to 0.2).

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile without residuals.
    """
    return _threshold.planned(
        profile, computed_steps, error, _threshold.residual_reuse, sites=sites, most=most, retention=retention
    )


def error(name: str, site: SiteProfile) -> np.ndarray:
    """Return the drift of the residual's magnitude, float64 [T, T], averaged over the branches."""
    _threshold.demand_residual(name, site)
    return np.asarray(np.mean([drift(ratio) for ratio in site.residual_ratio], axis=0))  # type: ignore[union-attr]


def drift(ratio: np.ndarray) -> np.ndarray:
    """Return the drift of a residual's magnitude, float64 [T, T].

    At [a, i] is the sum of |1 − ratio_{a+1} ⋯ ratio_j| over the steps j after a, up to i.

    Args:
        ratio: float64 [T], the ratio of the residual's magnitude to that of the step before.
    """
    steps = len(ratio)
    after = np.triu(np.ones((steps, steps), bool), 1)
    products = np.cumprod(np.where(after, ratio, 1.0), axis=1)
    return np.cumsum(np.where(after, np.abs(1 - products), 0.0), axis=1)
