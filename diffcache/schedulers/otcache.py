"""Computed steps between those of a generous and of an extreme budget, by optimal transport (OTCache).

The computed steps of a schedule are a distribution over the loop. Its quantile function maps k/K to the k-th computed
step, and 1 to the end of the loop. In one dimension, optimal transport interpolates two distributions by the weighted
mean of their quantile functions. The mean is read at K places for a budget of K steps.

The source is the abstract; code was not published at the commit in ``SOURCE``. These parts are a reading. The
reference is the path of MeanCache, by the same group, with the same prediction. Reference and anchor compute a half and
a tenth of the steps. The anchor is the mask with the least simulated error of the final state that hill climbing finds,
in place of Optuna with a perceptual score of real runs. Quantile functions are linear between computed steps. The
weight is linear in the budget. Budgets outside of the two get the schedule of the nearer stage, for their number of
steps.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.errors import BadOption
from diffcache.schedulers import Planned
from diffcache.schedulers._sites import count, dynamics_of, whole_steps
from diffcache.schedulers._threshold import demand_number
from diffcache.schedulers.closed_loop import improve
from diffcache.schedulers.meancache import Edges, edges
from diffcache.schedulers.uniform import evenly
from diffcache.simulation.simulator import ANCHORS, Simulator

SOURCE = "OTCache, arXiv 2606.31026 (abstract), UnicomAI/OTCache @b9b9acf (without code)"
NEEDS = "dynamics"


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    reference: float = 0.5,
    anchor: float = 0.1,
    gamma: float = 4.0,
    span: int = 6,
    anchors: int = ANCHORS,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables, with dynamics.
        computed_steps: A whole number.
        reference: The share of the steps that the reference schedule computes.
        anchor: The share of the steps that the anchor schedule computes.
        gamma: The exponent of MeanCache's path, 1 (the sum) or more (the worst edge counts most).
        span: The longest mean of MeanCache's prediction, in steps; 1 is plain reuse.
        anchors: Computed steps that a prediction may use; 1 is plain reuse.

    Raises:
        BadOption: For a profile without dynamics, or an option out of range.
    """
    computed = whole_steps(computed_steps, profile.steps)
    demand_number("reference", reference, "a share of the steps, 0 to 1", highest=1.0)
    demand_number("anchor", anchor, "a share of the steps, below reference")
    if anchor >= reference:
        raise BadOption("anchor", anchor, f"a share of the steps, below reference={reference:g}")
    count("anchors", anchors, least=1)
    simulator = Simulator(dynamics_of(profile))
    found = edges(profile, "state", span)
    many, few = (max(1, round(share * profile.steps)) for share in (reference, anchor))
    if computed >= many:
        compute = found.path(computed, gamma)
    elif computed <= few:
        compute = extreme(found, simulator, computed, gamma, anchors)
    else:
        compute = between(found.path(many, gamma), extreme(found, simulator, few, gamma, anchors), computed)
    made, notes = found.along(compute, anchors)
    return Planned(sites={"model": made}, notes=notes)


def extreme(found: Edges, simulator: Simulator, computed: int, gamma: float, anchors: int) -> np.ndarray:
    """Return the mask with the least simulated error that hill climbing finds, bool [T].

    The searches begin with the even mask and with the path.

    Args:
        found: The edges of the profile.
        simulator: Simulates the loop.
        computed: The number of computed steps.
        gamma: The exponent of the path.
        anchors: Computed steps that a prediction may use.
    """

    def error(compute: np.ndarray) -> float:
        run = simulator.played(found.along(compute, anchors)[0])
        assert run is not None  # the mean velocity stays in the space of outputs
        return run.error

    starts = (evenly(simulator.steps, computed), found.path(computed, gamma))
    return min((improve(start, error) for start in starts), key=error)


def between(reference: np.ndarray, anchor: np.ndarray, computed: int) -> np.ndarray:
    """Return the mask on the way from one mask to another, bool [T], with ``computed`` computed steps.

    Args:
        reference: bool [T], the mask with more computed steps.
        anchor: bool [T], the mask with fewer.
        computed: A number of steps from that of the anchor to that of the reference.
    """
    way = (reference.sum() - computed) / (reference.sum() - anchor.sum())
    order = np.arange(computed)
    places = (1 - way) * quantile(reference, order / computed) + way * quantile(anchor, order / computed)
    compute = np.zeros(len(reference), bool)
    # A weight that is linear in the budget keeps places at least 1 apart, so they round to different steps.
    compute[np.floor(np.round(places, 9) + 0.5).astype(int)] = True
    return compute


def quantile(compute: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the quantile function of the computed steps, float64: k/K -> the k-th computed step, 1 -> T.

    Args:
        compute: bool [T], the computed steps.
        at: The arguments, 0 to 1.
    """
    ends = np.append(np.flatnonzero(compute), len(compute))
    return np.asarray(np.interp(at, np.linspace(0, 1, len(ends)), ends))
