"""Recompute when the input's change predicts enough change of the output (EasyCache).

The decision is taken in the run, before the network begins. The network's residual F − x is reused.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import Online, SitePlan
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._greedy import asked, in_a_row, online, per_decision
from diffcache.schedulers._sites import at, count

SOURCE = "EasyCache, arXiv 2507.02860, H-EmbodVis/EasyCache @5127804; every branch called apart decides for itself"
NEEDS = ""
BISECTIONS = 50  # halvings of the range of thresholds, more than float32 resolves
CLEAR = 1e-6  # relative margin between the found threshold and the edge at which the decision changes


def rule(grid: Grid, *, threshold: float = 0.05, warmup: int = 10, most: int | None = None) -> tuple[SitePlan, Online]:
    """Compute a step if the expected change of the output has added up to the threshold.

    Args:
        grid: The loop.
        threshold: The expected change of the output since the newest computed step, relative L1.
        warmup: Steps at the beginning that are always computed.
        most: Steps in a row that may be predicted. None allows any number.

    Raises:
        BadOption: For an option out of range.
    """
    first = grid.start + count("warmup", warmup)
    return asked(grid.steps, first), online("output_rate", grid.steps, threshold, most=most)


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    warmup: int = 2,
    threshold: float | None = None,
    most: int | None = None,
) -> Planned:
    """Plan to the largest work that is not above ``computed_steps``, as far as bisection finds it.

    Args:
        profile: The measured tables, with the residual of the model.
        computed_steps: The work to do, in full steps.
        warmup: Steps at the beginning that are always computed (EasyCache: 10 of 50). The rule needs 2.
        threshold: As in ``rule``. None simulates the rule on the profile to find it. A given threshold is used at any
            budget.
        most: Steps in a row that may be predicted. None allows any number.

    Raises:
        BadOption: For an option out of range, a budget that no threshold meets, or a profile of a model with an input
            and an output of different shapes.
    """
    first, row = count("warmup", warmup), in_a_row(most, profile.steps)
    site = at(profile, "model")["model"]
    if site.residual is None:
        raise Unusable(
            "profile",
            "it has no residual of 'model'",
            "Pass a profile of a model with an input and an output of the same shape",
        )
    notes = {}
    if threshold is None:
        threshold, work = _threshold(profile, site, computed_steps, first, row)
        notes["work"] = f"{work:.6g} full steps"
    return Planned(
        sites={"model": asked(profile.steps, first)},
        online=online("output_rate", profile.steps, threshold, most=most),
        notes=notes | {"threshold": f"{threshold:.6g}"},
    )


def played(change: np.ndarray, l1: np.ndarray, size: np.ndarray, limit: float, first: int, most: int) -> np.ndarray:
    """Simulate the rule and return the steps that it computes, bool [T].

    A profile has no table of inputs. Between computed steps the input is assumed to move in a straight line and to keep
    its size.

    Args:
        change: float64 [T], the relative L1 change of the input from the step before.
        l1: float64 [T, T], the mean absolute difference of outputs.
        size: float64 [T], the mean absolute value of outputs.
        limit: The threshold.
        first: Steps at the beginning that are always computed.
        most: Steps in a row that may be predicted.
    """
    compute = np.ones(len(change), bool)
    newest, before, level, row = 0, -1, 0.0, 0
    for i in range(1, len(change)):
        if i >= first and before >= 0:
            moved = change[before + 1 : newest + 1].sum()
            if moved > 0 and size[newest] > 0:
                level += l1[newest, before] / moved * change[i] / size[newest]
                compute[i] = level >= limit or row >= most
        if compute[i]:
            newest, before, level, row = i, newest, 0.0, 0
        else:
            row += 1
    return compute


def _threshold(
    profile: Profile, site: SiteProfile, computed_steps: float, first: int, most: int
) -> tuple[float, float]:
    """Return the lowest threshold within the budget, as far as bisection finds it, and its number of computed steps.

    Args:
        profile: The measured tables.
        site: The profile of the model.
        computed_steps: The budget.
        first: Steps at the beginning that are always computed.
        most: Steps in a row that may be predicted.

    Raises:
        BadOption: If no threshold meets the budget.
    """
    change, l1 = per_decision(profile, site.input_change), per_decision(profile, site.output.l1)
    relative = per_decision(profile, site.output.relative_l1).sum(1)
    size = np.divide(l1.sum(1), relative, out=np.ones_like(relative), where=relative > 0)  # 1 if nothing changes

    def work(limit: float) -> float:
        runs = [played(*tables, limit, first, most) for tables in zip(change, l1, size, strict=True)]
        return float(np.mean([run.sum() for run in runs]))

    low, high = 0.0, 1.0
    while (least := work(high)) > computed_steps + 1e-9:
        if high > 1e12:
            raise BadOption("computed_steps", computed_steps, f"{least:.4g} or more: so much is always done")
        low, high = high, 4 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if work(middle) <= computed_steps + 1e-9:
            high = middle
        else:
            low = middle
    clear = high + CLEAR * high  # away from the edge, at which rounding would decide
    limit = clear if work(clear) <= computed_steps + 1e-9 else high
    return limit, work(limit)
