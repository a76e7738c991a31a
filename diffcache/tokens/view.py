"""The facts that a token rule decides on, and its decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class View:
    """The state of one canvas before a forward.

    Attributes:
        step: The number of forwards that ran since the canvas began. At 0 every position is computed.
        masked: bool [B, N], the positions that hold the mask token.
        changed: bool [B, N], the positions at which the token is not that of the last forward.
        prompt: bool [B, N], the positions that were not masked at step 0.
        tracked: bool [B, N], the positions that a layer tracks, if the rule needs drift. None before the first forward.
        memory: What a rule keeps from forward to forward of one canvas. It is empty when a canvas begins.
        announced: bool [B, N], the positions that the loop decodes after this forward, if it states them.
    """

    step: int
    masked: np.ndarray
    changed: np.ndarray
    prompt: np.ndarray
    tracked: np.ndarray | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    announced: np.ndarray | None = None

    @classmethod
    def of(cls, masked: np.ndarray) -> View:
        """Return the state of a canvas that begins, with these positions masked."""
        return cls(step=0, masked=masked, changed=np.zeros_like(masked), prompt=~masked)

    @cached_property
    def positions(self) -> np.ndarray:
        """Return int64 [1, N], the index of each position."""
        return np.arange(self.masked.shape[1])[None]

    def block(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the block in progress begins and ends in each row.

        Blocks are counted from the first position that is not part of the prompt. The block in progress is the first
        that holds a mask, or the last one if none does.

        Args:
            length: The number of positions in a block.

        Returns:
            Two int64 arrays [B, 1], the first position of the block and the first one after it.
        """
        size = self.masked.shape[1]
        origin = _first(~self.prompt, size)
        current = np.where(self.masked.any(1), _first(self.masked, size), size - 1)
        start = origin + (current - origin).clip(0) // length * length
        return start[:, None], np.minimum(start + length, size)[:, None]


@dataclass(frozen=True, slots=True)
class Fresh:
    """The positions to compute in one forward.

    Attributes:
        positions: bool [B, N].
        start: int64 [B], the first layer that computes every position, for rules that need depth. None for no layer.
        window: bool [B, N], the masks that the step may decode, for rules that need drift.
        gamma: The cosine of attention rows below which all positions are computed from the next layer on. 0 for never.
        among: bool [B, N], the positions of which each layer computes a share, for rules that need values. The others
            of ``positions`` are computed in every layer. None: every layer computes all of ``positions``.
        share: The share of ``among`` that each layer computes, in each row.
        whole: The number of layers, from the first one, that compute all of ``positions`` in spite of ``among``.
    """

    positions: np.ndarray
    start: np.ndarray | None = None
    window: np.ndarray | None = None
    gamma: float = 0.0
    among: np.ndarray | None = None
    share: float = 1.0
    whole: int = 0


def _first(where: np.ndarray, none: int) -> np.ndarray:
    """Return the index of the first True of each row, or ``none``."""
    return np.where(where.any(1), where.argmax(1), none)
