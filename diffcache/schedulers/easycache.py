"""Recompute when the input's change predicts enough change of the output (EasyCache).

Decided in the run, before the network begins; its residual F − x is reused.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import Online, SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._greedy import asked, in_a_row, online, per_decision
from diffcache.schedulers._sites import at, count

SOURCE = "EasyCache, arXiv 2507.02860, H-EmbodVis/EasyCache @5127804; every branch called apart decides for itself"
NEEDS = ""
BISECTIONS = 50  # of the range between the least and the largest threshold: to float32's precision and beyond
CLEAR = 1e-6  # relative


def rule(grid: Grid, *, threshold: float = 0.05, warmup: int = 10, most: int | None = None) -> tuple[SitePlan, Online]:
    """``threshold``: of the expected change of the output since the newest computed step, relative L1. ``warmup``:
    steps at the beginning that are always computed. ``most``: steps in a row that may be predicted."""
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
    """Work is to come as near to ``computed_steps`` as a threshold brings it, and not above.

    warmup     steps at the beginning that are always computed (EasyCache: 10 of 50); the rule needs 2
    threshold  as in ``rule``; None: found by playing the rule on the profile. Given, it is used whatever the budget
    most       steps in a row that may be predicted; None: any number

    Raises BadOption, also for a profile of a model whose output has not the shape of its input.
    """
    first, row = count("warmup", warmup), in_a_row(most, profile.steps)
    site = at(profile, "model")["model"]
    if site.residual is None:
        raise BadOption(
            "profile", "one without a residual of 'model'", "one of a model whose input has its output's shape"
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
    """bool [T], the steps that the rule computes.

    change  float64 [T], relative L1 change of the input from the step before
    l1      float64 [T, T], mean absolute difference of outputs; ``size`` [T], mean absolute value

    A profile has no table of inputs. Between computed steps the input is taken to move straight on and keep its size.
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
    """The lowest threshold, as far as bisection finds it, that computes few enough steps; and how many those are."""
    change, l1 = per_decision(profile, site.input_change), per_decision(profile, site.output.l1)
    relative = per_decision(profile, site.output.relative_l1).sum(1)
    size = np.divide(l1.sum(1), relative, out=np.ones_like(relative), where=relative > 0)  # one that stays has any size

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
    clear = high + CLEAR * high  # off the edge, where rounding would decide
    limit = clear if work(clear) <= computed_steps + 1e-9 else high
    return limit, work(limit)
