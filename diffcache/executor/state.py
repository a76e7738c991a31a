"""The state of a run: its schedule, its kept tensors, its counts, and the forward that is running."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.branches import BranchLayout
from diffcache.documents.schedule import CacheSchedule
from diffcache.executor import notices
from diffcache.executor.criteria import Where
from diffcache.executor.decider import Decider, Verdict, signal_format
from diffcache.executor.notices import Notice, Reason
from diffcache.executor.pairing import Inputs, Pairing
from diffcache.executor.program import Program
from diffcache.executor.store import Output, Packer, Store
from diffcache.host.channels import Place, find_sample
from diffcache.kernels import format_of
from diffcache.kernels.library import Backend, in_use
from diffcache.patch import Undo


@dataclass(slots=True)
class Counts:
    """The counts of one site for one branch of guidance.

    Attributes:
        computed: Forwards that the schedule or its rule computed.
        predicted: Forwards that were predicted.
        guarded: Predictions that were computed instead, because the input had moved too far.
        failed_open: Predictions that were computed instead, by reason.
        timeline: For each forward, in order: whether it was computed, for any reason.
    """

    computed: int = 0
    predicted: int = 0
    guarded: int = 0
    failed_open: Counter[Reason] = field(default_factory=Counter)
    timeline: list[bool] = field(default_factory=list)

    def compute(self) -> None:
        """Count a forward that was computed as planned."""
        self.computed += 1
        self.timeline.append(True)

    def predict(self) -> None:
        """Count a prediction."""
        self.predicted += 1
        self.timeline.append(False)

    def guard(self) -> None:
        """Count a planned prediction that a criterion turned into a computed forward."""
        self.guarded += 1
        self.timeline.append(True)

    def fail(self, reason: Reason) -> None:
        """Count a planned prediction that was computed for ``reason``."""
        self.failed_open[reason] += 1
        self.timeline.append(True)


class Forward(NamedTuple):
    """One forward of a denoiser that is over.

    Attributes:
        denoiser: The component name of the network.
        step: The step of the loop.
        branch: The number of the branch.
        skipped: The share of the calls of its sites that were predicted. It is 1 if the whole network was.
    """

    denoiser: str
    step: int
    branch: int
    skipped: float


@dataclass
class RunState:
    """The state of one run.

    Attributes:
        schedule: The schedule of the run.
        programs: The compiled plans, by denoiser and site.
        layout: The branches of the schedule.
        start: The first step of the run. It is above 0 for image-to-image calls, for example.
        together: Whether several processes run the denoiser, each a part of it. Then no process may decide from the
            tensors that it has.
        store: The kept tensors.
        counts: The counts, by denoiser, site and branch.
        deciders: The decisions of online rules, by denoiser and branch.
        pairings: Which input belongs to which output, by ``Call.key``, at sites whose predictions need their inputs.
        placeholders: The form of the output of a part of a stack, by ``Call.key`` and number of the part. Only stacks
            with parts that differ have them.
        flows: Which output of one block is which input of the next, by denoiser and stack.
        calls_at_start: The number of forwards in the first step, by denoiser, until the second step begins.
        batch_at_start: The number of samples of a forward in the first step, by denoiser.
        doubts: The denoisers and steps at which a forward was predicted that may belong to another branch than the one
            before.
        sample_slots: The part of the denoiser's input that is the sample of the noise scheduler, by denoiser. None
            means that it was not found.
        unmatched_inputs: The input of the denoiser in the first step, by denoiser, until the sample is looked for in
            it.
        forwards: All forwards that are over, in order.
        since: The number of these forwards that ran before the loop went back. It is 0 if the loop did not go back.
        lost: Why the output of a computed step was not kept, by ``Call.key`` and step.
        pending_finite_checks: Kinds of notices, and tensors whose finiteness is read when the run is over. So the loop
            does not wait for the device.
        notices: Notices about the run as a whole. Most are added at its end.
        over: Whether the run has ended.
        levels_back: Gives the noise scheduler its noise levels back.
        on_prediction: See ``OnPrediction``.
        backend: The backend that was asked for, for tensors kept in fewer bytes.
        backend_used: The backend that ran. It is empty if no tensor was kept in fewer bytes.
        packers: How outputs are kept, by denoiser, site and device.
        deciding: The stack whose first block decides, and where in the block, by denoiser.
        predicts: Whether the schedule, or the rule that made it, has predictions.
        levels: float64 [T], the share of noise in the state at every step, if a criterion reads it. None: not known.
        chosen: Which of several schedules was chosen for the run. It is empty if there was only one.
    """

    schedule: CacheSchedule
    programs: Mapping[tuple[str, str], Program]
    start: int = 0
    together: bool = False
    store: Store = field(default_factory=Store)
    counts: defaultdict[tuple[str, str, int], Counts] = field(default_factory=lambda: defaultdict(Counts))
    deciders: dict[tuple[str, int], Decider] = field(default_factory=dict)
    pairings: dict[Hashable, Pairing] = field(default_factory=dict)
    placeholders: dict[tuple[Hashable, int], Output] = field(default_factory=dict)
    flows: dict[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)
    calls_at_start: dict[str, int] = field(default_factory=dict)
    batch_at_start: dict[str, int] = field(default_factory=dict)
    doubts: set[tuple[str, int]] = field(default_factory=set)
    sample_slots: dict[str, Place | None] = field(default_factory=dict)
    unmatched_inputs: dict[str, Tensor] = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    since: int = 0
    lost: dict[tuple[Hashable, int], Reason] = field(default_factory=dict)
    pending_finite_checks: list[tuple[str, Sequence[Tensor]]] = field(default_factory=list)
    layout: BranchLayout = field(init=False)
    notices: list[Notice] = field(default_factory=list)
    over: bool = False
    levels_back: Undo = lambda: None
    on_prediction: OnPrediction | None = None
    backend: Backend = "auto"
    backend_used: str = ""
    packers: dict[tuple[str, str, torch.device], Packer] = field(default_factory=dict)
    deciding: Mapping[str, tuple[str, Where | None]] = field(default_factory=dict)
    predicts: bool = False
    levels: np.ndarray | None = None
    chosen: str = ""

    def __post_init__(self) -> None:
        self.layout = self.schedule.layout

    def count(self, denoiser: str, site: str, branch: int) -> Counts:
        """Return the counts of a site for a branch."""
        return self.counts[denoiser, site, branch]

    def packer(self, denoiser: str, site: str, device: torch.device) -> Packer:
        """Return how the outputs of a site are kept on ``device``."""
        key = denoiser, site, device
        if key not in self.packers:
            program = self.programs[denoiser, site]
            how = None if program.store is None else format_of(program.store)
            prescale = program.prescale
            scaled = None if prescale is None else torch.tensor(prescale, dtype=torch.float32, device=device)
            self.packers[key] = Packer(how, scaled, self.backend)
            if how is not None:
                self.backend_used = in_use(self.backend, device)
        return self.packers[key]

    def decider(self, denoiser: str, branch: int) -> Decider | None:
        """Return what decides for one branch, or None if the plan has no online rule."""
        plan = self.schedule.denoisers.get(denoiser)
        if plan is None or plan.online is None:
            return None
        if (denoiser, branch) not in self.deciders:
            packer = Packer(signal_format(plan), backend=self.backend)
            self.deciders[denoiser, branch] = Decider(plan.online, self.store, denoiser, branch, packer, self.levels)
        return self.deciders[denoiser, branch]

    def plans_prediction(self, denoiser: str, step: int) -> bool:
        """Return whether the plan predicts a site of ``denoiser`` at ``step``."""
        programs = [program for (name, _), program in self.programs.items() if name == denoiser]
        return any(step < len(p.terms) and p.terms[step] is not None for p in programs)

    def locate_sample(self, sample: Tensor) -> None:
        """Find ``sample`` in the inputs that the denoisers were given in this step.

        Args:
            sample: The sample that is passed to the noise scheduler.
        """
        for denoiser, x in self.unmatched_inputs.items():
            self.sample_slots[denoiser] = sample_slot = find_sample(x, sample)
            for key, pairing in self.pairings.items():
                if isinstance(key, tuple) and key[:2] == (denoiser, "model"):
                    self.pairings[key] = replace(pairing, sample_slot=sample_slot)
        self.unmatched_inputs.clear()

    def drop_branch(self, denoiser: str, branch: int) -> None:
        """Drop all tensors of a branch: its number may have belonged to another branch before."""
        for key, step in self.store.discard(denoiser, branch):
            self.lost[key, step] = notices.UNNAMED
        self.deciders.pop((denoiser, branch), None)

    def drop_tensors(self) -> None:
        """Drop all tensors, because the loop is over or goes back."""
        self.store.clear()
        self.deciders.clear()
        self.placeholders.clear()
        self.packers.clear()
        self.lost.clear()
        self.unmatched_inputs.clear()

    def go_back(self) -> None:
        """Drop all tensors, and ignore all earlier forwards when an anchor is missing."""
        self.drop_tensors()
        self.since = len(self.forwards)

    def not_finite(self) -> Counter[str]:
        """Return the number of pending checks that failed, by kind, and clear the checks.

        Each device is read once for every dtype.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        for number, (_, tensors) in enumerate(self.pending_finite_checks):
            for t in tensors:
                groups.setdefault((t.device, t.dtype), []).append((number, t))
        wrong: set[int] = set()
        for group in groups.values():
            finite = torch.isfinite(torch.stack([t for _, t in group])).tolist()
            wrong |= {number for (number, _), well in zip(group, finite, strict=True) if not well}
        found = Counter(self.pending_finite_checks[number][0] for number in wrong)
        self.pending_finite_checks.clear()
        return found

    def most_bytes(self) -> Counter[tuple[str, str, int]]:
        """Return the most bytes of kept outputs at one time, by denoiser, site and branch.

        The visits of a site within one forward are summed.
        """
        found: Counter[tuple[str, str, int]] = Counter()
        for key, most in self.store.most.items():
            if isinstance(key, tuple) and len(key) == 4:
                denoiser, site, branch, _ = key
                found[denoiser, site, branch] += most
        return found

    def failures(self) -> list[Notice]:
        """Return a notice for every reason for which predictions were computed in full."""
        found: dict[Reason, Counter[str]] = {}
        for (denoiser, site, _), counts in self.counts.items():
            for reason, times in counts.failed_open.items():
                found.setdefault(reason, Counter())[f"{denoiser}/{site}"] += times
        failures = []
        for reason, sites in found.items():
            first, *more = sorted(sites)
            where, times = first + (f" and {len(more)} more sites" if more else ""), sum(sites.values())
            text = f"{where}: {times} predictions were computed in full instead: {reason.text}"
            failures.append(Notice(reason.kind, times, text))
        return failures


