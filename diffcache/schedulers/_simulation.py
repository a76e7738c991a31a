"""The closed loop, simulated on a profile: no network is called.

The fit of this library pulls every accelerated state back to the full run's. Where that works, the outputs at computed
steps are nearly the full run's outputs, so the state's error is a combination of those outputs, and everything the
closed loop does (its least-squares fits included) happens in the T-dimensional space they span. A simulated run of a
mask costs a few milliseconds; a local search over masks, seconds.

First-order feedback is in: at a computed step the output moves by ``response · error of the state``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from diffcache.profile import Dynamics
from diffcache.schedule import SitePlan

# Of 3, 5 and 8: on the Flux-type demo model, 8 of 50 steps, held out, 52, 57 and 58 dB. An anchor is one small latent.
ANCHORS = 6
RIDGE = 1e-9  # relative to the regressors' energy; differences of neighbouring outputs are nearly collinear
EXACT_DB = 200.0  # of a run that ends where the full run does


@dataclass(frozen=True, slots=True)
class Simulation:
    """weights float64 [T, K] of equation (1); ``error``: mean square of the final state's error; ``end``: that error,
    as coordinates [T] in the basis of the full run's guided outputs."""

    weights: np.ndarray
    error: float
    end: np.ndarray


class Simulator:
    """Runs of masks on one profile's dynamics. Exact where ``dynamics.response`` is.

    begins   steps where another denoiser takes over, whose outputs the ones before cannot predict
    anchors  most computed steps that a prediction may use
    """

    def __init__(self, dynamics: Dynamics, begins: Collection[int] = (), anchors: int = ANCHORS) -> None:
        self.dynamics, self.begins, self.anchors = dynamics, begins, anchors
        self.gram = dynamics.gram
        self.steps = len(self.gram)

    def fitted(self, compute: np.ndarray) -> Simulation:
        """Weights fitted to the state step by step, as the fit on recorded runs does; ``compute`` bool [T]."""

        def weights(i: int, kept: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            return _fitted(self.dynamics.reach[i, i] * kept, wanted, self.gram)

        return self._run(compute, self.anchors, weights)

    def played(self, plan: SitePlan) -> Simulation | None:
        """The run of a plan with weights of its own; None for what happens outside that space (drift of the input,
        biases, branches apart)."""
        apart = len(plan.weights) > 1 or (plan.kappa is not None and plan.kappa[~plan.compute[None]].any())
        channels = (plan.scale is not None and plan.scale.ndim > 2) or plan.bias is not None
        if apart or channels:
            return None
        scale = np.ones(self.steps) if plan.scale is None else plan.scale[0]
        most = plan.weights.shape[2]
        return self._run(plan.compute, most, lambda i, kept, wanted: scale[i] * plan.weights[0, i, : len(kept)])

    def error(self, compute: np.ndarray) -> float:
        """Mean squared error of the final state, of the fitted run."""
        return self.fitted(compute).error

    def psnr_db(self, run: Simulation) -> np.ndarray:
        """float64 [N]: PSNR of every sample's final state."""
        mse = np.maximum(np.einsum("i,nij,j->n", run.end, self.dynamics.grams, run.end), 1e-300)
        return np.asarray(np.minimum(10 * np.log10(np.maximum(self.dynamics.peaks, 1e-150) ** 2 / mse), EXACT_DB))

    def _run(
        self, compute: np.ndarray, most: int, weigh: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
    ) -> Simulation:
        # Vectors are rows of coordinates in the basis m_0 … m_{T-1}, the full run's guided outputs.
        dynamics, steps = self.dynamics, self.steps
        missed = np.zeros((steps, steps))  # by what the output handed to step j missed m_j
        weights = np.zeros((steps, most))
        kept: list[np.ndarray] = []
        for i, computed in enumerate(compute):
            if computed:
                error = dynamics.reach[i - 1, :i] @ missed[:i] if i else np.zeros(steps)
                missed[i] = dynamics.response[i] * error
                output = missed[i].copy()
                output[i] += 1
                kept = [output, *([] if i in self.begins else kept)][:most]
            else:
                stacked = np.stack(kept)
                wanted = -(dynamics.reach[i, :i] @ missed[:i])  # brings the next state home when handed over beyond m_i
                wanted[i] += dynamics.reach[i, i]
                w = weigh(i, stacked, wanted)
                weights[i, : len(w)] = w
                missed[i] = w @ stacked
                missed[i, i] -= 1
        end = dynamics.reach[-1] @ missed
        return Simulation(weights, max(float(end @ self.gram @ end), 0.0), end)  # rounding can end below


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
