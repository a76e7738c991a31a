"""Anneal the mask to the least error of the final state; the newest output is reused (BudCache).

The search begins with random steps after a fixed beginning. Simulated annealing moves one computed step, or two at
once. Steepest hill climbing follows: it moves one step within a window, or to a random place. The best mask of the
whole search is the result. Moves, temperatures and numbers are those of ``scripts/stage1_search_flux.py``.

Two parts are a reading. The source runs the network for each mask and compares latents. ``plan`` simulates the run on
the profile, with reuse of the model's output; ``searched`` takes any other error of a mask, such as that of real runs.
The source reuses the residual of all blocks together. ``sites="stack"`` reuses that of each stack, with the same mask.
The optional second stage, which trains other noise levels for the mask, is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.errors import BadOption
from diffcache.schedulers import Planned
from diffcache.schedulers._greedy import moving_stacks
from diffcache.schedulers._sites import at, count, dynamics_of, flag, one_of, whole_steps
from diffcache.schedulers._threshold import demand_number, demand_residual, residual_reuse
from diffcache.schedulers.uniform import reuse
from diffcache.simulation.simulator import Simulator

SOURCE = "BudCache, arXiv 2606.13496, Westlake-AGI-Lab/BudCache @14ba4c5, stage 1"
NEEDS = "dynamics"
SINGLE = 0.9  # share of annealing moves that move one step; the others move two
NEAR = 0.7  # share of single moves that stay within the window if they can
WINDOW = 3  # steps to either side
JUMPS = 2  # random places that hill climbing tries for each computed step


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    sites: str = "model",
    sa_iters: int = 200,
    t_max: float = 0.05,
    t_min: float = 1e-5,
    hc_iters: int = 20,
    restarts: int = 1,
    prefix: float = 0.25,
    seed: int = 0,
    response: bool = True,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables, with dynamics.
        computed_steps: A whole number.
        sites: "model" reuses the output of the model. "stack" reuses the residual of each list of blocks.
        sa_iters: Moves of simulated annealing.
        t_max: The temperature of the first move, in units of the final state's mean squared error.
        t_min: The temperature that the last move approaches.
        hc_iters: The most rounds of hill climbing.
        restarts: The number of searches, each from other random steps.
        prefix: The share of the computed steps that stay at the beginning of the loop, rounded down; one at least.
        seed: The seed of the random numbers.
        response: Whether the simulation includes the network's response to errors of the state. The response is
            measured on fitted runs, and plain reuse leaves larger errors. Compare both on real runs.

    Raises:
        BadOption: For a profile without dynamics, or an option out of range.
    """
    one_of("sites", sites, ("model", "stack"))
    computed = whole_steps(computed_steps, profile.steps)
    found = moving_stacks(profile) if sites == "stack" else at(profile, sites)
    if sites == "stack":
        for name, site in found.items():
            demand_residual(name, site)
    dynamics = dynamics_of(profile)
    if not flag("response", response):
        silent = np.zeros(profile.steps)
        dynamics = dataclasses.replace(dynamics, response=silent, spread=silent)
    simulator = Simulator(dynamics)

    def error(compute: np.ndarray) -> float:
        run = simulator.played(reuse(compute))
        assert run is not None  # plain reuse stays in the space of outputs
        return run.error

    compute = searched(
        profile.steps,
        computed,
        error,
        sa_iters=sa_iters,
        t_max=t_max,
        t_min=t_min,
        hc_iters=hc_iters,
        restarts=restarts,
        prefix=prefix,
        seed=seed,
    )
    made = residual_reuse(compute) if sites == "stack" else reuse(compute)
    return Planned(sites=dict.fromkeys(found, made))


def searched(
    steps: int,
    computed: int,
    error: Callable[[np.ndarray], float],
    *,
    sa_iters: int = 200,
    t_max: float = 0.05,
    t_min: float = 1e-5,
    hc_iters: int = 20,
    restarts: int = 1,
    prefix: float = 0.25,
    seed: int = 0,
) -> np.ndarray:
    """Return the best mask of the search, bool [steps].

    Args:
        steps: The number of steps T.
        computed: The number of computed steps.
        error: Returns the error of a mask, bool [steps]. It is called once for each mask.
        sa_iters: As in ``plan``, like all other options.
        t_max: The temperature of the first move, in units of ``error``.
        t_min: The temperature that the last move approaches.
        hc_iters: The most rounds of hill climbing.
        restarts: The number of searches.
        prefix: The share of the computed steps that stay at the beginning.
        seed: The seed of the random numbers.

    Raises:
        BadOption: For an option out of range.
    """
    for name, number, least in (("sa_iters", sa_iters, 0), ("hc_iters", hc_iters, 0), ("restarts", restarts, 1)):
        count(name, number, least=least)
    demand_number("prefix", prefix, "a share of the computed steps, 0 to 1", highest=1.0)
    demand_number("t_min", t_min, "a number above 0")
    demand_number("t_max", t_max, "a number, t_min or more")
    if not 0 < t_min <= t_max:
        raise BadOption("t_min", t_min, f"a number above 0, up to t_max={t_max:g}")
    draw, first = np.random.default_rng(count("seed", seed)), max(1, int(prefix * computed))
    known: dict[bytes, float] = {}

    def of(compute: np.ndarray) -> float:
        key = compute.tobytes()
        if key not in known:
            known[key] = error(compute)
        return known[key]

    best: np.ndarray | None = None
    for _ in range(restarts):
        now = np.arange(steps) < first
        now[draw.choice(np.arange(first, steps), computed - first, replace=False)] = True
        best = now if best is None or of(now) < of(best) else best
        movable = first < computed < steps
        for i in range(sa_iters if movable else 0):
            candidate = moved(now, first, draw)
            worse = of(candidate) - of(now)
            if worse < 0 or draw.random() < math.exp(-worse / (t_max * (t_min / t_max) ** (i / sa_iters))):
                now = candidate
                best = now if of(now) < of(best) else best
        for _ in range(hc_iters if movable else 0):
            candidate = min(neighbours(now, first, draw), key=of)
            if of(candidate) >= of(now):
                break
            now = candidate
            best = now if of(now) < of(best) else best
    assert best is not None
    return best


def moved(compute: np.ndarray, first: int, draw: np.random.Generator) -> np.ndarray:
    """Return the mask after one random move of annealing, bool [T]. Steps before ``first`` do not move."""
    on, off = first + np.flatnonzero(compute[first:]), first + np.flatnonzero(~compute[first:])
    candidate = compute.copy()
    if draw.random() < SINGLE or min(len(on), len(off)) < 2:
        step = draw.choice(on)
        near = off[np.abs(off - step) <= WINDOW]
        to = draw.choice(near if draw.random() < NEAR and len(near) else off)
        candidate[step], candidate[to] = False, True
    else:
        steps, places = draw.choice(on, 2, replace=False), draw.choice(off, 2, replace=False)
        candidate[steps], candidate[places] = False, True
    return candidate


def neighbours(compute: np.ndarray, first: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Return the masks that a round of hill climbing compares. Steps before ``first`` do not move.

    A computed step moves to each place within the window, and to random places of the whole loop.
    """
    found = []
    for step in (first + np.flatnonzero(compute[first:])).tolist():
        window = np.arange(max(first, step - WINDOW), min(len(compute), step + WINDOW + 1))
        for to in (*window, *draw.integers(first, len(compute), JUMPS)):
            if not compute[to]:
                candidate = compute.copy()
                candidate[step], candidate[to] = False, True
                found.append(candidate)
    return found or [compute]
