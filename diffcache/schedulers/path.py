"""The best path over exactly so many computed steps: shortest, mildest or in between (LeMiCa, MeanCache, DPCache).

An edge of the path predicts everything between two computed steps.

``kind`` says what is best, and how steps are predicted:

shortest  least sum of edges; the newest output is reused
minimax   least worst edge, then least second worst, and so on (LeMiCa); the newest output is reused
peak      least sum of edge**gamma, between the sum and the worst (MeanCache); outputs move on with the mean velocity
taylor    least sum of edges that depend on the two newest computed steps (DPCache); the line through their outputs

``edge`` says what an edge weighs. "state": the final state's error, root mean square, if everything but this edge is
computed; that is LeMiCa's measure, with the loop's dynamics in the place of runs of the network: to first order, exact
for steps that answer to errors as the profile says. "local": the relative errors of the edge's outputs, added up; L1
for reuse, L2 from the Gram table for the other two.

The mean velocity in terms of equation (1): MeanCache predicts v̂_i = v_{i-1} + (τ_{i+1} − τ_i) · J with
J = (ū − v_j) / (τ_i − τ_j), j = i − span, and ū the mean of what was handed to the steps j … i − 1, weighed by their
lengths; v_{i-1} and some of those may be predictions themselves. (In its own terms ū is the state's mean velocity;
Euler steps make it this.) All of it is linear in what was computed, so it is unfolded into weights of the anchors, of
which it may take many: what falls on older ones than ``anchors`` goes to the oldest of these (6 in the place of all
moved the demo models' results by less than 0.1 dB). The span is chosen edge by edge, as there; where it reaches over
steps that this path predicts, the edge was weighed with the full run's outputs in their place, as there.
"""

from __future__ import annotations

import numpy as np

from diffcache.errors import BadOption
from diffcache.profile import Profile
from diffcache.schedule import SitePlan
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._cuts import Cheapest, anchored, cheapest_pairs, demand_room, following, mildest
from diffcache.schedulers._runs import forecast, influence, missed, reused, times
from diffcache.schedulers._simulation import ANCHORS
from diffcache.schedulers._sites import at, count, one_of, whole_steps
from diffcache.schedulers.taylor import extrapolation
from diffcache.schedulers.uniform import reuse

SOURCE = (
    "LeMiCa, arXiv 2511.00090 (minimax); MeanCache, arXiv 2601.19961, UnicomAI/MeanCache @2e12280 (peak); "
    "DPCache, arXiv 2602.22654 (taylor)"
)
KINDS = ("shortest", "minimax", "peak", "taylor")
EDGES = ("state", "local")


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    kind: str = "minimax",
    edge: str = "state",
    gamma: float = 4.0,
    span: int = 6,
    most: int | None = None,
    anchors: int = ANCHORS,
) -> Planned:
    """Exactly ``computed_steps`` of the model's steps are computed.

    kind     "shortest", "minimax", "peak" or "taylor"
    edge     "state", for profiles with dynamics, or "local"
    gamma    exponent of "peak", 1 or more (MeanCache: 4 to 5)
    span     longest mean of "peak", in steps; 1 is plain reuse (MeanCache: 6)
    most     steps in a row that may be predicted; None: any number
    anchors  computed steps that a prediction of "peak" or "taylor" may use; 1 is plain reuse

    Raises BadOption.
    """
    one_of("kind", kind, KINDS)
    one_of("edge", edge, EDGES)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 1 <= gamma <= 64:
        raise BadOption("gamma", gamma, "a number, 1 (the sum) to 64 (nearly the worst)")
    count("span", span, least=1)
    count("anchors", anchors, least=1)
    runs = whole_steps(computed_steps, profile.steps)
    longest = None if most is None else count("most", most) + 1
    demand_room(profile.steps, runs, most=longest)
    allowed = following(profile.steps, most=longest)
    if kind == "taylor":
        return _taylor(profile, edge, runs, allowed, anchors)
    if kind == "peak":
        return _peak(profile, edge, runs, allowed, anchors, gamma, span)
    cost = np.where(allowed, _reuse_costs(profile, edge), np.inf)
    compute = Cheapest(cost, runs).compute(runs) if kind == "shortest" else mildest(cost, runs)
    return Planned(sites={"model": reuse(compute)})


def _reuse_costs(profile: Profile, edge: str) -> np.ndarray:
    if edge == "local":
        return anchored(at(profile, "model")["model"].output.relative_l1.mean(0))
    return np.asarray(np.sqrt(reused(*_of_the_loop(profile))))


def _taylor(profile: Profile, edge: str, runs: int, allowed: np.ndarray, anchors: int) -> Planned:
    if edge == "state":
        gram, weights = _of_the_loop(profile)
        first, cost = forecast(gram, weights, profile.timesteps)
        first, cost = np.sqrt(first), np.sqrt(cost)
    else:
        first, cost = _local_forecast(_gram(profile), profile.timesteps)
    compute = cheapest_pairs(np.where(allowed[0], first, np.inf), np.where(allowed, cost, np.inf), runs)
    weights = extrapolation(Grid(profile.timesteps), compute, 1)
    return Planned(sites={"model": SitePlan(compute=compute, weights=newest(weights, anchors))})


