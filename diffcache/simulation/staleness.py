"""Predict how far the rows that a token cache keeps have drifted, from the tokens that were committed in the meantime.

A committed token changes the logits of other masked positions, and the keys and values of the other tokens. The mean
change depends mostly on the offset between the two positions. A table of it, summed over the commits since a position
was computed, predicts the drift of the position without a look at the network.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.token_profile import DriftTables


def drifted(drift: np.ndarray, committed: np.ndarray, masked: np.ndarray, tables: DriftTables) -> np.ndarray:
    """Return the drift after more commits, float64 [B, N].

    Args:
        drift: float64 [B, N].
        committed: bool [B, N], the positions that were committed.
        masked: bool [B, N], the positions that are masked afterwards.
        tables: The tables of the drift.
    """
    size, last = drift.shape[1], tables.positions - 1
    offsets = np.arange(-size + 1, size).clip(-last, last) + last
    decoded, hidden = tables.decoded[offsets], tables.masked[offsets]  # index size - 1 + offset
    drift = drift.copy()
    for row, place in zip(*np.nonzero(committed), strict=True):
        near = slice(size - 1 - place, 2 * size - 1 - place)
        drift[row] += np.where(masked[row], hidden[near], decoded[near])
    return drift


def chances(masked: np.ndarray, tables: DriftTables) -> np.ndarray:
    """Return float64 [B, N], the probability that a position is committed next. 0 where there is no mask.

    Args:
        masked: bool [B, N].
        tables: The tables of the drift.
    """
    begin = masked.argmax(1)[:, None]
    distance = (np.arange(masked.shape[1])[None] - begin).clip(0, tables.positions - 1)
    return np.where(masked, tables.next[distance], 0.0)


def stalest(drift: np.ndarray, masked: np.ndarray, tables: DriftTables, count: int, weight: float) -> np.ndarray:
    """Return bool [B, N], the ``count`` positions of each row that are most worth computing.

    The worth of a masked position is its drift times the probability that it is committed next; that of another
    position is its drift times ``weight``. Positions without worth are left out.

    Args:
        drift: float64 [B, N], the drift since each position was computed.
        masked: bool [B, N].
        tables: The tables of the drift.
        count: The number of positions in each row.
        weight: The weight of positions that are not masked.
    """
    worth = np.where(masked, drift * chances(masked, tables), weight * drift)
    if count >= worth.shape[1]:
        return worth > 0
    chosen = np.zeros(worth.shape, bool)
    if count:
        best = np.argpartition(-worth, count - 1, axis=1)[:, :count]
        np.put_along_axis(chosen, best, True, axis=1)
    result: np.ndarray = chosen & (worth > 0)
    return result
