"""Fit the tables of a token profile to recorded decodes: drift by offset, and where the next commits are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diffcache.documents.token_profile import DriftTables

ROUNDS = 4  # of the attribution; a fit is stable after two
PRIOR = 8  # samples that the mean of the offsets nearby counts as
NEARBY = 8  # offsets on either side

Forward = tuple[np.ndarray, np.ndarray, np.ndarray]  # masked and committed, bool [B, N]; drift, float64 [B, N]


def fit_drift(masked: Sequence[Sequence[np.ndarray]], drift: Sequence[Sequence[np.ndarray]]) -> DriftTables:
    """Return the tables that explain the drift of every forward by the tokens committed before it.

    If several tokens were committed, the drift of a position is divided among them in proportion to the tables, which
    are then fitted again (expectation maximisation). Offsets with few samples are drawn to the mean of those nearby.

    Args:
        masked: For each decode, one bool [B, N] for each forward.
        drift: For each decode, one float64 [B, N] for each forward.
    """
    size = masked[0][0].shape[1]
    forwards = list(_forwards(masked, drift))
    tables = [np.ones(2 * size - 1), np.ones(2 * size - 1)]  # of tokens, and of masks
    for _ in range(ROUNDS):
        tables = _attributed(forwards, tables, size)
    return DriftTables(decoded=tables[0], masked=tables[1], next=_next(masked, size))


def _forwards(masked: Sequence[Sequence[np.ndarray]], drift: Sequence[Sequence[np.ndarray]]) -> Iterator[Forward]:
    """Yield the forwards that follow commits."""
    for decode, moved in zip(masked, drift, strict=True):
        for before, now, change in zip(decode[:-1], decode[1:], moved[1:], strict=True):
            if (before & ~now).any():
                yield now, before & ~now, change


def _attributed(forwards: Sequence[Forward], tables: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Return the tables after one round."""
    sums, counts = np.zeros((2, 2 * size - 1)), np.zeros((2, 2 * size - 1))
    for masked, committed, change in forwards:
        for row in np.flatnonzero(committed.any(1)):
            kind = masked[row].astype(int)
            offsets = np.arange(size)[None] - np.flatnonzero(committed[row])[:, None] + size - 1  # [commits, N]
            share = np.where(kind, tables[1][offsets], tables[0][offsets])
            share = share / np.maximum(share.sum(0), 1e-12)
            others = ~committed[row]
            for which in (0, 1):
                at = others & (kind == which)
                np.add.at(sums[which], offsets[:, at], share[:, at] * change[row, at])
                np.add.at(counts[which], offsets[:, at], 1)
    return [_shrunk(total, count) for total, count in zip(sums, counts, strict=True)]


def _shrunk(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the mean at each offset, with the mean of the offsets nearby as ``PRIOR`` further samples."""
    inner, window = slice(NEARBY, -NEARBY), np.ones(2 * NEARBY + 1)
    near = np.convolve(total, window)[inner] / np.maximum(np.convolve(count, window)[inner], 1)
    mean: np.ndarray = (total + PRIOR * near) / (count + PRIOR)
    return mean.clip(0)


def _next(masked: Sequence[Sequence[np.ndarray]], size: int) -> np.ndarray:
    """Return the probability that a mask is committed next, float64 [N], by its distance from the first mask."""
    chosen, count = np.zeros(size), np.zeros(size)
    for decode in masked:
        for before, now in zip(decode, [*decode[1:], np.zeros_like(decode[-1])], strict=True):
            rows, places = np.nonzero(before)
            distance = places - before.argmax(1)[rows]
            np.add.at(count, distance, 1)
            np.add.at(chosen, distance, (~now)[rows, places])
    return _shrunk(chosen, count)
