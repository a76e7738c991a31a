"""Observe the inner sites of the denoiser while a run is recorded: a few tokens of every input and output are kept.

The tokens are a fixed random subset, with all channels. It is the same for all steps, samples and sites with the same
number of tokens, so tensors of different steps can be compared element by element. Tokens are kept in main memory and
dropped when the tables are made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcache import host
from diffcache.executor.store import Output
from diffcache.host.structure import first_norm
from diffcache.patch import Wrapper
from diffcache.profiling.recording.format_costs import AT_STEPS, FormatCosts
from diffcache.profiling.recording.measured_sites import Places, few, layered, main_output


@dataclass(slots=True)
class _Visit:
    """One call of one site: a few tokens [samples, tokens, channels] of its input, its output, its first norm's; the
    whole input's shape, and whether the output has been seen."""

    x: Tensor | None = None
    output: Tensor | None = None
    modulated: Tensor | None = None
    shape: torch.Size | None = None
    left: bool = False


@dataclass(slots=True)
class Series:
    """One sample of one branch: tensors [tokens, channels] for each step. ``on``: the device for computations."""

    x: Sequence[Tensor]
    outputs: Sequence[Tensor]
    modulated: Sequence[Tensor] | None
    on: torch.device

    def stacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs, outputs and modulated inputs, [T, tokens, channels] each."""
        x, outputs = (torch.stack(list(tensors)).to(self.on) for tensors in (self.x, self.outputs))
        return x, outputs, None if self.modulated is None else torch.stack(list(self.modulated)).to(self.on)


class _Memory:
    """Main memory for kept tensors. It is reused from call to call, because new memory is expensive."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        free = self._free.get((tensor.shape, tensor.dtype))
        kept = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._given.append(kept.copy_(tensor))
        return kept

    def take_back(self) -> None:
        """Reuse the memory of all copies. They must not be read any more."""
        for tensor in self._given:
            self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        self._given = []


