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

from diffcache.executor.notices import OTHER_INPUT, Reason
from diffcache.kernels import Format, Packed, format_of, pack_again, unpack
from diffcache.schedule import DenoiserPlan, Online
from diffcache.store import AS_IT_IS, Anchor, Keeping, Kept, Output, Store, signature

ADDING_UP = ("modulated_input", "output_rate")  # compared from call to call; the others with the newest computed step
AT_THE_ROOT = ("drift", "output_rate")  # see the denoiser's input; the others see inside its first block


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one forward. ``reason``: why nothing could be compared, where that is not as it should be."""

    predict: bool
    reason: Reason | None = None


class Watch:
    """What the calls of one branch have shown since its run began. Tensors lie in the store, and are counted there.

    keeping  how the signal is kept that later ones are compared with
    """

    def __init__(self, online: Online, store: Store, denoiser: str, branch: int, keeping: Keeping = AS_IT_IS) -> None:
        self.online = online
        self._store = store
        self._keeping = keeping
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
        change = self._change(then, now) if asked else None
        verdict = None if change is None else self._judge(step, change)
        if verdict is None and asked and not guards:
            verdict = Verdict(False)
        computes = verdict is None or not verdict.predict
        self._predicted = 0 if computes else self._predicted + 1
        if computes:
            self._level = 0.0
        if self.online.rule in ADDING_UP or (not asked if guards else computes):
            kept = None if change is None else change.kept
            self._put(self._seen, now, kept or [self._keeping.keep(t) for t in now])
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
            then = [t for t in before.kept if isinstance(t, Tensor)]
            n = len(x)
            self._rate = distance(now[n:], then[n:]) / distance(now[:n], then[:n]) / size(now[n:])
        self._put(self._answer, now, [AS_IT_IS.keep(t) for t in now])

    def _change(self, then: Anchor | None, now: Sequence[Tensor]) -> Change | None:
        """From ``then``, what was seen before; None where there is nothing to compare with."""
        if then is None or (self.online.rule == "output_rate" and self._rate is None):
            return None
        if then.signature != signature(now):
            return None if self.online.rule == "drift" else Change(reason=OTHER_INPUT)
        moved, level, kept = compared(now, then.kept, self._keeping)
        return Change(moved / level if self._rate is None else moved * self._rate, kept)

    def _judge(self, step: int, found: Change) -> Verdict:
        if found.relative is None:
            return Verdict(False, found.reason)
        change = float(found.relative)  # waits here
        if not math.isfinite(change):
            return Verdict(False)
        counted = change if self.online.polynomial is None else float(np.polyval(self.online.polynomial, change))
        self._level = self._level + counted if self.online.rule in ADDING_UP else counted
        most = math.inf if self.online.most is None else self.online.most
        return Verdict(self._level < self.online.limit[step] and self._predicted < most)

    def _put(self, key: tuple[str, str, int], tensors: Sequence[Tensor], kept: Sequence[Kept]) -> None:
        self._store.put(key, 0, Anchor(Output.of(tuple(tensors)).form(), tuple(kept), (), signature(tensors)))


@dataclass(frozen=True, slots=True)
class Change:
    """Of a signal. ``kept``: the signal of now in the form in which it is kept, where comparing made it anyway."""

    relative: Tensor | None = None
    kept: Sequence[Kept] | None = None
    reason: Reason | None = None


def compared(
    now: Sequence[Tensor], then: Sequence[Kept], keeping: Keeping
) -> tuple[Tensor, Tensor, Sequence[Kept] | None]:
    """Mean absolute difference, mean absolute value of ``then``, and ``now`` as it is to be kept: one pass where
    ``then`` is kept in fewer bytes; else two, and None."""
    plain = [t for t in then if isinstance(t, Tensor)]
    if len(plain) == len(then):
        return distance(now, plain), size(plain), None
    found = [(*pack_again(n, t, keeping.backend),) for n, t in zip(now, then, strict=True) if isinstance(t, Packed)]
    if len(found) < len(then):
        whole = [unpack(t) if isinstance(t, Packed) else t for t in then]
        return distance(now, whole), size(whole), None
    moved, level = (_mean([sums[k] for _, sums in found], now) for k in range(2))
    return moved, level, [packed for packed, _ in found]


def signal_format(plan: DenoiserPlan) -> Format | None:
    """How signals are kept: in int8, whose error is far below any limit, where all outputs are in as few bits."""
    few = all(site.store is not None and format_of(site.store).bits <= 8 for site in plan.sites.values())
    return format_of("int8") if few else None


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
