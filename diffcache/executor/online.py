"""Decisions left to the run: a number that is cheap to have at every step says whether the step may be predicted.

There is one decision per forward of a denoiser, for all sites of its plan. Forwards with the same place within a step
are one branch and share a signal; branches stacked in one batch share every decision, and so do samples: what is
decided for one depends on its batch mates. A single sample per call repeats itself anywhere.

Each decision reads one number back from the device. Schedules without an online rule read none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffcache.executor.guess import OTHER_INPUT
from diffcache.schedule import Online
from diffcache.store import Anchor, Output, Store, signature

ADDING_UP = ("modulated_input", "output_rate")  # compared from call to call; the others with the newest computed step
AT_THE_ROOT = ("drift", "output_rate")  # see the denoiser's input; the others see inside its first block


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one forward. ``reason``: why nothing could be compared, where that is not as it should be."""

    predict: bool
    reason: str = ""


class Watch:
    """What the calls of one branch have shown since its run began. Tensors lie in the store, and are counted there."""

    def __init__(self, online: Online, store: Store, denoiser: str, branch: int) -> None:
        self.online = online
        self._store = store
        self._seen = (denoiser, "online: seen", branch)
        self._answer = (denoiser, "online: answer", branch)
        self._rate: Tensor | None = None  # relative change of the output per mean absolute change of the input
        self._level = 0.0
        self._predicted = 0  # in a row

    @property
    def at_the_root(self) -> bool:
        return self.online.rule in AT_THE_ROOT

    @torch.no_grad()
    def decide(self, step: int, asked: bool, now: Sequence[Tensor]) -> Verdict | None:
        """The verdict on a step from its signal ``now``; None where nothing is asked, or where the plan may go its way.

        asked  whether the plan predicts anything at this step
        """
        guards = self.online.rule == "drift"  # against planned anchors: what is computed beside them is no reference
        then = self._store.get(self._seen, 0)
        verdict = self._compare(step, then, now) if asked else None
        if verdict is None and asked and not guards:
            verdict = Verdict(False)
        computes = verdict is None or not verdict.predict
        self._predicted = 0 if computes else self._predicted + 1
        if computes:
            self._level = 0.0
        if self.online.rule in ADDING_UP or (not asked if guards else computes):
            self._put(self._seen, now)
        return verdict

    @torch.no_grad()
    def answered(self, x: Sequence[Tensor], output: Sequence[Tensor]) -> None:
        """The denoiser has computed ``output`` from ``x``: how fast does it follow?"""
        if self.online.rule != "output_rate":
            return
        now = (*x, *(t for t in output if t.is_floating_point()))
        before = self._store.get(self._answer, 0)
        self._rate = None
        if before is not None and before.signature == signature(now):
            then = before.output.tensors
            n = len(x)
            self._rate = distance(now[n:], then[n:]) / distance(now[:n], then[:n]) / size(now[n:])
        self._put(self._answer, now)

    def _compare(self, step: int, then: Anchor | None, now: Sequence[Tensor]) -> Verdict | None:
        """The verdict by ``then``, what was seen before; None where there is nothing to compare with."""
        if then is None or (self.online.rule == "output_rate" and self._rate is None):
            return None
        if then.signature != signature(now):
            return None if self.online.rule == "drift" else Verdict(False, OTHER_INPUT)
        moved = distance(now, then.output.tensors)
        change = float(moved / size(then.output.tensors) if self._rate is None else moved * self._rate)  # waits here
        if not math.isfinite(change):
            return Verdict(False)
        counted = change if self.online.polynomial is None else float(np.polyval(self.online.polynomial, change))
        self._level = self._level + counted if self.online.rule in ADDING_UP else counted
        most = math.inf if self.online.most is None else self.online.most
        return Verdict(self._level < self.online.limit[step] and self._predicted < most)

    def _put(self, key: tuple[str, str, int], tensors: Sequence[Tensor]) -> None:
        self._store.put(key, 0, Anchor(Output.of(tuple(tensors)).kept(), (), signature(tensors)))


def distance(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference over all elements, in float32 at least."""
    pairs = [(_exact(a), _exact(b)) for a, b in zip(now, then, strict=True)]
    return _mean([(a - b).abs().sum() for a, b in pairs], now)


def size(tensors: Sequence[Tensor]) -> Tensor:
    """Mean absolute value over all elements, in float32 at least."""
    return _mean([_exact(t).abs().sum() for t in tensors], tensors)


def _mean(sums: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(sums)).sum() / sum(t.numel() for t in of)


def _exact(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
