"""Predict the tokens that differ from the full loop's, from the age of what a forward does not compute. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffcache.documents.token_profile import TokenProfile
from diffcache.planning.token_refreshes import error_at
from diffcache.simulation import drifted, stalest

SIMULATED = 4  # recorded sequences on which the flips of a plan are predicted


class Staleness:
    """The age of kept rows in recorded decodes, and the flips that follow from it.

    The error of the probabilities at a commit is the drift of the position since it was computed, and that of the keys
    and values of the others by age, less what fresh positions renew. A token flips with a probability in proportion to
    its error over its margin; the trials of the profile give the factor.

    Args:
        profile: The measurements.
        committed: float64 [B, N], as in the profile.
        margins: float64 [B, N], as in the profile.

    Attributes:
        drift: float64 [B, N], the drift of each position since it was computed.
    """

    def __init__(self, profile: TokenProfile, committed: np.ndarray, margins: np.ndarray) -> None:
        self.drift = np.zeros(committed.shape)
        self._profile, self._committed, self._margins = profile, committed, margins
        self._masks = np.maximum((committed > 0).sum(1), 1)
        self._untouched = np.zeros(committed.shape)
        self._ages = np.zeros((len(committed), profile.layers))

    def grow(self, just: np.ndarray, masked: np.ndarray) -> None:
        """Age everything by the commits since the last forward.

        Args:
            just: bool [B, N], the positions that were committed.
            masked: bool [B, N], the masks that are left.
        """
        self.drift = drifted(self.drift, just, masked, self._profile.drift)
        self._untouched = drifted(self._untouched, just, masked, self._profile.drift)
        self._ages += (just.sum(1) / self._masks)[:, None]

    def flips(self, forward: int, masked: np.ndarray, chosen: np.ndarray, start: np.ndarray) -> float:
        """Run a forward, and return the predicted number of tokens that differ among those committed after it.

        Args:
            forward: The number of the forward, from 1 on.
            masked: bool [B, N], the masks that it finds.
            chosen: bool [B, N], the positions that it computes.
            start: int64 [B], the first layer that computes every position.
        """
        profile = self._profile
        depth = np.where(chosen.all(1), 0, start)
        for row in np.flatnonzero(depth < profile.layers):
            self._ages[row, depth[row] :] = 0
            self.drift[row], self._untouched[row] = 0, 0
        self.drift[chosen] = 0
        kept = ~masked
        left = (self.drift * kept).sum(1) / np.maximum((self._untouched * kept).sum(1), 1e-12)
        error = self.drift + (error_at(profile, self._ages) * left.clip(0, 1))[:, None]
        at = self._committed == forward
        chances = profile.flip_rate * error[at] / np.maximum(self._margins[at], 1e-6)
        return float(np.minimum(chances, 1).sum())


def predicted_flips(profile: TokenProfile, fresh: int, weight: float, starts: Sequence[int]) -> float:
    """Return the predicted share of tokens that differ with a plan, on recorded sequences.

    Args:
        profile: The measurements.
        fresh: The number of fresh positions of a forward.
        weight: The weight of tokens against masks.
        starts: The refreshes, as in ``TokenPlan``.
    """
    which = np.linspace(0, len(profile.committed) - 1, min(SIMULATED, len(profile.committed))).astype(int)
    committed = profile.committed[which]
    staleness = Staleness(profile, committed, profile.margins[which])
    masks = (committed > 0).sum(1)
    part = np.zeros(len(committed), int)
    flips = 0.0
    for forward in range(1, int(committed.max()) + 1):
        masked = committed >= forward
        just = (committed == forward - 1) & (committed > 0)
        staleness.grow(just, masked)
        now = np.minimum((masks - masked.sum(1)) * len(starts) // masks, len(starts) - 1)
        start = np.full(len(committed), profile.layers)
        for row in np.flatnonzero(now > part):
            start[row] = min(starts[part[row] + 1 : now[row] + 1])
        part = np.maximum(part, now)
        chosen = just | stalest(staleness.drift, masked, profile.drift, fresh, weight)
        chosen[start == 0] = True
        if forward == 1:
            chosen[:] = True
        flips += staleness.flips(forward, masked, chosen, start)
    return flips / float(masks.sum())
