"""Apply a token rule to recorded decodes, without the network: what it computes, its time, and predicted flips.

A rule decides by the masks and by the tokens that have changed. The recorded order of commits gives both, for a loop
that commits the same positions as in the full run. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diffcache.documents.token_profile import TokenProfile
from diffcache.planning.token_flips import Staleness
from diffcache.tokens import TokenRule, View


@dataclass(slots=True)
class Walk:
    """The work of a rule on all recorded decodes.

    Attributes:
        computed: The positions that each forward computes in each row, as a mean over the layers, in order. Of several
            batches, one after the other.
        seconds: The predicted seconds of the decodes, with what the loop does between forwards.
        full_seconds: The same for forwards that compute every position.
        flips: The predicted number of tokens that differ from those of the full loop at their commit.
    """

    computed: list[float] = field(default_factory=list)
    seconds: float = 0.0
    full_seconds: float = 0.0
    flips: float = 0.0


def walk(profile: TokenProfile, rule: TokenRule) -> Walk:
    """Return the work of ``rule`` on the sequences of a profile, in batches of ``profile.rows``.

    Args:
        profile: The measurements.
        rule: A rule that needs neither attention nor values.
    """
    found = Walk()
    for first in range(0, len(profile.committed), profile.rows):
        part = slice(first, first + profile.rows)
        _walk_batch(found, profile, rule, profile.committed[part], profile.margins[part])
    return found


def _walk_batch(
    found: Walk, profile: TokenProfile, rule: TokenRule, committed: np.ndarray, margins: np.ndarray
) -> None:
    """Add the work of one batch.

    Args:
        found: The work so far.
        profile: The measurements.
        rule: See ``walk``.
        committed: float64 [B, N], as in the profile.
        margins: float64 [B, N], as in the profile.
    """
    size, layers = committed.shape[1], profile.layers
    prompt = committed == 0
    staleness = Staleness(profile, committed, margins)
    memory: dict[str, object] = {}
    ran = 0
    for forward in range(1, int(committed.max()) + 1):
        masked, just = committed >= forward, (committed == forward - 1) & ~prompt
        staleness.grow(just, masked)
        found.full_seconds += float(profile.seconds[-1]) + profile.outside
        found.seconds += profile.outside
        if rule.repeat and ran and not just.any():  # the network does not run
            found.computed.append(0.0)
            found.flips += staleness.flips(forward, masked, np.zeros_like(masked), np.full(len(masked), layers))
            continue
        chosen, start = np.ones_like(masked), np.full(len(masked), layers)
        if ran:  # the first forward computes every position
            view = View(step=ran, masked=masked, changed=just, prompt=prompt, memory=memory)
            fresh = rule.fresh(view)
            chosen = np.broadcast_to(fresh.positions, masked.shape).copy()
            start = start if fresh.start is None else fresh.start
        if rule.shift:  # the logits at j - 1 decode position j
            chosen[:, :-1] |= chosen[:, 1:] & masked[:, 1:]
        ran += 1
        count = max(int(chosen.sum(1).max()), 1)  # shorter rows are padded
        wide = 1 - min(int(start.min()), layers) / layers  # the share of layers that compute every position
        found.computed.append(count + wide * (size - count))
        one, full = profile.seconds_for(count), float(profile.seconds[-1])
        found.seconds += one + wide * max(full - one, 0.0)
        found.flips += staleness.flips(forward, masked, chosen, start)
