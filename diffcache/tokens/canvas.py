"""The state of one canvas: the tokens that a loop decodes, and the kept keys, values and logits of their positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.tokens.attention import Drift
from diffcache.tokens.counts import Counts
from diffcache.tokens.head import Projection
from diffcache.tokens.layers import Depths
from diffcache.tokens.shares import Shares
from diffcache.tokens.store import PlacedCache
from diffcache.tokens.view import View


@dataclass(slots=True)
class Canvas:
    """The state of the canvas that one thread decodes.

    Attributes:
        cache: The kept keys and values.
        ids: int64 [B, N], the tokens of the last forward. None before the first one.
        prompt: bool [B, N], the positions that were not masked when they first appeared.
        logits: [B, N, V], the newest logits of every position.
        inputs: Copies of the other arguments of the last forward.
        output: The output object of the last forward.
        counts: The work since the canvas began.
        peak_bytes: The most bytes of kept tensors at one time.
        depths: The kept inputs of layers, for rules that need them.
        drift: The kept queries, for rules that need them.
        memory: What the rule keeps from forward to forward.
        shares: What the layers added to their inputs, for rules that need it.
        projection: The logits that the last forward computed, if these are not those of all of its positions.
    """

    cache: PlacedCache = field(default_factory=PlacedCache)
    ids: np.ndarray | None = None
    prompt: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    logits: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    counts: Counts = field(default_factory=Counts)
    peak_bytes: int = 0
    depths: Depths | None = None
    drift: Drift | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    shares: Shares | None = None
    projection: Projection | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the other arguments of the last forward, without the settings that ``inputs`` holds as well."""
        return {name: value for name, value in self.inputs.items() if name.isidentifier()}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all kept tensors."""
        logits = 0 if self.logits is None else self.logits.numel() * self.logits.element_size()
        kept = [*self.depths.hidden.values()] if self.depths is not None else []
        kept += self.drift.queries.values() if self.drift is not None else []
        shares = 0 if self.shares is None else self.shares.nbytes
        return self.cache.nbytes + logits + shares + sum(t.numel() * t.element_size() for t in kept)

    def drop(self) -> None:
        """Drop every kept tensor. The counts stay."""
        self.cache.clear()
        self.ids = self.logits = self.output = None
        self.inputs, self.memory = {}, {}
        if self.depths is not None:
            self.depths = Depths()
        if self.drift is not None:
            self.drift = Drift()
        if self.shares is not None:
            self.shares = Shares()

    def view(self, now: np.ndarray, mask: int, *, repeat: bool = False) -> View | None:
        """Return the state before a forward, or None if a canvas begins with it.

        A canvas begins if the input is not a later state of the last one: the prompt is another, the input is shorter,
        nothing is decoded, or more than half of the decoded tokens are masked again. A longer input continues the
        canvas, as in block diffusion. A token that is decoded differently, or masked again, is a change.

        Args:
            now: int64 [B, N], the tokens of the forward.
            mask: The id of the mask token.
            repeat: Whether the tokens of the last forward continue the canvas even if nothing is decoded.
        """
        last, masked = self.ids, now == mask
        if last is None or len(now) != len(last) or now.shape[1] < last.shape[1]:
            return None
        kept = last.shape[1]
        same, begun = now[:, :kept] == last, masked[:, :kept] == ~self.prompt
        decoded = (last != mask) & ~self.prompt
        again = masked[:, :kept] & decoded
        first = begun.all() and not (repeat and now.shape == last.shape and same.all())
        if (~same & self.prompt).any() or first or 2 * again.sum() > decoded.sum():
            return None
        changed = np.ones_like(masked)
        changed[:, :kept] = ~same
        prompt = ~masked
        prompt[:, :kept] = self.prompt
        tracked = None
        if self.drift is not None:
            tracked = np.pad(self.drift.positions(), ((0, 0), (0, now.shape[1] - kept)))
        return View(
            step=self.counts.forwards - self.counts.repeated,
            masked=masked,
            changed=changed,
            prompt=prompt,
            tracked=tracked,
            memory=self.memory,
        )

    def repeats(self, view: View, inputs: dict[str, Any]) -> bool:
        """Return whether a forward would repeat the last one: neither a token nor another argument has changed.

        The networks take no time, so the logits would be the same.
        """
        return not view.changed.any() and self.output is not None and equal_inputs(inputs, self.inputs)


def equal_inputs(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether two calls have the same arguments, by value for tensors.

    Of arguments for each position, [B, N], those of the positions that both calls have count.
    """
    return now.keys() == before.keys() and all(_same(now[name], before[name]) for name in now)


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        if now.ndim == before.ndim == 2:
            now = now[:, : before.shape[1]]
        return now.shape == before.shape and now.dtype == before.dtype and bool(torch.equal(now, before))
    return not isinstance(now, Tensor) and not isinstance(before, Tensor) and bool(now == before)
