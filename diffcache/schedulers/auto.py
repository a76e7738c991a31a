"""Predict by the smoothest outputs that fit those computed, and correct earlier errors (this project).

The rule needs no measurement. It assumes that the outputs of neighbouring steps are correlated, with a Matérn kernel of
order 3/2 over the timesteps, and simulates the closed loop under this assumption: each prediction is the combination of
kept outputs that is expected to bring the next *state* nearest to the full run's. When a computed output shows how far
the predictions before it were off, the next prediction corrects the state. Linear extrapolation corrects nothing.

Computed steps are spread by a power of the step's number, more of them at the beginning of the loop: errors that are
made early grow, above all under classifier-free guidance.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.documents.profile import Dynamics
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Grid
from diffcache.simulation.simulator import Simulator

SOURCE = "this project: docs/explanation/auto.md"
FEWEST = 4  # computed steps; a loop of four steps or fewer is computed in full
ROUNDING = 1e-6  # relative: 50 / (50 / 29) is a little above 29, and so is 50 / 1.724138, a speed-up as people print it
LENGTH = 8.0  # length of the kernel, in mean distances between computed steps
NOISE = 0.25  # share of an output that its neighbours do not show, times the square of the number of computed steps
POWER, GUIDED_POWER = 1.25, 2.0


def rule(grid: Grid, *, speedup: float = 3.0) -> SitePlan:
    """Compute one step in ``speedup``, rounded up, and at least four.

    A speed-up that is a ratio of steps, such as 50 / 29, computes exactly that number of them.

    Raises:
        BadOption: If ``speedup`` is below 1.
    """
    if not isinstance(speedup, (int, float)) or not speedup >= 1:
        raise BadOption("speedup", speedup, "a number, 1 or more (1 computes every step)")
    steps = grid.steps - grid.start
    computed = min(steps, max(FEWEST, math.ceil(steps / speedup * (1 - ROUNDING))))
    compute = np.ones(grid.steps, bool)
    compute[grid.start :] = spread(steps, computed, GUIDED_POWER if grid.guided else POWER)
    if compute.all():
        return SitePlan(compute=compute, weights=np.zeros((1, grid.steps, 1)))
    found = _weights(grid.timesteps[grid.start :], compute[grid.start :], _reach(grid))
    weights = np.zeros((1, grid.steps, found.shape[1]))
    weights[0, grid.start :] = found
    return SitePlan(compute=compute, weights=weights)


def spread(steps: int, computed: int, power: float) -> np.ndarray:
    """Return bool [T] with ``computed`` steps, at (T − T / computed) · (k / (computed − 1)) ^ power for each k.

    The last of them is as far from the end of the loop as an even spread would put it.
    """
    compute = np.zeros(steps, bool)
    last = -1
    for k in range(computed):
        place = round((steps - steps / computed) * (k / max(computed - 1, 1)) ** power)
        last = min(max(place, last + 1), steps - computed + k)
        compute[last] = True
    return compute


def _reach(grid: Grid) -> np.ndarray:
    """Return what each output adds to later states, float64 [T, T]. Unknown: every output adds as much."""
    found = grid.propagation()
    steps = grid.steps - grid.start
    return np.tril(np.ones((steps, steps))) if found is None else found[grid.start :, grid.start :]


def _weights(times: np.ndarray, compute: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the weights of the closed loop under the kernel, float64 [T, K]."""
    steps = len(times)
    span = times.max() - times.min()
    places = (times - times.min()) / span if span > 0 else np.linspace(0.0, 1.0, steps)
    distance = np.sqrt(3) * np.abs(places[:, None] - places) * compute.sum() / LENGTH
    gram = (1 + distance) * np.exp(-distance) + NOISE / compute.sum() ** 2 * np.eye(steps)
    silent = np.zeros(steps)
    prior = Dynamics(grams=gram[None], peaks=np.ones(1), reach=reach, response=silent, spread=silent)
    return Simulator(prior).fitted(compute).weights
