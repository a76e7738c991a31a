"""Carries out a schedule, or a rule, on one pipeline. Knows when, never the name of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffcache import host
from diffcache.errors import ScheduleMismatch
from diffcache.executor.arounds import Arounds
from diffcache.executor.checks import Sites, check_in_parts, check_pipeline, check_run
from diffcache.executor.grid import move
from diffcache.executor.placing import place
from diffcache.executor.program import compile_schedule
from diffcache.executor.state import Lesson, State
from diffcache.kernels.library import Backend, check_backend
from diffcache.patch import weak
from diffcache.schedule import CacheSchedule
from diffcache.schedulers import Grid, Rule


class FailedOpen(RuntimeWarning):
    """A step that the schedule wanted to predict was computed in full instead."""


def scheduled(rule: Rule, grid: Grid, sites: Mapping[str, tuple[str, ...]], store: str | None = None) -> CacheSchedule:
    """The rule's schedule on this grid, outputs kept in this format."""
    schedule = rule.schedule(grid, sites)
    return schedule if store is None else schedule.stored(store)


class Executor:
    """Carries out a schedule on one pipeline. ``attach`` and ``detach`` leave no trace behind.

    They hold it, through its layers; it holds neither the pipeline nor a module.

    lesson   see State
    store    format in which all sites' outputs are kept; None: as the schedule says
    backend  what works on tensors that are kept in fewer bytes
    """

    def __init__(
        self,
        pipe: Any,
        source: CacheSchedule | Rule,
        sites: Sites,
        *,
        strict: bool = True,
        lesson: Lesson | None = None,
        store: str | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_backend(backend)
        self.source = source if store is None or isinstance(source, Rule) else source.stored(store)
        self.store, self.backend = store, backend
        self.lesson = lesson
        self.strict = strict
        self.sites = {name: tuple(names) for name, names in sites.items()}
        self.host = host.Host(pipe, self._begin, self._end, self._missed)
        self.last: State | None = None
        self.runs = 0
        self._warned: set[str] = set()
        if isinstance(self.source, CacheSchedule):
            check_pipeline(pipe, self.source, sites, strict=strict)
            schedule = self.source
            self._programs = compile_schedule(schedule)
        else:  # on any grid: what the rule cannot do is said now, and its sites do not depend on the grid
            schedule = scheduled(self.source, Grid(np.linspace(1.0, 0.1, 10)), self.sites, store)
        check_in_parts(pipe, schedule)
        self._patches = place(Arounds(self.host), schedule, sites)
        self._roots = {name: weak(modules["model"][0]) for name, modules in sites.items()}

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

    def _begin(self, run: host.Run) -> None:
        self._check_denoisers()
        host.demand_nothing_read_inside(self.host.pipe)
        if isinstance(self.source, Rule):
            timesteps = run.timesteps.detach().cpu().double().numpy()
            schedule = scheduled(self.source, Grid(timesteps, run.start), self.sites, self.store)
            programs = compile_schedule(schedule)
        else:
            schedule, programs = self.source, self._programs
            check_run(self.host.pipe, run, schedule, strict=self.strict)
        check_in_parts(self.host.pipe, schedule)
        for patch in self._patches:
            patch.put()
        levels_back = move(self.host.pipe, run, schedule)  # last: nothing after it can fail
        together = bool(host.in_parts(self.host.pipe))
        self.last = run.state = state = State(
            schedule, programs, together, levels_back=levels_back, lesson=self.lesson, backend=self.backend
        )
        run.again = state.forget
        self.runs += 1

    def _end(self, run: host.Run) -> None:
        state: State = run.state
        state.levels_back()
        state.levels_back = lambda: None  # it holds the noise scheduler
        state.forget()
        if run.short:
            self._warn(
                "short loop",
                f"the loop ended in step {run.index + 1} of {run.steps}: its network was called less often than was "
                "said, and steps may have been taken for others. Give trajectory one timestep for every evaluation.",
            )
        if state.suspects and not bool(torch.stack([s.cpu() for s in state.suspects]).all()):
            self._warn(
                "non-finite output",
                "the denoiser returned NaN or Inf and predictions were made from it; the result is suspect",
            )
        state.suspects.clear()
        for reason, times in state.failures().items():
            first, *more = sorted(times)
            places = first + (f" and {len(more)} more sites" if more else "")
            self._warn(reason, f"{places}: {sum(times.values())} predictions were computed in full instead: {reason}")

    def _missed(self) -> None:
        if isinstance(self.host.pipe, host.Loop):
            self._check_denoisers()
            self._warn(
                "no loop",
                f"{host.class_name(self.host.pipe.network)} was called outside of diffcache.trajectory: nothing was "
                "skipped. Put `with diffcache.trajectory(network, timesteps):` around the loop, or restore it. Of a "
                "pipeline, accelerate the pipeline.",
            )
            return
        self._warn(
            "no loop",
            f"{type(self.host.pipe).__name__} was called and no sampling loop of its own was seen: nothing was "
            "skipped. Its loop does not use pipe.progress_bar or pipe.scheduler, or runs in another pipeline inside: "
            "accelerate that.",
        )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, FailedOpen, stacklevel=2)

    def _check_denoisers(self) -> None:
        pipe = self.host.pipe
        for name, root in self._roots.items():
            here = getattr(pipe, name, None)
            if here is not None and here is not root():
                raise ScheduleMismatch(
                    f"{name!r} of this {type(pipe).__name__} is another object than when it was accelerated (now: "
                    f"{type(here).__name__}); it would run without the cache. Call diffcache.restore(pipe), then "
                    "accelerate it as it is: compile first, accelerate last."
                )