def _peak(
    profile: Profile, edge: str, runs: int, allowed: np.ndarray, anchors: int, gamma: float, span: int
) -> Planned:
    spans = range(1, min(span, profile.steps) + 1)
    rules = [mean_velocity(times(profile), s) for s in spans]
    if edge == "state":
        gram, weights = _of_the_loop(profile)
        costs = np.stack([np.sqrt(missed(gram, weights, continued(rule))) for rule in rules])
    else:
        costs = np.stack([_local(_gram(profile), continued(rule)) for rule in rules])
    best = costs.argmin(0)  # of several spans that are as good, the shortest
    cost = np.where(allowed, costs.min(0), np.inf)
    scale = cost[np.isfinite(cost)].max() or 1.0  # a power of small numbers would underflow
    compute = Cheapest((cost / scale) ** gamma, runs).compute(runs)
    begins = np.flatnonzero(compute)
    ends = np.append(begins[1:], profile.steps)
    chosen = [int(best[a, b]) for a, b in zip(begins, ends, strict=True)]
    rows = np.stack([rules[chosen[run]][i] for i, run in enumerate(np.cumsum(compute) - 1)])
    used = {f"{a}": f"{spans[n]}" for a, b, n in zip(begins, ends, chosen, strict=True) if b > a + 1}
    notes = {"spans": ", ".join(f"{n} from step {a}" for a, n in used.items())} if used else {}
    weights = newest(unfolded(rows, compute), anchors)
    return Planned(sites={"model": SitePlan(compute=compute, weights=weights)}, notes=notes)


def mean_velocity(levels: np.ndarray, span: int) -> np.ndarray:
    """float64 [T, T], at [i, j]: weight of what step j was handed in what MeanCache hands to step i > 0; rows sum to
    1.

    levels  float64 [T + 1], where the steps begin and the last one ends
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
    """float64 [T, T, T], at [a, t]: what step t is handed when all up to a are computed and none after it, as
    coordinates in the outputs."""
    steps = len(rows)
    handed = np.broadcast_to(np.eye(steps), (steps, steps, steps)).copy()
    for t in range(1, steps):
        handed[:t, t] = rows[t, :t] @ handed[:t, :t]
    return handed


def unfolded(rows: np.ndarray, compute: np.ndarray) -> np.ndarray:
    """float64 [1, T, K]: ``rows`` [T, T], weights of what was handed, as weights of what was computed (bool [T])."""
    steps = len(compute)
    handed = np.eye(steps)
    for i in np.flatnonzero(~compute):
        handed[i] = rows[i, :i] @ handed[:i]
    weights = np.zeros((1, steps, int(compute.sum())))
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[:i])[::-1]
        weights[0, i, : len(anchors)] = handed[i, anchors]
    return weights


def newest(weights: np.ndarray, anchors: int) -> np.ndarray:
    """[B, T, K] -> [B, T, at most ``anchors``]: the weights of older ones go to the oldest that is left."""
    left = weights[:, :, :anchors].copy()
    left[:, :, -1] += weights[:, :, anchors:].sum(-1)
    return left


def _of_the_loop(profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    if profile.dynamics is None:
        reason = profile.provenance.get("no_dynamics", "none were measured")
        raise BadOption("profile", f"one without dynamics ({reason})", "one with dynamics, or edge='local'")
    return profile.dynamics.gram, influence(profile.dynamics)


def _gram(profile: Profile) -> np.ndarray:
    return np.asarray(at(profile, "model")["model"].output.gram.mean(0))


def _local(gram: np.ndarray, handed: np.ndarray) -> np.ndarray:
    """Costs: relative L2 errors of what is handed, added up."""
    errors = handed - np.eye(len(gram))
    squared = np.einsum("atx,atx->at", errors @ gram, errors)
    return anchored(np.sqrt(np.maximum(squared, 0) / _sizes(gram) ** 2))


def _local_forecast(gram: np.ndarray, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``_local``, of the line through the two newest outputs: [T + 1], and [T, T, T + 1] at [p, a, b]."""
    energy = np.diag(gram)
    between = np.maximum(energy[:, None] + energy - 2 * gram, 0)
    gap = timesteps[None, :] - timesteps[:, None]  # at [p, a], and at [a, t]
    slope = np.divide(1.0, gap, out=np.zeros_like(gap), where=gap != 0)
    beyond = slope[:, :, None] * gap  # at [p, a, t]
    along = energy[:, None] - gram - gram[:, :, None] + gram[:, None, :]  # at [p, a, t]: ⟨m_a − m_t, m_a − m_p⟩
    squared = between + 2 * beyond * along + beyond**2 * between[:, :, None]
    cost = anchored(np.sqrt(np.maximum(squared, 0)) / _sizes(gram))
    steps = np.arange(len(gram))
    reuse_first = anchored(np.sqrt(between) / _sizes(gram))[0]
    return reuse_first, np.where((steps[:, None] < steps)[:, :, None], cost, np.inf)


def _sizes(gram: np.ndarray) -> np.ndarray:
    sizes = np.sqrt(np.diag(gram))
    return np.maximum(sizes, max(float(sizes.max()) * 1e-12, 1e-150))
