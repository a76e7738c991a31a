"""Path of least error along the line through the two newest outputs (DPCache)."""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.schedulers import Aliases, Grid, Planned
from diffcache.schedulers._cuts import anchored, cheapest_pairs
from diffcache.schedulers._path import allowed_runs, gram_of, newest, of_the_loop, sizes
from diffcache.schedulers._sites import count
from diffcache.schedulers.taylorseer import extrapolation
from diffcache.simulation.runs import forecast
from diffcache.simulation.simulator import ANCHORS

SOURCE = "DPCache, arXiv 2602.22654"
NEEDS = "dynamics"
ALIASES: Aliases = {"path:kind=taylor": {}}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    edge: str = "state",
    most: int | None = None,
    anchors: int = ANCHORS,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables; with dynamics for ``edge="state"``.
        computed_steps: A whole number.
        edge: "state" (the error of the final state) or "local" (the relative errors of the outputs).
        most: Steps in a row that may be predicted. None allows any number.
        anchors: Computed steps that a prediction may use; 1 is plain reuse.

    Raises:
        BadOption: For an option out of range, or a budget that cannot be met.
    """
    count("anchors", anchors, least=1)
    runs, allowed = allowed_runs(profile, computed_steps, edge, most)
    if edge == "state":
        gram, weights = of_the_loop(profile)
        first, cost = forecast(gram, weights, profile.timesteps)
        first, cost = np.sqrt(first), np.sqrt(cost)
    else:
        first, cost = local_forecast(gram_of(profile), profile.timesteps)
    compute = cheapest_pairs(np.where(allowed[0], first, np.inf), np.where(allowed, cost, np.inf), runs)
    weights = extrapolation(Grid(profile.timesteps), compute, 1)
    return Planned(sites={"model": SitePlan(compute=compute, weights=newest(weights, anchors))})


def local_forecast(gram: np.ndarray, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return costs of edges for predictions on the line through the two newest outputs: the sums of relative L2 errors.

    Args:
        gram: float64 [T, T], the Gram matrix of the model's outputs.
        timesteps: float64 [T].

    Returns:
        float64 [T + 1], at [b] the cost of the first edge, which reuses an output; and float64 [T, T, T + 1], at [p, a,
        b] the cost of the edge from a to b after an edge that begins at p.
    """
    energy = np.diag(gram)
    between = np.maximum(energy[:, None] + energy - 2 * gram, 0)
    gap = timesteps[None, :] - timesteps[:, None]  # at [p, a], and at [a, t]
    slope = np.divide(1.0, gap, out=np.zeros_like(gap), where=gap != 0)
    beyond = slope[:, :, None] * gap  # at [p, a, t]
    along = energy[:, None] - gram - gram[:, :, None] + gram[:, None, :]  # at [p, a, t]: ⟨m_a − m_t, m_a − m_p⟩
    squared = between + 2 * beyond * along + beyond**2 * between[:, :, None]
    cost = anchored(np.sqrt(np.maximum(squared, 0)) / sizes(gram))
    steps = np.arange(len(gram))
    reuse_first = anchored(np.sqrt(between) / sizes(gram))[0]
    return reuse_first, np.where((steps[:, None] < steps)[:, :, None], cost, np.inf)
