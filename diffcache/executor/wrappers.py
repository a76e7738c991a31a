"""The functions that are layered on a denoiser and its parts: each finds out which forward it serves, then decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from diffcache import host
from diffcache.errors import ScheduleMismatch
from diffcache.executor.checks import check_guidance
from diffcache.executor.criteria import Where
from diffcache.executor.doubts import follow
from diffcache.executor.pairing import reader
from diffcache.executor.site import visit
from diffcache.executor.stacks import Place, run_block
from diffcache.executor.state import Call, Forward
from diffcache.executor.store import Output
from diffcache.host import LoopRun, LoopWatcher
from diffcache.patch import Around


class Arounds:
    """Makes the layers of one pipeline's denoisers.

    watched  says where the pipeline's loop is; each of its runs holds the state with the schedule
    misfit   called with a run that turns out not to fit its schedule, and the reason: gives the run a state in which
             everything is computed, or raises
    """

    def __init__(self, watched: LoopWatcher, misfit: Callable[[LoopRun, ScheduleMismatch], None]) -> None:
        self.host = watched
        self._misfit = misfit
        self._current = threading.local()

    def of(
        self, name: str, site: str, modules: tuple[nn.Module, ...], where: Where | None = None
    ) -> Iterator[tuple[nn.Module, Around]]:
        """What to layer on the modules of one site. ``where``: where in its first block a criterion decides."""
        unlike = len({type(module) for module in modules}) > 1
        for i, module in enumerate(modules):
            if site == "model":
                yield module, self._root(name, module)
            elif site.startswith("stack:"):
                place = Place(module is modules[0], module is modules[-1], where, i if unlike else None)
                yield module, self._block(name, site, module, place)
            else:
                yield module, self._single(name, site, module)

    def hears(self, name: str) -> Around:
        """What to layer on the normalisation whose output decides."""

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            call: Call | None = getattr(self._current, "call", None)
            if call is not None and call.denoiser == name and call.heard is not None:
                heard, call.heard = call.heard, None
                heard(Output.of(value).tensors[:1])
            return value

        return around

    def _root(self, name: str, module: nn.Module) -> Around:
        read, time_of, conditions_of = reader(module), host.time_of(module), host.conditions_of(module)

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = self.host.forward(name, time_of(args, kwargs), lambda: conditions_of(args, kwargs))
            if found is None:  # somebody else's call, or the user's own
                return inner(*args, **kwargs)
            run, forward = found
            inputs = read(args, kwargs)
            batch = len(inputs.main) if len(inputs.main) != 1 else len(inputs.main[0])
            doubt = follow(run, name, forward)
            watch = run.state.watch(name, forward.branch)
            call = Call(run.state, name, forward.step, forward.branch, batch, watch, doubt, forward.unsure)
            try:
                check_guidance(self.host.pipe, run, call, inputs.main, lambda why: self._misfit(run, why))
            except ScheduleMismatch as why:
                self._misfit(run, why)
                call = Call(run.state, name, forward.step, forward.branch, batch)
            if call.watch is not None and call.watch.at_the_root:
                call.decide(inputs.main)

            def compute() -> Any:
                value = inner(*args, **kwargs)
                if call.watch is not None and not call.predicts:
                    call.watch.answered(inputs.main, Output.of(value).tensors)
                return value

            outer = getattr(self._current, "call", None)
            self._current.call = call
            try:
                if (name, "model") in call.state.programs:
                    return visit(call, "model", inputs, compute)
                call.state.count(name, "model", call.branch).compute()
                return compute()
            finally:
                self._current.call = outer
                skipped = call.predicted / max(call.asked, 1)
                call.state.forwards.append(Forward(name, forward.step, forward.branch, skipped))
                if call.state.unplaced and call.state.look_for not in run.waiting:
                    run.waiting.append(call.state.look_for)

        return around

    def _single(self, name: str, site: str, module: nn.Module) -> Around:
        read = reader(module)

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            return visit(call, site, read(args, kwargs), lambda: inner(*args, **kwargs))

        return around

    def _block(self, name: str, site: str, module: nn.Module, place: Place) -> Around:
        read = reader(module)

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            return run_block(call, site, place, read(args, kwargs), lambda: inner(*args, **kwargs))

        return around

    def _call_of(self, name: str, site: str) -> Call | None:
        call: Call | None = getattr(self._current, "call", None)
        return call if call and call.denoiser == name and (name, site) in call.state.programs else None
