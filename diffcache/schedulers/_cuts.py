"""Cut the loop into runs, a computed step and the predicted steps after it, with exact dynamic programs.

A table of costs is float64 [T, T + 1]. At [a, b] is the cost of predicting the steps between the computed steps a and
b. b = T if no step after a is computed. A cost of inf is not allowed.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.errors import BadOption


def following(steps: int, least: int = 1, most: int | None = None) -> np.ndarray:
    """Return bool [T, T + 1]: whether b comes at least ``least`` and at most ``most`` steps after a."""
    length = np.arange(steps + 1) - np.arange(steps)[:, None]
    return np.asarray((length >= least) & (length <= (steps if most is None else most)))


def anchored(error: np.ndarray) -> np.ndarray:
    """Return the costs of runs as sums of errors.

    Args:
        error: float64 [..., T, T]. At [a, i] is the error of step i if it is predicted from step a.

    Returns:
        float64 [..., T, T + 1].
    """
    steps = error.shape[-1]
    sums = np.cumsum(np.triu(error, 1), axis=-1)  # at [a, i]: the sum over the steps after a, including i
    cost = np.concatenate([np.zeros((*error.shape[:-1], 1)), sums], axis=-1)
    return np.where(following(steps), cost, np.inf)


class Cheapest:
    """Cuts into exactly k runs of least total cost, for every k up to ``most``.

    Args:
        cost: float64 [..., T, T + 1]. The axes before the last two are separate problems, solved at once.
        most: The largest number of runs.
    """

    def __init__(self, cost: np.ndarray, most: int) -> None:
        *problems, self.steps, _ = cost.shape
        total = np.full((*problems, self.steps + 1), np.inf)  # at [..., n]: the cost of cutting the steps before n
        total[..., 0] = 0
        self._totals, self._begins = [total], [np.zeros(total.shape, int)]
        for _ in range(most):
            added = self._totals[-1][..., :-1, None] + cost
            begin = added.argmin(-2)
            self._begins.append(begin)
            self._totals.append(np.take_along_axis(added, begin[..., None, :], -2)[..., 0, :])

    def total(self, runs: int) -> np.ndarray:
        """Return the cost of the best cut into ``runs`` runs, float64 [...]. It is inf if there is no such cut."""
        return np.asarray(self._totals[runs][..., -1])

    def compute(self, runs: int) -> np.ndarray:
        """Return the computed steps of the best cut into ``runs`` runs, bool [..., T]."""
        end = np.full((*self._begins[0].shape[:-1], 1), self.steps)
        mask = np.zeros((*end.shape[:-1], self.steps), bool)
        for begins in self._begins[runs:0:-1]:
            end = np.take_along_axis(begins, end, -1)
            np.put_along_axis(mask, end, True, -1)
        return mask


def mildest(cost: np.ndarray, runs: int) -> np.ndarray:
    """Return the cut with the lexicographically smallest list of costs, each list sorted in descending order.

    A run that is added to two cuts does not change which of them is smaller, so the best cut of the first steps is part
    of the best cut.

    Args:
        cost: [T, T + 1]. Some cut into ``runs`` runs must have finite costs.
        runs: The number of runs.

    Returns:
        bool [T], the computed steps.
    """
    steps = len(cost)
    sorted_costs = np.full((steps + 1, 1), np.inf)  # at [n]: the costs in the best cut of the steps before n
    sorted_costs[0] = -np.inf  # zero runs; sorted to the end
    begins = []
    for _ in range(runs):
        begin = np.zeros(steps + 1, int)
        longer = np.full((steps + 1, sorted_costs.shape[1] + 1), np.inf)
        for n in range(1, steps + 1):
            ways = np.column_stack([sorted_costs[:n], cost[:n, n]])
            ways = -np.sort(-ways, axis=1)
            begin[n] = np.lexsort(ways.T[::-1])[0]
            longer[n] = ways[begin[n]]
        begins.append(begin)
        sorted_costs = longer
    return _walked_back(begins, steps)


def cheapest_pairs(first: np.ndarray, cost: np.ndarray, runs: int) -> np.ndarray:
    """Return the cut of least total cost, if a run's cost also depends on the run before.

    Args:
        first: float64 [T + 1]. At [b] is the cost of the run from step 0 to the step before b.
        cost: float64 [T, T, T + 1]. At [p, a, b] is the cost of the run of a if the run before begins at p.
        runs: The number of runs.

    Returns:
        bool [T], the computed steps.
    """
    steps = len(cost)
    total = np.full((steps, steps + 1), np.inf)  # at [a, b]: of cutting the steps before b with last run a
    total[0] = first
    befores = []
    for _ in range(runs - 1):
        added = total[:, :steps, None] + cost
        before = added.argmin(0)
        befores.append(before)
        total = np.take_along_axis(added, before[None], 0)[0]
    a, b = int(total[:, steps].argmin()), steps
    mask = np.zeros(steps, bool)
    mask[[0, a]] = True
    for before in befores[::-1]:
        a, b = int(before[a, b]), a
        mask[a] = True
    return mask


def demand_room(steps: int, runs: int, least: int = 1, most: int | None = None) -> None:
    """Raise BadOption if ``steps`` cannot be cut into ``runs`` runs of ``least`` to ``most`` steps."""
    most = steps if most is None else most
    if not runs * least <= steps <= runs * most:
        length = f"{least} to {most} steps, the computed one included"
        raise BadOption("computed_steps", runs, f"{math.ceil(steps / most)} to {steps // least} in runs of {length}")


def _walked_back(begins: list[np.ndarray], end: int) -> np.ndarray:
    """Return the computed steps of a cut, bool [T].

    Args:
        begins: For each number of runs int [T + 1], the best first step of the last run, by the end of that run.
        end: The number of steps T.
    """
    mask = np.zeros(end, bool)
    for begin in begins[::-1]:
        end = int(begin[end])
        mask[end] = True
    return mask
