"""Decisions left to the run: a number that is cheap to have at every step says whether the step may be predicted.

There is one decision per forward of a denoiser, for all sites of its plan. Forwards with the same place within a step
are one branch and share a signal; branches stacked in one batch share every decision, and so do samples: what is
decided for one depends on its batch mates. A single sample per call repeats itself anywhere.

Each decision reads one number back from the device. Schedules without an online rule read none. One file of
``criteria`` states what is compared and how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.schedule import DenoiserPlan, Online
from diffcache.executor import criteria
from diffcache.executor.criteria import Memory, Signal, Where
from diffcache.executor.notices import OTHER_INPUT, Reason
from diffcache.executor.store import AS_IT_IS, Anchor, Keeping, Kept, Store, signature
from diffcache.kernels import Format, format_of

SEEN = "seen"  # the signal of the reference call, in the memory of a criterion


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one forward. ``reason``: why nothing could be compared, where that is not as it should be."""

    predict: bool
    reason: Reason | None = None


class Decider:
    """What the calls of one branch have shown since its run began. Tensors lie in the store, and are counted there.

    keeping  how the signal is kept that later ones are compared with

    Raises UnknownName for a criterion that does not exist.
    """

    def __init__(self, online: Online, store: Store, denoiser: str, branch: int, keeping: Keeping = AS_IT_IS) -> None:
        self.online = online
        self.criterion = criteria.load(online.rule)
        self._memory = Memory(store, denoiser, branch)
        self._keeping = keeping
        self._level = 0.0
        self._predicted = 0  # in a row

    @property
    def decides_at_model(self) -> bool:
        return self.criterion.about.where is Where.MODEL

    @torch.no_grad()
    def decide(self, step: int, asked: bool, tensors: Sequence[Tensor]) -> Verdict | None:
        """The verdict on a step from the ``tensors`` at the place of the criterion; None where nothing is asked, or
        where the plan may go its way.

        asked  whether the plan predicts anything at this step
        """
        about = self.criterion.about
        now = self.criterion.signal(tensors)
        change = self._change(step, self._memory.anchor(SEEN), now) if asked else None
        verdict = None if change is None else self._judge(step, change)
        if verdict is None and asked and not about.keeps_anchors:
            verdict = Verdict(False)
        computes = verdict is None or not verdict.predict
        self._predicted = 0 if computes else self._predicted + 1
        if computes:
            self._level = 0.0
        if about.accumulates or (not asked if about.keeps_anchors else computes):
            kept = None if change is None else change.kept
            self._memory.put(SEEN, now, kept or [self._keeping.keep(t) for t in now])
        return verdict

    @torch.no_grad()
    def observe(self, x: Sequence[Tensor], output: Sequence[Tensor]) -> None:
        """Let the criterion observe that the denoiser has computed ``output`` from ``x``."""
        self.criterion.observe(self._memory, x, output)

    def _change(self, step: int, then: Anchor | None, now: Sequence[Tensor]) -> Change | None:
        """From ``then``, what was seen before; None where there is nothing to compare with."""
        if then is None or not self.criterion.ready(self._memory):
            return None
        if then.signature != signature(now):
            return None if self.criterion.about.keeps_anchors else Change(reason=OTHER_INPUT)
        signal = Signal(step, now, then.kept, self._keeping)
        relative = self.criterion.change(signal, self._memory)
        return Change(relative, signal.packed)

    def _judge(self, step: int, found: Change) -> Verdict:
        if found.relative is None:
            return Verdict(False, found.reason)
        change = float(found.relative)  # waits here
        if not math.isfinite(change):
            return Verdict(False)
        counted = change if self.online.polynomial is None else float(np.polyval(self.online.polynomial, change))
        self._level = self._level + counted if self.criterion.about.accumulates else counted
        most = math.inf if self.online.most is None else self.online.most
        return Verdict(self._level < self.online.limit[step] and self._predicted < most)


@dataclass(frozen=True, slots=True)
class Change:
    """Of a signal. ``kept``: the signal of now in the form in which it is kept, where comparing made it anyway."""

    relative: Tensor | None = None
    kept: Sequence[Kept] | None = None
    reason: Reason | None = None


def signal_format(plan: DenoiserPlan) -> Format | None:
    """How signals are kept: in int8, whose error is far below any limit, where all outputs are in as few bits."""
    few = all(site.store is not None and format_of(site.store).bits <= 8 for site in plan.sites.values())
    return format_of("int8") if few else None
