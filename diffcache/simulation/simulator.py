"""Simulate the closed loop on a profile. No network is called.

The closed-loop fit brings every accelerated state back to the full run's. If it succeeds, the outputs at computed steps
are nearly the full run's outputs, so the state's error is a combination of these outputs. The whole loop, its
least-squares fits included, is then a computation in the T-dimensional space of these outputs. A simulated run of a
mask takes a few milliseconds, and a local search over masks takes seconds.

Feedback is modelled to first order. At a computed step the output changes by ``response · error of the state``, and by
a part in a separate direction, as large as the measured ``spread`` of the responses. Large weights of opposite signs
make that part larger. A simulation without it predicted 10 dB too much for guided runs, and its weights were worse
there than plain reuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from diffcache.documents.profile import Dynamics
from diffcache.documents.schedule import MOST_DB, SitePlan

# 3, 5 and 8 anchors gave 52, 57 and 58 dB on the Flux-type demo model (8 of 50 steps, held-out samples). An anchor is
# one small latent.
ANCHORS = 6
RIDGE = 1e-9  # relative to the regressors' energy; differences of neighbouring outputs are nearly collinear


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated run.

    Attributes:
        compute: bool [T], the mask.
        weights: float64 [T, K] of equation (1).
        missed: float64 [T, 2T], the error of the output at each step. The coordinates are the full run's guided
            outputs, then the separate direction of each computed step.
        end: float64 [2T], the final state's error in the same coordinates.
        error: Its mean square.
    """

    compute: np.ndarray
    weights: np.ndarray
    missed: np.ndarray
    end: np.ndarray
    error: float