@dataclass(slots=True)
class _Forward:
    """The forward that is running.

    Attributes:
        step: The step.
        batch: Number of samples.
        memory: Memory for copies.
        whole: Whether to measure the cost of keeping its outputs.
        visits: Site -> its call.
        latest: The tensor of the latest ``look``, its version, and the copy.
    """

    step: int
    batch: int
    memory: _Memory
    whole: bool = False
    visits: dict[str, _Visit] = field(default_factory=dict)
    latest: tuple[Tensor, int, Tensor | None] | None = None

    def look(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of a few tokens. A tensor that one site passes to the next unchanged is copied once."""
        version = -1 if tensor.is_inference() else tensor._version  # rises when the tensor is written to
        if self.latest and self.latest[0] is tensor and self.latest[1] == version >= 0:
            return self.latest[2]
        seen = few(tensor, self.batch)
        self.latest = tensor, version, None if seen is None else self.memory.copy(seen)
        return self.latest[2]


class Observer:
    """Observes the sites of one denoiser, between ``attached`` and its end, in each ``forward``.

    Attributes:
        places: Site -> its modules.
        calls: Site -> number of calls in one step.
        output_bytes: Site -> size of one call's output, all tensors together.
        main: Site -> index of the tensor in its output that corresponds to its input.
        device: Device of the observed tensors.
        kept: Site -> the cost of keeping its outputs in fewer bytes, measured in the first loop.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.device = torch.device("cpu")
        self._memory = _Memory()
        self._loops = 0
        self.kept: dict[str, FormatCosts] = {}
        self.clear()

    def clear(self) -> None:
        """Drop all observations. Series that were returned become invalid at the next forward."""
        self._memory.take_back()
        self.calls: dict[str, int] = {}
        self.output_bytes: dict[str, int] = {}
        self.main: dict[str, int] = {}
        self._visits: dict[str, dict[tuple[int, int], _Visit]] = {site: {} for site in self.places}
        self._now: _Forward | None = None

    def attached(self) -> contextlib.AbstractContextManager[None]:
        return layered(self._arounds())

    @contextlib.contextmanager
    def forward(self, step: int, ordinal: int, batch: int) -> Iterator[None]:
        """Observe the ``ordinal``-th forward of a step, on ``batch`` samples. Branches in a batch count as samples."""
        if step == ordinal == 0:
            self.clear()  # a pipeline may run several loops; the last one counts
            self._loops += 1
        self._now = now = _Forward(step, batch, self._memory, self._loops == 1 and ordinal == 0 and step in AT_STEPS)
        try:
            yield
        finally:
            self._now = None
        for site, visit in now.visits.items():
            self._visits[site][step, ordinal] = visit

    def series(self, site: str, steps: int) -> list[Series] | str:
        """Return every sample, branch after branch in the order of calls; or the reason why there is none."""
        found = self._visits[site]
        ordinals = sorted({ordinal for _, ordinal in found})
        if not ordinals:
            return "is never called"
        rows = []
        for ordinal in ordinals:
            visits = [found[step, ordinal] for step in range(steps) if (step, ordinal) in found]
            if len(visits) < steps:
                return "is not called at every step"
            if any(v.output is None for v in visits):
                return "does not return a batch of samples"
            outputs, x, modulated = (_alike([getattr(v, n) for v in visits]) for n in ("output", "x", "modulated"))
            if outputs is None:
                return "changes its shape on the way"
            if x is None:
                return "is not given a batch of samples"
            for n in range(len(outputs[0])):
                norms = None if modulated is None else [t[n] for t in modulated]
                rows.append(Series([t[n] for t in x], [t[n] for t in outputs], norms, self.device))
        return rows

    def _arounds(self) -> Iterator[tuple[nn.Module, Wrapper]]:
        for site, modules in self.places.items():
            for module in modules:
                yield module, self._around(site, last=module is modules[-1])
            norm = first_norm(modules[0]) if site.startswith("stack:") else None
            if norm is not None:
                yield norm, self._norm(site)

    def _around(self, site: str, *, last: bool) -> Wrapper:
        """Return the layer of a site. The first call in a forward is observed; others are counted.

        The call of a stack begins at its first block that runs, because pipelines can leave blocks out.
        """
        main = host.main_of(self.places[site][0])

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return inner(*args, **kwargs)
            if site not in now.visits:
                now.visits[site] = visit = _Visit()
                tensors = Output.of(main(args, kwargs)).tensors
                if tensors:
                    visit.x, visit.shape = now.look(tensors[0]), tensors[0].shape
            value = inner(*args, **kwargs)
            if last:
                self._leave(now, site, Output.of(value).tensors)
            return value

        return around

    def _leave(self, now: _Forward, site: str, outputs: tuple[Tensor, ...]) -> None:
        if now.step == 0:
            self.calls[site] = self.calls.get(site, 0) + 1
        visit = now.visits[site]
        if visit.left or not outputs:
            return
        visit.left = True
        if site not in self.main:
            self.main[site] = main_output(outputs, visit.shape, lambda t: _distance(few(t, now.batch), visit.x))
            self.output_bytes[site] = sum(t.numel() * t.element_size() for t in outputs)
            self.device = outputs[0].device
        if now.whole:
            self.kept.setdefault(site, FormatCosts()).add(outputs, self.main[site])
        visit.output = now.look(outputs[self.main[site]]) if self.main[site] < len(outputs) else None

    def _norm(self, site: str) -> Wrapper:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            visit = self._now.visits.get(site) if self._now else None
            if self._now and visit and visit.modulated is None and not visit.left:
                outputs = Output.of(value).tensors
                visit.modulated = self._now.look(outputs[0]) if outputs else None
            return value

        return around


def _alike(tensors: list[Tensor | None]) -> list[Tensor] | None:
    """Return all tensors; None if one is missing or they differ in shape."""
    there = [t for t in tensors if t is not None]
    return there if len(there) == len(tensors) and len({t.shape for t in there}) == 1 else None


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).square().mean())
