"""The fit of drift tables to recorded decodes."""

from __future__ import annotations

import numpy as np
import pytest

from diffcache.profiling.fitting import fit_drift


def planted(commits: int) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], np.ndarray]:
    """Return decodes, and a table: their drift is its sum at the offsets of the commits."""
    rng = np.random.default_rng(1)
    size = 12
    table = np.exp(-np.abs(np.arange(-size + 1, size)) / 3)
    masked, drift = [], []
    for _ in range(150):
        hidden = np.ones((1, size), bool)
        order = rng.permutation(size)
        states, moves = [hidden.copy()], [np.zeros((1, size))]
        for step in range(0, size, commits):
            gone = order[step : step + commits]
            hidden[0, gone] = False
            move = sum(table[size - 1 - i : 2 * size - 1 - i] for i in gone)
            states.append(hidden.copy())
            moves.append(move[None] * ~np.isin(np.arange(size), gone))
        masked.append(states)
        drift.append(moves)
    return masked, drift, table


@pytest.mark.parametrize("commits", [1, 2])
def test_the_fit_finds_a_planted_table(commits: int) -> None:
    masked, drift, table = planted(commits)
    found = fit_drift(masked, drift)
    near = slice(6, 17)  # offsets of up to 5, which have many samples
    assert np.abs(found.masked[near] - table[near])[np.arange(11) != 5].max() < 0.12
    assert np.abs(found.decoded[near] - table[near])[np.arange(11) != 5].max() < 0.12
