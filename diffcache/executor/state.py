"""What one run owns: its schedule, its anchors, what it has counted; and the forward it is in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcache.documents.schedule import CacheSchedule
from diffcache.executor import notices
from diffcache.executor.decider import Decider, Verdict, signal_format
from diffcache.executor.notices import Notice, Reason
from diffcache.executor.pairing import Inputs, Pairing
from diffcache.executor.program import Program
from diffcache.executor.store import Keeping, Output, Store
from diffcache.host.channels import Place, find_sample
from diffcache.kernels import format_of
from diffcache.kernels.library import Backend, in_use
from diffcache.patch import Undo


@dataclass(slots=True)
class Counts:
    """What one site did for one branch.

    guarded  predictions that were computed instead, because the input had moved too far
    strip    True or False per forward, as they came: computed, for whatever reason, or predicted
    """

    computed: int = 0
    predicted: int = 0
    guarded: int = 0
    failed_open: Counter[Reason] = field(default_factory=Counter)
    timeline: list[bool] = field(default_factory=list)

    def compute(self) -> None:
        self.computed += 1
        self.timeline.append(True)

    def predict(self) -> None:
        self.predicted += 1
        self.timeline.append(False)

    def guard(self) -> None:
        self.guarded += 1
        self.timeline.append(True)

    def fail(self, reason: Reason) -> None:
        self.failed_open[reason] += 1
        self.timeline.append(True)


class Forward(NamedTuple):
    """One forward of a denoiser. ``skipped``: share of the calls of its sites that were predicted; 1 where the whole
    network was."""

    denoiser: str
    step: int
    branch: int
    skipped: float


@dataclass
class RunState:
    """Everything one run owns; dropped with it.

    start     first step of the run: above 0 for image-to-image and its kin
    together  several processes run the denoiser, each its part: none may decide by what it alone sees
    pairings  by ``Call.key``: how x goes with F, where equation (1) needs x
    lesson    is shown what every predicted site would have computed; then everything runs, and nothing is saved
    backend   what is to run the operations on tensors that are kept in fewer bytes; ``used``: what did
    keepings  by denoiser, site and device: how outputs are kept
    blanks    by ``Call.key`` and part of a stack whose parts differ: what it returned, without the values
    flows     (denoiser, stack) -> which output of one block is which input of the next
    forwards  in order
    since     how many of them lie before the loop went back, if it did
    lost      (``Call.key``, step) -> why the output of a computed step was not kept
    suspects  kind, and tensors whose finiteness is read when the run is over: no synchronisation inside the loop
    notices   about the run as a whole; most are known when it is ``over``
    doubts    (denoiser, step) where a forward was predicted that may serve another branch than the one before
    places    by denoiser: where the noise scheduler's sample lies in its input; None: not found
    unplaced  by denoiser: its input at the first step, until it is compared with the sample
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
    notices: list[Notice] = field(default_factory=list)
    over: bool = False
    levels_back: Undo = lambda: None
    on_prediction: OnPrediction | None = None
    backend: Backend = "auto"
    backend_used: str = ""
    keepings: dict[tuple[str, str, torch.device], Keeping] = field(default_factory=dict)

    def count(self, denoiser: str, site: str, branch: int) -> Counts:
        return self.counts[denoiser, site, branch]

    def keeping(self, denoiser: str, site: str, device: torch.device) -> Keeping:
        """How the outputs of a site are kept on this device."""
        key = denoiser, site, device
        if key not in self.keepings:
            program = self.programs[denoiser, site]
            how = None if program.store is None else format_of(program.store)
            prescale = program.prescale
            scaled = None if prescale is None else torch.tensor(prescale, dtype=torch.float32, device=device)
            self.keepings[key] = Keeping(how, scaled, self.backend)
            if how is not None:
                self.backend_used = in_use(self.backend, device)
        return self.keepings[key]

    def decider(self, denoiser: str, branch: int) -> Decider | None:
        """The signal of one branch, if its plan has an online rule."""
        plan = self.schedule.denoisers.get(denoiser)
        if plan is None or plan.online is None:
            return None
        if (denoiser, branch) not in self.deciders:
            keeping = Keeping(signal_format(plan), backend=self.backend)
            self.deciders[denoiser, branch] = Decider(plan.online, self.store, denoiser, branch, keeping)
        return self.deciders[denoiser, branch]

    def plans_prediction(self, denoiser: str, step: int) -> bool:
        """Whether the plan predicts anything at this step."""
        programs = [program for (name, _), program in self.programs.items() if name == denoiser]
        return any(step < len(p.terms) and p.terms[step] is not None for p in programs)

    def locate_sample(self, sample: Tensor) -> None:
        """Find the sample that the noise scheduler is about to step in the denoisers' inputs of this step."""
        for denoiser, x in self.unmatched_inputs.items():
            self.sample_slots[denoiser] = sample_slot = find_sample(x, sample)
            for key, pairing in self.pairings.items():
                if isinstance(key, tuple) and key[:2] == (denoiser, "model"):
                    self.pairings[key] = replace(pairing, sample_slot=sample_slot)
        self.unmatched_inputs.clear()

    def drop_branch(self, denoiser: str, branch: int) -> None:
        """Drop what is kept for a branch: its number may have been another branch's so far."""
        for key, step in self.store.discard(denoiser, branch):
            self.lost[key, step] = notices.UNNAMED
        self.deciders.pop((denoiser, branch), None)

    def drop_tensors(self) -> None:
        """Drop every tensor: the loop is over, or goes back."""
        self.store.clear()
        self.deciders.clear()
        self.placeholders.clear()
        self.keepings.clear()
        self.lost.clear()
        self.unmatched_inputs.clear()

    def go_back(self) -> None:
        """Drop every tensor, and take no earlier forward for one that left an anchor."""
        self.drop_tensors()
        self.since = len(self.forwards)

    def not_finite(self) -> Counter[str]:
        """Return kind -> number of suspects that are not finite, and forget the suspects. Reads each device once for
        every dtype."""
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
        """(denoiser, site, branch) -> bytes kept of its outputs at one time, all visits of a forward together."""
        found: Counter[tuple[str, str, int]] = Counter()
        for key, most in self.store.most.items():
            if isinstance(key, tuple) and len(key) == 4:
                denoiser, site, branch, _ = key
                found[denoiser, site, branch] += most
        return found

    def failures(self) -> list[Notice]:
        """Return a notice for every reason for which predictions were computed in full so far."""
        found: dict[Reason, Counter[str]] = {}
        for (denoiser, site, _), counts in self.counts.items():
            for reason, times in counts.failed_open.items():
                found.setdefault(reason, Counter())[f"{denoiser}/{site}"] += times
        failures = []
        for reason, sites in found.items():
            first, *more = sorted(sites)
            place, times = first + (f" and {len(more)} more sites" if more else ""), sum(sites.values())
            text = f"{place}: {times} predictions were computed in full instead: {reason.text}"
            failures.append(Notice(reason.kind, times, text))
        return failures


