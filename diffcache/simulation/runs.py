"""What a run of predicted steps does to the final state: the loop's own arithmetic, on the full run's Gram table.

A run is the computed step a and the predicted ones after it, up to the next computed step b. At the step t in between
the loop is handed something that misses the full run's output m_t by d_t, and the final state misses the full run's by
Σ_t weight_t · d_t. All of it happens in the T-dimensional space of the full run's outputs, so products of any two
vectors come from one table, ``gram`` float64 [T, T]. Costs are [T, T + 1] at [a, b], squared errors, inf for b ≤ a.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffcache.documents.profile import Dynamics, Profile


def step_influence(dynamics: Dynamics) -> np.ndarray:
    """float64 [T + 1, T], at [b, t]: how far the final state moves per unit by which what step t is handed misses.

    The steps from b on are computed and answer the state's error (``dynamics.response``), those before b do not; 0 for
    t ≥ b.
    """
    steps = len(dynamics.response)
    found = np.zeros((steps + 1, steps))
    found[steps] = dynamics.reach[-1]
    for b in range(steps - 1, 0, -1):
        answer = found[b + 1, b] * dynamics.response[b]  # of step b, per unit of the error of the state before it
        found[b, :b] = found[b + 1, :b] + answer * dynamics.reach[b - 1, :b]
    return found


def step_weights(profile: Profile) -> np.ndarray:
    """float64 [T]: how far the final state moves per unit of what is handed to a step, the network left out.

    Without dynamics the differences between noise levels, or between times: right for flow matching with Euler steps.
    """
    return profile.dynamics.reach[-1] if profile.dynamics is not None else np.diff(times(profile))


def times(profile: Profile) -> np.ndarray:
    """float64 [T + 1]: the noise levels between which the steps go.

    The noise scheduler's times where there are none; the last interval is then as long as the one before.
    """
    if profile.sigmas is not None:
        return profile.sigmas
    last = profile.timesteps[-2:]
    return np.append(profile.timesteps, 2 * last[-1] - last[0] if len(last) > 1 else 0.0)


def constant(weight: np.ndarray) -> np.ndarray:
    """float64 [T + 1, T] like ``step_influence``: the same weights [T] whatever comes later."""
    return np.asarray(np.tril(np.broadcast_to(weight, (len(weight) + 1, len(weight))), -1))


def reused(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Costs of plain reuse, d_t = m_a − m_t. ``weights`` float64 [T + 1, T], at [b, t]."""
    cost = np.full((len(gram), len(gram) + 1), np.inf)
    for b, squared, _ in _reused(gram, weights):
        cost[:b, b] = squared[:b]
    return cost


def forecast(gram: np.ndarray, weights: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs of the line through the two newest outputs, d_t = m_a + (τ_t − τ_a)(m_a − m_p)/(τ_a − τ_p) − m_t.

    ``at`` float64 [T], τ. Returns costs [T + 1] of the run that begins at step 0, which reuses, and [T, T, T + 1] at
    [p, a, b]. Where τ_p = τ_a there is no line, and m_a is reused.
    """
    steps = len(gram)
    energy = np.diag(gram)
    between = energy[:, None] + energy - 2 * gram  # of m_a − m_p
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
    """Costs of any prediction. ``handed`` float64 [T, T, T], at [a, t]: what step t is handed in a run of a, as
    coordinates in the outputs; for t ≤ a anything."""
    steps = len(gram)
    cost = np.full((steps, steps + 1), np.inf)
    errors = handed - np.eye(steps)
    for b in range(1, steps + 1):
        within = np.triu(np.broadcast_to(weights[b], (steps, steps)), 1)[:b, :b]
        total = np.matmul(within[:, None], errors[:b, :b])[:, 0]
        cost[:b, b] = np.maximum(((total @ gram) * total).sum(1), 0)
    return cost


def _reused(gram: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For every b: squared error [T] of the run of each a, its product with every m_x [T, T], at [a, x]."""
    for b in range(1, len(gram) + 1):
        weight = weights[b]
        total = _after(weight[:, None])  # at [a, 0]: of the steps after a
        inner = total * gram - _after(weight[:, None] * gram)
        squared = total[:, 0] * np.diag(inner) - np.triu(inner * weight, 1).sum(1)
        yield b, np.maximum(squared, 0), inner


def _after(values: np.ndarray) -> np.ndarray:
    """Sums along the first axis over all that comes later."""
    sums = np.cumsum(values[::-1], axis=0)[::-1]
    return np.concatenate([sums[1:], np.zeros((1, *values.shape[1:]))])
