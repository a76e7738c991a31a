"""Compute how a run of predicted steps changes the final state, from the Gram table of the full run's outputs.

A run is the computed step a and the predicted steps after it, up to the next computed step b. At a step t in between,
the noise scheduler gets an output that differs from the full run's output m_t by d_t. The final state then differs from
the full run's by Σ_t weight_t · d_t. All vectors lie in the T-dimensional space of the full run's outputs, so one table
holds all their products: ``gram`` float64 [T, T]. Costs are squared errors, [T, T + 1] at [a, b], inf for b ≤ a.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffcache.documents.profile import Dynamics, Profile


def step_influence(dynamics: Dynamics) -> np.ndarray:
    """Compute how much the final state changes per unit of error in the output of each step.

    Steps from b on are computed and respond to the error of the state (``dynamics.response``). Steps before b do not.

    Returns:
        float64 [T + 1, T], at [b, t]. It is 0 for t ≥ b.
    """
    steps = len(dynamics.response)
    found = np.zeros((steps + 1, steps))
    found[steps] = dynamics.reach[-1]
    for b in range(steps - 1, 0, -1):
        answer = found[b + 1, b] * dynamics.response[b]  # response of step b, per unit of error in the state before it
        found[b, :b] = found[b + 1, :b] + answer * dynamics.reach[b - 1, :b]
    return found


def step_weights(profile: Profile) -> np.ndarray:
    """Return how much the final state changes per unit of a step's output, without responses of the network.

    Returns:
        float64 [T]. Without dynamics, the differences between noise levels or times, which is exact for flow matching
        with Euler steps.
    """
    return profile.dynamics.reach[-1] if profile.dynamics is not None else np.diff(times(profile))


def times(profile: Profile) -> np.ndarray:
    """Return the noise levels before and after the steps, float64 [T + 1].

    If there are none, return the noise scheduler's times. The last interval is then as long as the one before.
    """
    if profile.sigmas is not None:
        return profile.sigmas
    last = profile.timesteps[-2:]
    return np.append(profile.timesteps, 2 * last[-1] - last[0] if len(last) > 1 else 0.0)


def constant(weight: np.ndarray) -> np.ndarray:
    """Return weights [T] in the form of ``step_influence``, float64 [T + 1, T], equal for all b."""
    return np.asarray(np.tril(np.broadcast_to(weight, (len(weight) + 1, len(weight))), -1))


def reused(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the costs of plain reuse, d_t = m_a − m_t. ``weights`` is float64 [T + 1, T], at [b, t]."""
    cost = np.full((len(gram), len(gram) + 1), np.inf)
    for b, squared, _ in _reused(gram, weights):
        cost[:b, b] = squared[:b]
    return cost


def forecast(gram: np.ndarray, weights: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the costs of the line through the two newest outputs, m_a + (τ_t − τ_a)(m_a − m_p)/(τ_a − τ_p).

    Args:
        gram: float64 [T, T].
        weights: float64 [T + 1, T], at [b, t].
        at: float64 [T], the times τ.

    Returns:
        Costs [T + 1] of the run from step 0, which reuses, and costs [T, T, T + 1] at [p, a, b]. If τ_p = τ_a there is
        no line, and m_a is reused.
    """
    steps = len(gram)
    energy = np.diag(gram)
    between = energy[:, None] + energy - 2 * gram  # squared norms of m_a − m_p
    gap = at[None, :] - at[:, None]  # at [p, a]
    slope = np.divide(1.0, gap, out=np.zeros_like(gap), where=gap != 0)
    first = np.full(steps + 1, np.inf)
    cost = np.full((steps, steps, steps + 1), np.inf)
    for b, squared, inner in _reused(gram, weights):
        first[b] = squared[0]
        lever = _after((weights[b] * at)[:, None])[:, 0] - at * _after(weights[b][:, None])[:, 0]  # at [a]
        along = (np.diag(inner)[:, None] - inner).T  # at [p, a]: ⟨error of reuse, m_a − m_p⟩
        factor = slope * lever
        full = squared + 2 * factor * along + factor**2 * between
        cost[:, :b, b] = full[:, :b]
    comes_before = np.arange(steps)[:, None] < np.arange(steps)
    return first, np.where(comes_before[:, :, None], np.maximum(cost, 0), np.inf)


def missed(gram: np.ndarray, weights: np.ndarray, handed: np.ndarray) -> np.ndarray:
    """Compute the costs of any prediction.

    Args:
        gram: float64 [T, T].
        weights: float64 [T + 1, T], at [b, t].
        handed: float64 [T, T, T], at [a, t]: the output of step t in a run of a, as coordinates in the full run's
            outputs. Entries with t ≤ a are not used.
    """
    steps = len(gram)
    cost = np.full((steps, steps + 1), np.inf)
    errors = handed - np.eye(steps)
    for b in range(1, steps + 1):
        within = np.triu(np.broadcast_to(weights[b], (steps, steps)), 1)[:b, :b]
        total = np.matmul(within[:, None], errors[:b, :b])[:, 0]
        cost[:b, b] = np.maximum(((total @ gram) * total).sum(1), 0)
    return cost


def _reused(gram: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for every b: the squared error [T] of the run of each a, and its products with m_x, [T, T] at [a, x]."""
    for b in range(1, len(gram) + 1):
        weight = weights[b]
        total = _after(weight[:, None])  # at [a, 0]: the sum over the steps after a
        inner = total * gram - _after(weight[:, None] * gram)
        squared = total[:, 0] * np.diag(inner) - np.triu(inner * weight, 1).sum(1)
        yield b, np.maximum(squared, 0), inner


def _after(values: np.ndarray) -> np.ndarray:
    """Return the sums along the first axis over all later entries."""
    sums = np.cumsum(values[::-1], axis=0)[::-1]
    return np.concatenate([sums[1:], np.zeros((1, *values.shape[1:]))])
