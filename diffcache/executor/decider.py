"""Decide in the run whether a step is predicted.

There is one decision per forward of a denoiser, for all sites of its plan. Forwards at the same position within a step
belong to one branch and share a signal. Branches in one batch share every decision, and so do samples, so a decision
about a sample depends on the other samples of its batch.

Each decision reads one number from the device. Schedules without an online rule read none. One file of ``criteria``
states what is compared and how.
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
from diffcache.executor.store import AS_IT_IS, Anchor, Kept, Packer, Store, signature
from diffcache.kernels import Format, format_of

SEEN = "seen"  # the signal of the reference call, in the memory of a criterion


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision about one forward.

    Attributes:
        predict: Whether the forward is predicted.
        reason: Why nothing could be compared, if something should have been.
    """

    predict: bool
    reason: Reason | None = None


class Decider:
    """Decides about the forwards of one branch in one run.

    Args:
        online: The online rule of the plan.
        store: The store of the run. All tensors that are compared are kept in it.
        denoiser: The component name of the network.
        branch: The number of the branch.
        packer: How signals are kept for later comparisons.
        levels: float64 [T], the share of noise in the state at every step, or None. See ``Signal``.

    Raises:
        UnknownName: There is no criterion of the rule's name, or it has not one of the options.
    """

    def __init__(
        self,
        online: Online,
        store: Store,
        denoiser: str,
        branch: int,
        packer: Packer = AS_IT_IS,
        levels: np.ndarray | None = None,
    ) -> None:
        self.online = online
        self.criterion = criteria.load(online.rule, online.options)
        self._memory = Memory(store, denoiser, branch)
        self._packer = packer
        self._levels = levels
        self._since = 0  # the step of the reference call
        self._level = 0.0
        self._predicted = 0  # number of predicted steps in a row

    @property
    def decides_at_model(self) -> bool:
        """Return whether the criterion decides before the denoiser runs."""
        return self.criterion.about.where is Where.MODEL

    @torch.no_grad()
    def decide(self, step: int, asked: bool, tensors: Sequence[Tensor]) -> Verdict | None:
        """Decide about a forward.

        Args:
            step: The step of the loop.
            asked: Whether the plan predicts anything at this step.
            tensors: The tensors at the place where the criterion decides.

        Returns:
            The decision. None means that the forward follows the plan.
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
            self._since = step
            self._memory.put(SEEN, now, kept or [self._packer.keep(t) for t in now])
        return verdict

    @torch.no_grad()
    def observe(self, x: Sequence[Tensor], output: Sequence[Tensor]) -> None:
        """Pass the input and the output of a computed forward to the criterion."""
        self.criterion.observe(self._memory, x, output)

    def _change(self, step: int, then: Anchor | None, now: Sequence[Tensor]) -> Change | None:
        """Return the change of the signal from ``then`` to ``now``, or None if there is nothing to compare with."""
        if then is None or not self.criterion.ready(self._memory):
            return None
        if then.signature != signature(now):
            return None if self.criterion.about.keeps_anchors else Change(reason=OTHER_INPUT)
        signal = Signal(step, now, then.kept, self._packer, since=self._since, levels=self._levels)
        relative = self.criterion.change(signal, self._memory)
        return Change(relative, signal.packed)

    def _judge(self, step: int, found: Change) -> Verdict:
        """Compare the change with the limit of the rule at ``step``."""
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
    """The change of a signal.

    Attributes:
        relative: The relative change, a tensor of one element, or None if it could not be computed.
        kept: The new signal in the format of the store, if the comparison has made it.
        reason: Why the change could not be computed.
    """

    relative: Tensor | None = None
    kept: Sequence[Kept] | None = None
    reason: Reason | None = None


def signal_format(plan: DenoiserPlan) -> Format | None:
    """Return the format in which signals are kept.

    It is int8 if all outputs of the plan are kept in 8 bits or fewer. The error of int8 is far below any limit.
    """
    few = all(site.store is not None and format_of(site.store).bits <= 8 for site in plan.sites.values())
    return format_of("int8") if few else None
