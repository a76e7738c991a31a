"""Choose the computed steps by simulating the closed loop on the profile's Gram table: no network is called.

The fit of this library pulls every accelerated state back to the full run's. Where that works, the outputs at computed
steps are nearly the full run's outputs, so the state's error is a combination of those outputs, and everything the
closed loop does (its least-squares fits included) happens in the T-dimensional space they span. A simulated run of a
mask costs about a millisecond; a local search over masks, seconds.

First-order feedback is in: at a computed step the output moves by ``response · error of the state``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ANCHORS = 3
RIDGE = 1e-9
REACH = 4  # how far a move may shift a computed step


@dataclass(frozen=True, slots=True)
class Dynamics:
    """How the state moves: x_{i+1} = state_gain_i · x_i + output_gain_i · m_i, with m the guided output.

    gram         float64 [T, T], mean over elements of m_i · m_j
    state_gain, output_gain  float64 [T]
    response     float64 [T], the part of the state's error that shows in the output: m(x + e) ≈ m(x) + response · e
    """

    gram: np.ndarray
    state_gain: np.ndarray
    output_gain: np.ndarray
    response: np.ndarray

    def final_error(self, compute: np.ndarray) -> float:
        """Mean squared error of the final state, simulated, when only ``compute`` (bool [T]) is computed."""
        error = np.zeros(len(compute))  # coordinates in the basis of the full run's guided outputs
        anchors: list[np.ndarray] = []
        for i, computed in enumerate(compute):
            a, b = self.state_gain[i], self.output_gain[i]
            if computed:
                seen = self.response[i] * error
                error = a * error + b * seen
                seen[i] += 1
                anchors = [seen, *anchors][:ANCHORS]
            else:
                rest = a * error
                rest[i] -= b
                error = rest - self._projection(rest, anchors)
        return float(error @ self.gram @ error)

    def _projection(self, target: np.ndarray, anchors: list[np.ndarray]) -> np.ndarray:
        """The best least-squares approximation of ``target`` by the anchors, regularised as the fit is."""
        basis = np.stack([anchors[0], *(p - q for p, q in zip(anchors, anchors[1:], strict=False))])
        weighed = basis @ self.gram
        normal = weighed @ basis.T
        scale = np.sqrt(np.maximum(np.diag(normal), 1e-300))
        normal = normal / np.outer(scale, scale) + RIDGE * np.eye(len(basis))
        return np.asarray((np.linalg.solve(normal, weighed @ target / scale) / scale) @ basis)


def improve(compute: np.ndarray, cost: Callable[[np.ndarray], float]) -> np.ndarray:
    """Hill climbing by single moves from ``compute``, until none lowers ``cost``."""
    best, moved = cost(compute), True
    while moved:
        moved = False
        for step in np.flatnonzero(compute)[1:]:
            costs = [(cost(candidate), candidate) for candidate in shifts(compute, int(step))]
            if costs and min(costs, key=lambda c: c[0])[0] < best:
                best, compute = min(costs, key=lambda c: c[0])
                moved = True
    return compute


def shifts(compute: np.ndarray, step: int) -> list[np.ndarray]:
    """The masks that differ from ``compute`` in one computed step, moved by at most REACH; step 0 stays."""
    found = []
    for to in range(max(1, step - REACH), min(len(compute), step + REACH + 1)):
        if not compute[to]:
            candidate = compute.copy()
            candidate[step], candidate[to] = False, True
            found.append(candidate)
    return found