@dataclass(slots=True)
class Stack:
    """One pass of a forward through a stack.

    Attributes:
        inputs: The input of the first block that ran.
        prediction: The predicted output in a tuple of one. None means that the stack is computed.
        stand_in: A copy of the prediction that the blocks return. The network may write into it.
        previous: The tensors that the block before returned.
        finished: Whether the last block has run. The next block then begins another pass.
    """

    inputs: Inputs
    prediction: tuple[Any] | None
    stand_in: Any = None
    previous: tuple[Tensor, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class FirstBlock:
    """The inputs and outputs of the first block of a stack, by which a criterion decides."""

    inputs: Inputs
    outputs: tuple[Tensor, ...]


@dataclass
class Call:
    """One forward of a denoiser that is running.

    Attributes:
        state: The state of the run.
        denoiser: The component name of the network.
        step: The step of the loop.
        branch: The number of the branch.
        batch: The number of samples. Branches in one batch count apart.
        decider: What decides about this forward, or None if the plan has no online rule.
        doubt: Why nothing may be predicted, or None.
        unsure: Whether only the position of the forward in its step shows its branch.
        verdict: The decision, as soon as it is made.
        stacks: The passes through stacks, by site.
        visits: How often each site has run in this forward. One feed-forward may run for pictures and then for text.
        first_block: The first block, if a criterion decides by it and it has run.
        inner_calls: The calls of sites inside the network, predicted or not.
        predicted: The calls of all sites that were predicted.
        uncorrected: Predictions without scale and bias, by site. They are made only for ``RunState.on_prediction``.
        on_first_norm: Called once, with the output of the first normalisation in the first block.
    """

    state: RunState
    denoiser: str
    step: int
    branch: int
    batch: int = 1
    decider: Decider | None = None
    doubt: Reason | None = None
    unsure: bool = False
    verdict: Verdict | None = None
    stacks: dict[str, Stack] = field(default_factory=dict)
    visits: Counter[str] = field(default_factory=Counter)
    first_block: FirstBlock | None = None
    inner_calls: int = 0
    predicted: int = 0
    uncorrected: dict[str, Any] = field(default_factory=dict)
    on_first_norm: Callable[[tuple[Tensor, ...]], None] | None = None

    def key(self, site: str) -> Hashable:
        """Return the key of the anchors of ``site``: every branch has its own, and every visit within a forward."""
        return self.denoiser, site, self.branch, self.visits[site]

    def decides_in(self, site: str) -> Where | None:
        """Return where in the first block of a stack the criterion of this run decides, or None."""
        stack, where = self.state.deciding.get(self.denoiser, ("", None))
        return where if stack == site else None

    def decide(self, signal: tuple[Tensor, ...]) -> None:
        """Decide whether this forward is predicted.

        Args:
            signal: The tensors at the place where the criterion decides.
        """
        if self.decider is not None:
            self.verdict = self.decider.decide(self.step, self.state.plans_prediction(self.denoiser, self.step), signal)

    @property
    def predicts(self) -> bool:
        """Return whether it was decided that this forward is predicted."""
        return self.verdict is not None and self.verdict.predict


# Called at every predicted site with the forward, the site and the output that the site computes. All sites then run,
# and nothing is saved.
OnPrediction = Callable[[Call, str, Any], None]
