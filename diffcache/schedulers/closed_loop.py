"""Choose the computed steps, and their weights, by simulating the closed loop on a profile: no network is called.

The fit of this library pulls every accelerated state back to the full run's. Where that works, the outputs at computed
steps are nearly the full run's outputs, so the state's error is a combination of those outputs, and everything the
closed loop does (its least-squares fits included) happens in the T-dimensional space they span. A simulated run of a
mask costs a few milliseconds; a local search over masks, seconds.

First-order feedback is in: at a computed step the output moves by ``response · error of the state``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from diffcache.errors import BadOption
from diffcache.profile import Dynamics, Profile
from diffcache.schedule import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.schedulers.uniform import evenly

# Of 3, 5 and 8: on the Flux-type demo model, 8 of 50 steps, held out, 52, 57 and 58 dB. An anchor is one small latent.
ANCHORS = 6
RIDGE = 1e-9  # relative to the regressors' energy; differences of neighbouring outputs are nearly collinear
REACH = 4  # how far a move may shift a computed step


def plan(profile: Profile, computed_steps: int) -> CacheSchedule:
    """The schedule whose simulated closed loop ends nearest to the full run, of all that local moves find.

    Its weights come from the simulation too; all branches share them. A fit on recorded runs
    (``diffcache.profiling.Calibration``) weighs branches apart and corrects what the simulation left out.
    Raises BadOption for a profile without dynamics, or without the whole denoiser ("model") among its sites.
    """
    if profile.dynamics is None:
        reason = profile.provenance.get("no_dynamics", "none were measured")
        raise BadOption("profile", f"one without dynamics ({reason})", "one with dynamics")
    for name, denoiser in profile.denoisers.items():
        if "model" not in denoiser.sites:
            raise BadOption("profile", f"one of {', '.join(denoiser.sites)} in {name!r}", "one that measured 'model'")
    compute = improve(evenly(profile.steps, computed_steps), functools.partial(final_error, profile.dynamics))
    run = simulate(profile.dynamics, compute)
    before = profile.start  # a loop that starts late never enters the steps before; they count as computed
    site = SitePlan(
        compute=np.concatenate([np.ones(before, bool), compute]),
        weights=np.pad(run.weights, ((before, 0), (0, 0)))[None],
    )
    return CacheSchedule(
        steps=before + profile.steps,
        denoisers={
            name: DenoiserPlan(sites={"model": site}, class_name=d.class_name, config_digest=d.config_digest)
            for name, d in profile.denoisers.items()
        },
        noise_scheduler=profile.noise_scheduler,
        guidance=profile.guidance,
        timesteps=None if before else profile.timesteps,
        provenance={
            "scheduler": "closed_loop",
            "computed_steps": str(computed_steps),
            "expected_state_mse": f"{run.error:.3g}",
            "profile": profile.digest(),
        },
    )


@dataclass(frozen=True, slots=True)
class Simulation:
    """weights float64 [T, K] of equation (1); ``error``: mean squared error of the final state."""

    weights: np.ndarray
    error: float


def simulate(dynamics: Dynamics, compute: np.ndarray, begins: Collection[int] = ()) -> Simulation:
    """The closed loop when only ``compute`` (bool [T]) is computed. Exact where response is.

    begins  steps where another denoiser takes over, whose outputs the ones before cannot predict
    """
    steps = len(compute)
    # Vectors are rows of coordinates in the basis m_0 … m_{T-1}, the full run's guided outputs.
    missed = np.zeros((steps, steps))  # by what the output handed to step j missed m_j
    weights = np.zeros((steps, ANCHORS))
    anchors: list[np.ndarray] = []
    for i, computed in enumerate(compute):
        if computed:
            error = dynamics.reach[i - 1, :i] @ missed[:i] if i else np.zeros(steps)
            missed[i] = dynamics.response[i] * error
            output = missed[i].copy()
            output[i] += 1
            anchors = [output, *([] if i in begins else anchors)][:ANCHORS]
        else:
            gain = dynamics.reach[i, i]
            wanted = -(dynamics.reach[i, :i] @ missed[:i])  # brings the next state home when handed over beyond m_i
            wanted[i] += gain
            w = _fitted(gain * np.stack(anchors), wanted, dynamics.gram)
            weights[i, : len(w)] = w
            missed[i] = w @ np.stack(anchors)
            missed[i, i] -= 1
    error = dynamics.reach[-1] @ missed
    return Simulation(weights, max(float(error @ dynamics.gram @ error), 0.0))  # rounding can end below


def final_error(dynamics: Dynamics, compute: np.ndarray, begins: Collection[int] = ()) -> float:
    """Mean squared error of the final state, simulated."""
    return simulate(dynamics, compute, begins).error


def _fitted(anchors: np.ndarray, target: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Weights of the anchors (rows) whose sum is nearest to ``target``; regressors and ridge as in the fit on runs."""
    count = len(anchors)
    change = np.eye(count) - np.eye(count, k=1)  # rows: F_0 - F_1, F_1 - F_2, …, F_last
    change = np.vstack([np.eye(count)[:1], change[:-1]])
    basis = change @ anchors
    weighed = basis @ gram
    normal = weighed @ basis.T
    scale = np.sqrt(np.maximum(np.diag(normal), 1e-300))
    normal = normal / np.outer(scale, scale) + RIDGE * np.eye(count)
    reuse = np.eye(count)[0]  # the ridge draws towards plain reuse
    rest = target - anchors[0]
    return np.asarray((reuse + np.linalg.solve(normal, weighed @ rest / scale) / scale) @ change)


def improve(compute: np.ndarray, cost: Callable[[np.ndarray], float], fixed: Collection[int] = (0,)) -> np.ndarray:
    """Hill climbing by single moves from ``compute``, until none lowers ``cost``; steps in ``fixed`` stay."""
    best, moved = cost(compute), True
    while moved:
        moved = False
        for step in np.setdiff1d(np.flatnonzero(compute), list(fixed)):
            costs = [(cost(candidate), candidate) for candidate in shifts(compute, int(step))]
            if costs and min(costs, key=lambda c: c[0])[0] < best:
                best, compute = min(costs, key=lambda c: c[0])
                moved = True
    return compute


def shifts(compute: np.ndarray, step: int) -> list[np.ndarray]:
    """The masks that differ from ``compute`` in that one computed step, moved by at most REACH."""
    found = []
    for to in range(max(0, step - REACH), min(len(compute), step + REACH + 1)):
        if not compute[to]:
            candidate = compute.copy()
            candidate[step], candidate[to] = False, True
            found.append(candidate)
    return found