@dataclass(slots=True)
class Stack:
    """A stack's pass within one forward: its input, and its prediction if it is not computed.

    stand_in  what goes from block to block at a predicted step: hosts may write into it
    before    what the block that ran last returned
    left      its last block has run: the next block belongs to another pass
    """

    inputs: Inputs
    prediction: tuple[Any] | None
    stand_in: Any = None
    previous: tuple[Tensor, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class FirstBlock:
    """What the block that decides was given, and what it returned."""

    inputs: Inputs
    outputs: tuple[Tensor, ...]


@dataclass
class Call:
    """One forward of a denoiser: which step and branch it serves, and the stacks entered in it.

    batch    samples in it, branches in the batch counted apart
    watch    what decides, where the run does
    doubt    why nothing may be predicted, if so
    unsure   nothing but its place in the step shows which branch it serves
    verdict  its decision, as soon as it is taken
    visits   how often each site was entered before: one feed-forward may serve pictures, then text
    lead     the first block's run, where it decides
    asked    calls of sites inside the network, predicted or not
    predicted  calls of sites that were predicted, of the network as a whole as well
    plain    site -> its prediction without scale and bias, while there is a lesson
    heard    called with the output of the first normalisation in the first block, once
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
        """Whose anchors serve the site now: every branch has its own, and every visit within a forward."""
        return self.denoiser, site, self.branch, self.visits[site]

    def decide(self, signal: tuple[Tensor, ...]) -> None:
        """Let the signal say whether this forward is predicted."""
        if self.decider is not None:
            self.verdict = self.decider.decide(self.step, self.state.plans_prediction(self.denoiser, self.step), signal)

    @property
    def predicts(self) -> bool:
        return self.verdict is not None and self.verdict.predict


OnPrediction = Callable[[Call, str, Any], None]  # (forward, site, what the site would have computed)
