"""Path of least peak error, predicted with the mean velocity (MeanCache).

MeanCache predicts v̂_i = v_{i-1} + (τ_{i+1} − τ_i) · J with J = (ū − v_j) / (τ_i − τ_j) and j = i − span. ū is the mean
of the outputs that the sampler received at the steps j … i − 1, weighted by the lengths of the steps. v_{i-1} and some
of those outputs may be predictions. (The paper defines ū as the mean velocity of the state; Euler steps make the two
equal.) The prediction is linear in the computed outputs, so it is unfolded into weights of the anchors, of which it may
need many. The oldest of ``anchors`` gets the weights of older ones: 6 instead of all moved the demo models' results by
less than 0.1 dB.

The span is chosen edge by edge, as in the paper. If it includes steps that this path predicts, the edge's cost uses the
full run's outputs of these steps, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._cuts import Cheapest, anchored
from diffcache.schedulers._path import allowed_runs, gram_of, newest, of_the_loop, sizes
from diffcache.schedulers._sites import count
from diffcache.simulation.runs import missed, times
from diffcache.simulation.simulator import ANCHORS

SOURCE = "MeanCache, arXiv 2601.19961, UnicomAI/MeanCache @2e12280"
NEEDS = "dynamics"
ALIASES: Aliases = {"path:kind=peak": {}}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    edge: str = "state",
    gamma: float = 4.0,
    span: int = 6,
    most: int | None = None,
    anchors: int = ANCHORS,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables; with dynamics for ``edge="state"``.
        computed_steps: A whole number.
        edge: "state" (the error of the final state) or "local" (the relative errors of the outputs).
        gamma: The exponent, 1 (the sum) or more (the worst edge counts most). The paper uses 4 to 5.
        span: The longest mean, in steps; 1 is plain reuse. The paper uses 6.
        most: Steps in a row that may be predicted. None allows any number.
        anchors: Computed steps that a prediction may use; 1 is plain reuse.

    Raises:
        BadOption: For an option out of range, or a budget that cannot be met.
    """
    count("anchors", anchors, least=1)
    runs, allowed = allowed_runs(profile, computed_steps, edge, most)
    found = edges(profile, edge, span)
    planned, notes = found.along(found.path(runs, gamma, allowed), anchors)
    return Planned(sites={"model": planned}, notes=notes)


@dataclass(frozen=True, slots=True)
class Edges:
    """The edges of all paths: the prediction of the steps between two computed steps, with the best span of each.

    Attributes:
        rules: Per span, float64 [T, T], the weights of earlier outputs in a prediction.
        spans: int [T, T + 1], at [a, b] the shortest best span of the edge from step a to step b.
        cost: float64 [T, T + 1], the error of each edge with this span.
    """

    rules: Mapping[int, np.ndarray]
    spans: np.ndarray
    cost: np.ndarray

    def path(self, runs: int, gamma: float, allowed: np.ndarray | None = None) -> np.ndarray:
        """Return the computed steps of the path of least peak error, bool [T].

        Args:
            runs: The number of computed steps.
            gamma: The exponent, as in ``plan``.
            allowed: bool [T, T + 1], the edges that a path may have. None: all.

        Raises:
            BadOption: For an exponent out of range.
        """
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 1 <= gamma <= 64:
            raise BadOption("gamma", gamma, "a number, 1 (the sum) to 64 (nearly the worst)")
        cost = self.cost if allowed is None else np.where(allowed, self.cost, np.inf)
        scale = cost[np.isfinite(cost)].max() or 1.0  # a power of small numbers would underflow
        found: np.ndarray = Cheapest((cost / scale) ** gamma, runs).compute(runs)
        return found

    def along(self, compute: np.ndarray, anchors: int) -> tuple[SitePlan, dict[str, str]]:
        """Return the plan of the path with these computed steps, and its notes.

        Args:
            compute: bool [T], the computed steps.
            anchors: Computed steps that a prediction may use.
        """
        begins = np.flatnonzero(compute)
        ends = np.append(begins[1:], len(compute))
        chosen = [int(self.spans[a, b]) for a, b in zip(begins, ends, strict=True)]
        rows = np.stack([self.rules[chosen[run]][i] for i, run in enumerate(np.cumsum(compute) - 1)])
        used = {f"{a}": f"{n}" for a, b, n in zip(begins, ends, chosen, strict=True) if b > a + 1}
        notes = {"spans": ", ".join(f"{n} from step {a}" for a, n in used.items())} if used else {}
        return SitePlan(compute=compute, weights=newest(unfolded(rows, compute), anchors)), notes


