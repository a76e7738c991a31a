"""One decision per site and step: compute, or predict from what was kept. Knows when, never the name of a model."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcache import host, store
from diffcache.errors import ScheduleMismatch
from diffcache.executor.checks import Sites, check_pipeline, check_run
from diffcache.executor.guess import combine, problem, repeats
from diffcache.executor.program import Program, compile_plan
from diffcache.patch import layer
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


@dataclass
class Call:
    """One forward of a denoiser: which step and branch it serves. ``stacks``: predictions already made in it."""

    state: State
    denoiser: str
    step: int
    branch: int
    stacks: dict[str, tuple[Any] | None] = field(default_factory=dict)


class Executor:
    """Carries out a schedule on one pipeline. ``attach`` and ``detach`` leave no trace behind."""

    def __init__(self, pipe: Any, source: CacheSchedule | Rule, sites: Sites, *, strict: bool = True) -> None:
        self.source = source
        self.strict = strict
        self.sites = sites
        self.host = host.Host(pipe, self._begin, self._end)
        self.last: State | None = None
        self.runs = 0
        self._denoisers = {name: modules["model"][0] for name, modules in sites.items()}
        self._input = {id(m): first_parameter(m) for s in sites.values() for modules in s.values() for m in modules}
        self._current = threading.local()
        self._undo = contextlib.ExitStack()
        self._warned: set[str] = set()
        if isinstance(source, CacheSchedule):
            check_pipeline(pipe, source, sites, strict=strict)

    def attach(self) -> None:
        with contextlib.ExitStack() as undo:
            for name, module in self._denoisers.items():
                undo.callback(layer(module, "forward", self._root(name)))
                for site in self._inner_sites(name):
                    for around, part in self._arounds(site, self.sites[name][site]):
                        undo.callback(layer(part, "forward", around))
            undo.callback(self.host.detach)
            self.host.attach()
            self._undo = undo.pop_all()

    def detach(self) -> None:
        self._undo.close()

    def _inner_sites(self, denoiser: str) -> tuple[str, ...]:
        if isinstance(self.source, Rule):
            wanted = [s for s in self.sites[denoiser] if s.partition(":")[0] == self.source.granularity]
        else:
            plan = self.source.denoisers.get(denoiser)
            wanted = list(plan.sites) if plan else []
        return tuple(site for site in wanted if site != "model")

    # ------------------------------------------------------------------ runs

    def _begin(self, run: host.Run) -> None:
        if isinstance(self.source, Rule):
            timesteps = run.timesteps.detach().double().cpu().numpy()
            names = {denoiser: tuple(sites) for denoiser, sites in self.sites.items()}
            schedule = self.source.schedule(Grid(timesteps, run.start), names)
        else:
            schedule = self.source
            check_run(run, schedule, strict=self.strict)
        programs = {
            (denoiser, site): compile_plan(plan)
            for denoiser, p in schedule.denoisers.items()
            for site, plan in p.sites.items()
        }
        self.last = run.state = State(schedule, programs)
        self.runs += 1

    def _end(self, run: host.Run) -> None:
        state: State = run.state
        state.store.clear()
        if state.suspects and not bool(torch.stack([s.cpu() for s in state.suspects]).all()):
            self._warn("non-finite output", "the denoiser returned NaN or Inf and predictions were made from it; the result is suspect")
        state.suspects.clear()
        for site, reasons in self._failures(state).items():
            for reason, times in reasons.items():
                self._warn(f"{site} {reason}", f"{site}: {times} predictions were computed in full instead: {reason}")

    @staticmethod
    def _failures(state: State) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {}
        for (denoiser, site, _), counts in state.counts.items():
            if counts.failed_open:
                found.setdefault(f"{denoiser}/{site}", Counter()).update(counts.failed_open)
        return found

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, FailedOpen, stacklevel=2)

    # ----------------------------------------------------------------- sites

    def _root(self, name: str) -> Callable[..., Any]:
        module = self._denoisers[name]

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = self.host.run
            if run is None:  # outside this pipeline's loop: somebody else's call, or the user's own
                return inner(*args, **kwargs)
            call = Call(run.state, name, run.index, run.next_call(module))
            x = self._x(module, args, kwargs)
            self._check_guidance(run, call, x)
            outer = getattr(self._current, "call", None)
            self._current.call = call
            try:
                if (name, "model") not in call.state.programs:
                    return inner(*args, **kwargs)
                return self._visit(call, "model", x, lambda: inner(*args, **kwargs))
            finally:
                self._current.call = outer

        return around

    def _arounds(self, site: str, modules: tuple[nn.Module, ...]) -> list[tuple[Callable[..., Any], nn.Module]]:
        if not site.startswith("stack:"):
            return [(self._single(site, modules[0]), modules[0])]
        return [(self._part_of_stack(site, modules, i), part) for i, part in enumerate(modules)]

    def _single(self, site: str, module: nn.Module) -> Callable[..., Any]:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(site)
            if call is None:
                return inner(*args, **kwargs)
            return self._visit(call, site, self._x(module, args, kwargs), lambda: inner(*args, **kwargs))

        return around

    def _part_of_stack(self, site: str, modules: tuple[nn.Module, ...], i: int) -> Callable[..., Any]:
        """At a predicted step every block hands on the stack's predicted output; what the host adds between blocks
        (ControlNet residuals) is discarded with the inputs it was added to, as the prediction already holds it."""
        module = modules[i]

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(site)
            if call is None:
                return inner(*args, **kwargs)
            if i == 0:
                x = self._x(module, args, kwargs)
                call.stacks[site] = self._guess(call, site, x)
                call.stacks[site + " x"] = (x,)
            guess = call.stacks[site]
            if guess is not None:
                return guess[0]
            value = inner(*args, **kwargs)
            if i == len(modules) - 1:
                self._keep(call, site, call.stacks[site + " x"][0], value)  # type: ignore[index]
            return value

        return around

    def _call_of(self, site: str) -> Call | None:
        call: Call | None = getattr(self._current, "call", None)
        return call if call is not None and (call.denoiser, site) in call.state.programs else None

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
        obstacle = problem(anchors, x)
        if obstacle:
            counts.failed_open[obstacle] += 1
            return None
        guidance = call.state.schedule.guidance
        batched = guidance is not None and guidance.mode == "batched"
        guess = combine([a for a in anchors if a is not None], terms, x, None if batched else call.branch)
        counts.predicted += 1
        for step in program.drops[call.step]:
            call.state.store.drop(key, step)
        return (guess,)

    def _keep(self, call: Call, site: str, x: tuple[Tensor, ...], value: Any) -> None:
        program = call.state.programs[call.denoiser, site]
        if call.step not in program.keeps:
            return
        output = Output.of(value)
        finite = store.all_finite(output.tensors)
        if finite is not None and finite.device.type != "cpu":
            call.state.suspects.append(finite)  # read when the run is over: no synchronisation inside the loop
        elif finite is not None and not finite:
            return
        kept_x = tuple(t.detach().clone() for t in x) if call.step in program.keeps_x else ()
        key = (call.denoiser, site, call.branch)
        call.state.store.put(key, call.step, Anchor(output.kept(), kept_x, store.signature(x)))

    def _x(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return Output.of(args[0] if args else kwargs.get(self._input[id(module)])).tensors

    def _check_guidance(self, run: host.Run, call: Call, x: tuple[Tensor, ...]) -> None:
        """In a run's first two steps: are there as many branches as the coefficients were fitted for?"""
        guidance = call.state.schedule.guidance
        if guidance is None:
            return
        if call.step == run.start:
            call.state.calls_at_start[call.denoiser] = call.branch + 1
            if guidance.mode == "batched" and call.branch == 0 and not repeats(x, guidance.branches):
                raise ScheduleMismatch(
                    f"the schedule was fitted with guidance: {guidance.branches} branches in one batch. This run's batch "
                    "does not repeat its samples so; guidance is off or has another form. Turn guidance on as it was, "
                    "or fit a schedule for this setting."
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


def first_parameter(module: nn.Module) -> str:
    """Name of the main input of ``module.forward``."""
    return next(iter(inspect.signature(module.forward).parameters), "")
