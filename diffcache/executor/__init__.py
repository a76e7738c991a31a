"""One decision per site and step: compute, or predict from what was kept. Knows when, never the name of a model."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache import host, store
from diffcache.errors import ScheduleMismatch
from diffcache.executor.checks import Sites, check_compiled, check_pipeline, check_run, entry_point
from diffcache.executor.guess import combine, problem, repeats
from diffcache.executor.program import Program, compile_plan
from diffcache.patch import Around, Undo, layer, on_top
from diffcache.schedule import CacheSchedule
from diffcache.schedulers import Grid, Rule
from diffcache.store import Anchor, Output, Store


class FailedOpen(RuntimeWarning):
    """A step that the schedule wanted to predict was computed in full instead."""


@dataclass(slots=True)
class Counts:
    """What one site did for one branch."""

    computed: int = 0
    predicted: int = 0
    failed_open: Counter[str] = field(default_factory=Counter)


@dataclass
class State:
    """Everything one run owns; dropped with it."""

    schedule: CacheSchedule
    programs: Mapping[tuple[str, str], Program]
    store: Store = field(default_factory=Store)
    counts: dict[tuple[str, str, int], Counts] = field(default_factory=dict)
    calls_at_start: dict[str, int] = field(default_factory=dict)
    suspects: list[Tensor] = field(default_factory=list)  # finiteness flags not yet read from an accelerator

    def count(self, denoiser: str, site: str, branch: int) -> Counts:
        return self.counts.setdefault((denoiser, site, branch), Counts())


@dataclass(slots=True)
class Stack:
    """A stack's pass within one forward: its input, and its prediction if it is not computed.

    stand_in  what goes from block to block at a predicted step: hosts may write into it
    """

    x: tuple[Tensor, ...]
    guess: tuple[Any] | None
    stand_in: Any = None


@dataclass
class Call:
    """One forward of a denoiser: which step and branch it serves, and the stacks entered in it."""

    state: State
    denoiser: str
    step: int
    branch: int
    stacks: dict[str, Stack] = field(default_factory=dict)


@dataclass(slots=True)
class Patch:
    """One of our layers. ``module`` is weak: a denoiser must not be kept alive by what is layered on it."""

    module: weakref.ref[nn.Module]
    around: Around
    off: Undo = lambda: None

    def put(self) -> None:
        """On top of whatever a call of the module runs, unless it is there. Strangers who give a module the forward
        back that they found (model offloading does, after every run) take ours off with it."""
        module = self.module()
        if module is not None and not on_top(module, entry_point(module), self.around):
            self.off()
            self.off = layer(module, entry_point(module), self.around)


class Executor:
    """Carries out a schedule on one pipeline. ``attach`` and ``detach`` leave no trace behind.

    They hold it, through its layers; it holds neither the pipeline nor a module.
    """

    def __init__(self, pipe: Any, source: CacheSchedule | Rule, sites: Sites, *, strict: bool = True) -> None:
        self.source = source
        self.strict = strict
        self.sites = {name: tuple(names) for name, names in sites.items()}
        self.host = host.Host(pipe, self._begin, self._end, self._missed)
        self.last: State | None = None
        self.runs = 0
        self._current = threading.local()
        self._warned: set[str] = set()
        if isinstance(source, CacheSchedule):
            check_pipeline(pipe, source, sites, strict=strict)
            schedule = source
        else:  # on any grid: what the rule cannot do is said now, and its sites do not depend on the grid
            schedule = source.schedule(Grid(np.linspace(1.0, 0.1, 10)), self.sites)
        for name in sites:
            check_compiled(name, sites[name]["model"][0], _patched(schedule, name))
        self._roots = {name: weakref.ref(modules["model"][0]) for name, modules in sites.items()}
        self._patches = [
            Patch(weakref.ref(module), around)
            for name, modules in sites.items()
            for site in _patched(schedule, name)
            for module, around in self._arounds(name, site, modules[site])
        ]

    def attach(self) -> None:
        try:
            for patch in self._patches:
                patch.put()
            self.host.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        try:
            self.host.detach()
        finally:
            for patch in self._patches:
                patch.off()

    # ------------------------------------------------------------------ runs

    def _begin(self, run: host.Run) -> None:
        self._check_denoisers()
        if isinstance(self.source, Rule):
            timesteps = run.timesteps.detach().cpu().double().numpy()
            schedule = self.source.schedule(Grid(timesteps, run.start), self.sites)
        else:
            schedule = self.source
            check_run(self.host.pipe, run, schedule, strict=self.strict)
        programs = {
            (denoiser, site): compile_plan(plan)
            for denoiser, p in schedule.denoisers.items()
            for site, plan in p.sites.items()
        }
        for patch in self._patches:
            patch.put()
        self.last = run.state = state = State(schedule, programs)
        run.again = state.store.clear
        self.runs += 1

    def _end(self, run: host.Run) -> None:
        state: State = run.state
        state.store.clear()
        if state.suspects and not bool(torch.stack([s.cpu() for s in state.suspects]).all()):
            self._warn(
                "non-finite output",
                "the denoiser returned NaN or Inf and predictions were made from it; the result is suspect",
            )
        state.suspects.clear()
        for reason, times in self._failures(state).items():
            first, *more = sorted(times)
            places = first + (f" and {len(more)} more sites" if more else "")
            self._warn(reason, f"{places}: {sum(times.values())} predictions were computed in full instead: {reason}")

    def _missed(self) -> None:
        self._warn(
            "no loop",
            f"{type(self.host.pipe).__name__} was called and no sampling loop of its own was seen: nothing was "
            "skipped. Its loop does not use pipe.progress_bar, or runs in another pipeline inside: accelerate that.",
        )

    @staticmethod
    def _failures(state: State) -> dict[str, Counter[str]]:
        """Reason -> site -> times."""
        found: dict[str, Counter[str]] = {}
        for (denoiser, site, _), counts in state.counts.items():
            for reason, times in counts.failed_open.items():
                found.setdefault(reason, Counter())[f"{denoiser}/{site}"] += times
        return found

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, FailedOpen, stacklevel=2)

    def _check_denoisers(self) -> None:
        pipe = self.host.pipe
        for name, root in self._roots.items():
            here = getattr(pipe, name, None)
            if isinstance(here, nn.Module) and here is not root():
                raise ScheduleMismatch(
                    f"{name!r} of this {type(pipe).__name__} is another object than when it was accelerated (now: "
                    f"{type(here).__name__}); it would run without the cache. Call diffcache.restore(pipe), then "
                    "accelerate it as it is: compile first, accelerate last."
                )

    # ----------------------------------------------------------------- sites

    def _arounds(self, name: str, site: str, modules: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, Around]]:
        for module in modules:
            main = host.main_input(module)
            if site == "model":
                yield module, self._root(name, main)
            elif site.startswith("stack:"):
                yield module, self._part_of_stack(name, site, main, last=module is modules[-1])
            else:
                yield module, self._single(name, site, main)

    def _root(self, name: str, main: str) -> Around:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = self.host.run
            if run is None:  # outside this pipeline's loop: somebody else's call, or the user's own
                return inner(*args, **kwargs)
            call = Call(run.state, name, run.index, run.next_call(name))
            x = _tensors(main, args, kwargs)
            self._check_guidance(run, call, x)
            outer = getattr(self._current, "call", None)
            self._current.call = call
            try:
                if (name, "model") in call.state.programs:
                    return self._visit(call, "model", x, lambda: inner(*args, **kwargs))
                call.state.count(name, "model", call.branch).computed += 1
                return inner(*args, **kwargs)
            finally:
                self._current.call = outer

        return around

    def _single(self, name: str, site: str, main: str) -> Around:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            return self._visit(call, site, _tensors(main, args, kwargs), lambda: inner(*args, **kwargs))

        return around

    def _part_of_stack(self, name: str, site: str, main: str, *, last: bool) -> Around:
        """At a predicted step every block hands on a copy of the stack's predicted output, and the last one the output
        itself. What the host adds in between (ControlNet residuals) is lost with the copy; the prediction holds it."""

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            if site not in call.stacks:  # at the first block that runs: hosts can be told to leave some out
                x = _tensors(main, args, kwargs)
                call.stacks[site] = Stack(x, self._guess(call, site, x))
            stack = call.stacks[site]
            if stack.guess is None:
                value = inner(*args, **kwargs)
                if last:
                    self._keep(call, site, stack.x, value)
                return value
            if last:
                return stack.guess[0]
            if stack.stand_in is None:
                stack.stand_in = Output.of(stack.guess[0]).copied()
            return stack.stand_in

        return around

    def _call_of(self, name: str, site: str) -> Call | None:
        call: Call | None = getattr(self._current, "call", None)
        return call if call and call.denoiser == name and (name, site) in call.state.programs else None

    # ------------------------------------------------------------- decisions

    def _visit(self, call: Call, site: str, x: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        guess = self._guess(call, site, x)
        if guess is not None:
            return guess[0]
        value = compute()
        self._keep(call, site, x, value)
        return value

    def _guess(self, call: Call, site: str, x: tuple[Tensor, ...]) -> tuple[Any] | None:
        """The predicted output in a tuple of one, or None where the step is to be computed; counts either."""
        program = call.state.programs[call.denoiser, site]
        counts = call.state.count(call.denoiser, site, call.branch)
        if call.step >= len(program.terms):
            counts.failed_open["step beyond the schedule"] += 1
            return None
        terms = program.terms[call.step]
        if terms is None:
            counts.computed += 1
            return None
        key = (call.denoiser, site, call.branch)
        anchors = [call.state.store.get(key, a) for a in terms.anchors]
        for step in program.drops[call.step]:
            call.state.store.drop(key, step)
        guidance = call.state.schedule.guidance
        branch = None if guidance is not None and guidance.mode == "batched" else call.branch
        obstacle = problem(anchors, terms, x, branch)
        if obstacle:
            counts.failed_open[obstacle] += 1
            return None
        counts.predicted += 1
        return (combine([a for a in anchors if a is not None], terms, x, branch),)

    def _keep(self, call: Call, site: str, x: tuple[Tensor, ...], value: Any) -> None:
        program = call.state.programs[call.denoiser, site]
        if call.step not in program.keeps:
            return
        output = Output.of(value)
        if not output.tensors:  # a type whose tensors cannot be reached: nothing can be made of it later
            return
        finite = store.all_finite(output.tensors)
        if finite is not None and finite.device.type != "cpu":
            call.state.suspects.append(finite)  # read when the run is over: no synchronisation inside the loop
        elif finite is not None and not finite:
            return
        kept_x = tuple(t.detach().clone() for t in x) if call.step in program.keeps_x else ()
        key = (call.denoiser, site, call.branch)
        call.state.store.put(key, call.step, Anchor(output.kept(), kept_x, store.signature(x)))

    def _check_guidance(self, run: host.Run, call: Call, x: tuple[Tensor, ...]) -> None:
        """In a run's first two steps: are there as many branches as the coefficients were fitted for?"""
        guidance = call.state.schedule.guidance
        if guidance is None:
            return
        if call.step == run.start:
            call.state.calls_at_start[call.denoiser] = call.branch + 1
            if guidance.mode == "batched" and call.branch == 0 and not repeats(x, guidance.branches):
                raise ScheduleMismatch(
                    f"the schedule was fitted with guidance: {guidance.branches} branches in one batch. This run's "
                    "batch does not repeat its samples so; guidance is off or has another form. Turn guidance on as it "
                    "was, or fit a schedule for this setting."
                )
            if guidance.mode == "none" and host.batches_guidance(self.host.pipe) and repeats(x, 2):
                raise ScheduleMismatch(
                    "the schedule was fitted without guidance; this run is guided, with both branches in one batch. "
                    "Turn guidance off as it was, or fit a schedule for this setting."
                )
        elif call.branch == 0 and call.step == run.start + 1:
            expected = guidance.branches if guidance.mode == "separate" else 1
            seen = call.state.calls_at_start.get(call.denoiser, expected)
            if seen != expected:
                raise ScheduleMismatch(
                    f"the schedule was fitted for {expected} calls of {call.denoiser!r} at each step "
                    f"(guidance {guidance.mode!r}); this run makes {seen}. Set guidance as it was, or fit a schedule "
                    "for this setting."
                )


def _tensors(main: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a forward's main input."""
    return Output.of(args[0] if args else kwargs.get(main)).tensors


def _patched(schedule: CacheSchedule, denoiser: str) -> tuple[str, ...]:
    """The sites of ``denoiser`` that get a layer. The root always does: it says when a forward begins."""
    plan = schedule.denoisers.get(denoiser)
    return ("model", *(site for site in plan.sites if site != "model")) if plan else ("model",)