def edges(profile: Profile, edge: str, span: int) -> Edges:
    """Return the edges of a profile.

    Args:
        profile: The measured tables; with dynamics for ``edge="state"``.
        edge: "state" or "local", as in ``plan``.
        span: The longest mean, in steps.

    Raises:
        BadOption: For an option out of range, or a profile without dynamics.
    """
    spans = np.arange(1, min(count("span", span, least=1), profile.steps) + 1)
    rules = {int(s): mean_velocity(times(profile), int(s)) for s in spans}
    if edge == "state":
        gram, weights = of_the_loop(profile)
        costs = np.stack([np.sqrt(missed(gram, weights, continued(rule))) for rule in rules.values()])
    else:
        costs = np.stack([_local(gram_of(profile), continued(rule)) for rule in rules.values()])
    return Edges(rules, spans[costs.argmin(0)], costs.min(0))


def mean_velocity(levels: np.ndarray, span: int) -> np.ndarray:
    """Return the weights of earlier outputs in MeanCache's prediction, float64 [T, T].

    At [i, j] is the weight of the output at step j in the prediction of step i > 0. Rows sum to 1.

    Args:
        levels: float64 [T + 1], the levels at which the steps begin and the last one ends.
        span: The longest mean, in steps.
    """
    length = np.diff(levels)
    steps = len(length)
    rows = np.zeros((steps, steps))
    for i in range(1, steps):
        j = max(i - span, 0)
        rows[i, i - 1] = 1
        gone = levels[i] - levels[j]
        if gone:
            rows[i, j:i] += length[i] / gone**2 * length[j:i]
            rows[i, j] -= length[i] / gone
    return rows


def continued(rows: np.ndarray) -> np.ndarray:
    """Return the outputs of runs as coordinates in the full run's outputs, float64 [T, T, T].

    At [a, t] is the output of step t if all steps up to a are computed and none after it.

    Args:
        rows: float64 [T, T], the weights of earlier outputs in a prediction.
    """
    steps = len(rows)
    handed = np.broadcast_to(np.eye(steps), (steps, steps, steps)).copy()
    for t in range(1, steps):
        handed[:t, t] = rows[t, :t] @ handed[:t, :t]
    return handed


def unfolded(rows: np.ndarray, compute: np.ndarray) -> np.ndarray:
    """Turn weights of earlier outputs, predicted ones included, into weights of computed outputs.

    Args:
        rows: float64 [T, T], the weights of earlier outputs in a prediction.
        compute: bool [T], the computed steps.

    Returns:
        float64 [1, T, K], the weights of the newest computed steps, the newest first.
    """
    steps = len(compute)
    handed = np.eye(steps)
    for i in np.flatnonzero(~compute):
        handed[i] = rows[i, :i] @ handed[:i]
    weights = np.zeros((1, steps, int(compute.sum())))
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[:i])[::-1]
        weights[0, i, : len(anchors)] = handed[i, anchors]
    return weights


def _local(gram: np.ndarray, handed: np.ndarray) -> np.ndarray:
    """Return costs of edges, float64 [T, T + 1]: the sums of the relative L2 errors of predictions.

    Args:
        gram: float64 [T, T], the Gram matrix of the model's outputs.
        handed: float64 [T, T, T], the outputs of runs (see ``continued``).
    """
    errors = handed - np.eye(len(gram))
    squared = np.einsum("atx,atx->at", errors @ gram, errors)
    return anchored(np.sqrt(np.maximum(squared, 0) / sizes(gram) ** 2))
