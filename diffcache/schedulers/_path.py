"""Find paths over exactly K computed steps, for LeMiCa, MeanCache and DPCache.

An edge of a path predicts all steps between two computed steps. ``edge`` sets the cost of an edge. "state" is the root
mean square error of the final state if only this edge is predicted. This is the measure of LeMiCa, computed from the
loop's dynamics in place of runs of the network. It is exact to first order, for steps whose response to errors is that
of the profile. "local" is the sum of the relative errors of the edge's outputs: L1 for reuse, L2 from the Gram table
for predictions from several outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.schedulers import Planned
from diffcache.schedulers._cuts import anchored, demand_room, following
from diffcache.schedulers._sites import at, count, dynamics_of, one_of, whole_steps
from diffcache.schedulers.uniform import reuse
from diffcache.simulation.runs import reused, step_influence

EDGES = ("state", "local")


def allowed_runs(profile: Profile, computed_steps: float, edge: str, most: int | None) -> tuple[int, np.ndarray]:
    """Check the options of a path.

    Args:
        profile: The measured tables.
        computed_steps: The number of computed steps.
        edge: "state" or "local".
        most: Steps in a row that may be predicted. None allows any number.

    Returns:
        The number of runs, and bool [T, T + 1]: whether a run may begin at step a and end before step b.

    Raises:
        BadOption: For an option out of range, or a budget that cannot be met.
    """
    one_of("edge", edge, EDGES)
    runs = whole_steps(computed_steps, profile.steps)
    longest = None if most is None else count("most", most) + 1
    demand_room(profile.steps, runs, most=longest)
    return runs, following(profile.steps, most=longest)


def reused_along(
    profile: Profile,
    computed_steps: float,
    edge: str,
    most: int | None,
    best: Callable[[np.ndarray, int], np.ndarray],
) -> Planned:
    """Return the plan that reuses the newest output along the best path.

    Args:
        profile: The measured tables.
        computed_steps: The number of computed steps.
        edge: "state" or "local".
        most: Steps in a row that may be predicted. None allows any number.
        best: (costs float64 [T, T + 1], number of runs) -> bool [T], the computed steps of the best path.

    Raises:
        BadOption: For an option out of range, or a budget that cannot be met.
    """
    runs, allowed = allowed_runs(profile, computed_steps, edge, most)
    compute = best(np.where(allowed, reuse_costs(profile, edge), np.inf), runs)
    return Planned(sites={"model": reuse(compute)})


def reuse_costs(profile: Profile, edge: str) -> np.ndarray:
    """Return the costs of edges that reuse the newest output, float64 [T, T + 1]."""
    if edge == "local":
        return anchored(at(profile, "model")["model"].output.relative_l1.mean(0))
    return np.asarray(np.sqrt(reused(*of_the_loop(profile))))


def newest(weights: np.ndarray, anchors: int) -> np.ndarray:
    """Limit weights to the newest outputs.

    Args:
        weights: [B, T, K], of the outputs at the newest computed steps, the newest first.
        anchors: The number of outputs to keep.

    Returns:
        [B, T, anchors]. The oldest output gets the sum of the weights of those that are left out.
    """
    left = weights[:, :, :anchors].copy()
    left[:, :, -1] += weights[:, :, anchors:].sum(-1)
    return left


def of_the_loop(profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gram matrix of the guided outputs, and how far each step moves the final state.

    Returns:
        float64 [T, T], and float64 [T + 1, T] (see ``step_influence``).

    Raises:
        BadOption: For a profile without dynamics.
    """
    dynamics = dynamics_of(profile, "edge='local'")
    return dynamics.gram, step_influence(dynamics)


def gram_of(profile: Profile) -> np.ndarray:
    """Return the Gram matrix of the model's outputs, float64 [T, T], averaged over the branches."""
    return np.asarray(at(profile, "model")["model"].output.gram.mean(0))


def sizes(gram: np.ndarray) -> np.ndarray:
    """Return the norms of outputs, float64 [T]. Norms of almost 0 are replaced by a small positive number."""
    sizes = np.sqrt(np.diag(gram))
    return np.maximum(sizes, max(float(sizes.max()) * 1e-12, 1e-150))
