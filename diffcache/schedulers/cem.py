"""Cheapest sequence of gaps by the cosine error of each step and gap (CEM).

The error of a step and an interval C is 1 − the cosine similarity of the outputs at the step and C steps before it. It
is added up over the steps from the beginning of the loop, and multiplied by C². A gap is the distance between two
computed steps. As in the source, a gap of g steps costs the error of its last step with the interval g − 1. A dynamic
program chooses the gaps of least total cost. Gaps differ by at most ``interval`` from T/K, rounded.

The source states this for the whole loop as ``DCS_module``. Its script for FLUX also sets gaps by hand for parts of
the loop, as an example; they are left out. Two parts are a reading. The error is that of the model's output, in place
of the features before the last layer. The host method is plain reuse or TaylorSeer at the model, in place of DuCa,
TeaCache and TaylorSeer inside it.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.errors import BadOption
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._cuts import Cheapest, following
from diffcache.schedulers._sites import at, count, flag, one_of, whole_steps
from diffcache.schedulers.taylorseer import extrapolated
from diffcache.schedulers.uniform import reuse

SOURCE = "CEM, arXiv 2512.23258, leaves162/CEM @ffa2a61"
NEEDS = ""
WEIGHTERS = {"none": 0, "linear": 1, "quadratic": 2}  # name -> power of the interval


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    order: int = 0,
    weighter: str = "quadratic",
    accumulated: bool = True,
    interval: int = 1,
    longest: int = 10,
    last: bool | None = None,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables.
        computed_steps: A whole number.
        order: 0 reuses the newest output. 1 to 4 extrapolates with this degree, as TaylorSeer.
        weighter: "none", "linear" or "quadratic": the power of the interval that its errors are multiplied by.
        accumulated: Whether errors are added up over the steps (FLUX and DiT in the source), or not (Wan2.1).
        interval: How far a gap may be from T/K, in steps.
        longest: The longest gap, in steps.
        last: Whether the last step is computed. If not, the last computed step is less than the shortest gap before it.
            None computes it if the gaps allow it.

    Raises:
        BadOption: For an option out of range, or a budget that no gaps meet.
    """
    computed = whole_steps(computed_steps, profile.steps)
    one_of("weighter", weighter, WEIGHTERS)
    count("interval", interval)
    count("longest", longest, least=1)
    ends = (True, False) if last is None else (flag("last", last),)
    options = {"interval": interval, "longest": longest}
    fitting = [end for end in ends if _exists(profile.steps, computed, last=end, **options)]
    if not fitting:
        able = [
            n for n in range(1, profile.steps + 1) if any(_exists(profile.steps, n, last=e, **options) for e in ends)
        ]
        nearest = sorted(able, key=lambda n: abs(n - computed))[:2]
        allowed = f"{' or '.join(map(str, sorted(nearest)))}, the nearest with interval={interval}, longest={longest}"
        raise BadOption("computed_steps", computed, allowed)
    cosine = at(profile, "model")["model"].output.cosine.mean(0)
    cost = gap_costs(cosine, WEIGHTERS[weighter], flag("accumulated", accumulated))
    least, most = gaps(profile.steps, computed, **options)
    compute = Cheapest(cut_costs(cost, least, most, fitting[0]), computed).compute(computed)
    made = extrapolated(Grid(profile.timesteps), compute, order) if order else reuse(compute)
    return Planned(sites={"model": made})


def gaps(steps: int, computed: int, interval: int, longest: int) -> tuple[int, int]:
    """Return the shortest and the longest gap. If the shortest is above the longest, there is no schedule."""
    usual = round(steps / computed)
    return max(1, usual - interval), min(longest, usual + interval)


def gap_costs(cosine: np.ndarray, power: int, accumulated: bool) -> np.ndarray:
    """Return the costs of gaps, float64 [T, T] at [a, b] for computed steps a < b, and 0 elsewhere.

    Args:
        cosine: float64 [T, T], the cosine similarity of outputs.
        power: The power of the interval that its errors are multiplied by.
        accumulated: Whether the errors of an interval are added up over the steps.
    """
    steps = len(cosine)
    cost = np.zeros((steps, steps))
    for interval in range(1, steps - 1):
        error = np.zeros(steps)
        error[interval:] = (1 - np.diagonal(cosine, interval)) * interval**power
        ends = np.arange(interval + 1, steps)
        cost[ends - interval - 1, ends] = (np.cumsum(error) if accumulated else error)[ends]
    return cost


def cut_costs(cost: np.ndarray, least: int, most: int, last: bool) -> np.ndarray:
    """Return the costs of runs, float64 [T, T + 1] at [a, b] for the steps from a to the step before b.

    The run that ends the loop costs the gap from its computed step to the last step.

    Args:
        cost: float64 [T, T], the costs of gaps.
        least: The shortest gap.
        most: The longest gap.
        last: Whether the last step is computed.
    """
    steps = len(cost)
    allowed = following(steps, least, most)
    rest = steps - 1 - np.arange(steps)
    allowed[:, -1] = rest < (1 if last else least)
    return np.where(allowed, np.concatenate([cost, cost[:, -1:]], axis=1), np.inf)


def _exists(steps: int, computed: int, *, interval: int, longest: int, last: bool) -> bool:
    """Return whether ``computed`` steps can be chosen with the gaps that the options allow."""
    least, most = gaps(steps, computed, interval, longest)
    first_end = steps - 1 if last else steps - least  # the earliest step that may be the last computed one
    return least <= most and (computed - 1) * least <= steps - 1 and (computed - 1) * most >= first_end