class Simulator:
    """Simulates runs of masks on one profile's dynamics. It is as exact as ``dynamics.response``.

    Args:
        dynamics: The measured dynamics.
        first_steps: Steps at which another denoiser begins. Earlier outputs cannot predict its outputs.
        anchors: The most computed steps that a prediction may use.
        doubt: The factor on the spread of the responses.
    """

    def __init__(
        self, dynamics: Dynamics, first_steps: Collection[int] = (), anchors: int = ANCHORS, doubt: float = 1.0
    ) -> None:
        self.dynamics, self.first_steps, self.anchors = dynamics, first_steps, anchors
        self.steps = len(dynamics.response)
        self.spread = doubt * dynamics.spread
        self._gram = dynamics.gram
        self._latest: Simulation | None = None

    def fitted(self, compute: np.ndarray) -> Simulation:
        """Simulate a mask (bool [T]) with weights fitted to the state step by step, like the fit on recorded runs.

        The first steps that the mask has in common with the mask of the previous call are not simulated again.
        """

        def weights(i: int, kept: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            return _fitted(self.dynamics.reach[i, i] * kept, wanted, self._weighed)

        self._latest = self._run(compute, self.anchors, weights, self._latest)
        return self._latest

    def played(self, plan: SitePlan) -> Simulation | None:
        """Simulate a plan with its weights.

        Returns:
            The run. None for a plan that leaves the space of outputs: with κ, inputs, biases, scales per channel or
            separate branches.
        """
        apart = len(plan.weights) > 1 or (plan.kappa is not None and plan.kappa[~plan.compute[None]].any())
        apart |= plan.inputs is not None and plan.inputs.any()
        channels = (plan.scale is not None and plan.scale.ndim > 2) or plan.bias is not None
        if apart or channels:
            return None
        scale = np.ones(self.steps) if plan.scale is None else plan.scale[0]
        most = plan.weights.shape[2]
        return self._run(plan.compute, most, lambda i, kept, wanted: scale[i] * plan.weights[0, i, : len(kept)])

    def error(self, compute: np.ndarray) -> float:
        """Return the mean squared error of the final state of the fitted run."""
        return self.fitted(compute).error

    def psnr_db(self, run: Simulation) -> np.ndarray:
        """Return the PSNR of every sample's final state in dB, float64 [N]."""
        shared, own = np.split(run.end, 2)
        mse = np.maximum(np.einsum("i,nij,j->n", shared, self.dynamics.grams, shared) + own @ own, 1e-300)
        return np.asarray(np.minimum(10 * np.log10(np.maximum(self.dynamics.peaks, 1e-150) ** 2 / mse), MOST_DB))

    def along(self, run: Simulation) -> np.ndarray:
        """Return the mean squared error of the state after each step, float64 [T]."""
        errors = self.dynamics.reach @ run.missed
        return np.asarray(np.maximum((self._weighed(errors) * errors).sum(1), 0.0))

    def _weighed(self, vectors: np.ndarray) -> np.ndarray:
        """Return the products of vectors with the basis. Separate directions are orthogonal to all others."""
        return np.concatenate([vectors[..., : self.steps] @ self._gram, vectors[..., self.steps :]], -1)

    def _run(
        self,
        compute: np.ndarray,
        most: int,
        weigh: Callable[[int, np.ndarray, np.ndarray], np.ndarray],
        like: Simulation | None = None,
    ) -> Simulation:
        """Simulate a mask.

        Args:
            compute: bool [T], the mask.
            most: The most anchors of a prediction.
            weigh: Returns the weights of a prediction [K], from the step, the anchors [K, 2T] and the wanted change of
                the state [2T].
            like: A run whose first steps are copied as long as the masks are equal.
        """
        dynamics, steps = self.dynamics, self.steps
        missed, weights = np.zeros((steps, 2 * steps)), np.zeros((steps, most))
        first = 0
        if like is not None:
            differing = np.flatnonzero(compute != like.compute)
            first = int(differing[0]) if len(differing) else steps
            missed[:first], weights[:first] = like.missed[:first], like.weights[:first]
        kept: list[np.ndarray] = []
        for i, computed in enumerate(compute):
            if computed:
                if i >= first and i > 0:
                    error = dynamics.reach[i - 1, :i] @ missed[:i]
                    missed[i] = dynamics.response[i] * error
                    if self.spread[i]:
                        energy = max(float(self._weighed(error) @ error), 0.0)
                        missed[i, steps + i] = np.sqrt(self.spread[i] * energy)
                output = missed[i].copy()
                output[i] += 1
                kept = [output, *([] if i in self.first_steps else kept)][:most]
            elif i >= first:
                stacked = np.stack(kept)
                wanted = -(dynamics.reach[i, :i] @ missed[:i])  # cancels the error of the next state
                wanted[i] += dynamics.reach[i, i]
                w = weigh(i, stacked, wanted)
                weights[i, : len(w)] = w
                missed[i] = w @ stacked
                missed[i, i] -= 1
        end = dynamics.reach[-1] @ missed
        square = max(float(self._weighed(end) @ end), 0.0)  # rounding can end below
        return Simulation(compute.copy(), weights, missed, end, square)


def _fitted(anchors: np.ndarray, target: np.ndarray, weighed_by: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the weights of the anchors (rows) whose sum is nearest to ``target``.

    Regressors and ridge are those of the fit on recorded runs.

    Args:
        anchors: [K, coordinates].
        target: [coordinates].
        weighed_by: Multiplies coordinates by the Gram matrix of the basis.
    """
    change, ridge = _regressors(len(anchors))
    basis = change @ anchors
    weighed = weighed_by(basis)
    normal = weighed @ basis.T
    scale = np.sqrt(np.maximum(normal.diagonal(), 1e-300))
    rest = weighed @ (target - anchors[0])  # the ridge favours plain reuse
    found = np.linalg.solve(normal / np.outer(scale, scale) + ridge, rest / scale) / scale
    found[0] += 1
    return np.asarray(found @ change)


@functools.cache
def _regressors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the regressors F_0, F_0 - F_1, F_1 - F_2, … as rows of weights of F_0, F_1, …, and the ridge."""
    change = np.eye(count) - np.eye(count, k=1)
    return np.vstack([np.eye(count)[:1], change[:-1]]), RIDGE * np.eye(count)
