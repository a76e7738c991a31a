"""The functions that are layered on a denoiser and on the modules of its sites."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from diffcache import host
from diffcache.errors import ScheduleMismatch
from diffcache.executor.checks import check_guidance
from diffcache.executor.doubts import check_forward
from diffcache.executor.pairing import reader
from diffcache.executor.site import run_site
from diffcache.executor.stacks import BlockPosition, run_block
from diffcache.executor.state import Call, Forward
from diffcache.executor.store import Output
from diffcache.host import LoopRun, LoopWatcher
from diffcache.patch import Wrapper


class Wrappers:
    """Makes the wrappers of the denoisers of one pipeline.

    Args:
        watcher: Follows the loop of the pipeline. Each of its runs holds a ``RunState``.
        on_mismatch: Called with a run that does not fit its schedule, and the reason. It gives the run a state in which
            everything is computed, or raises.
    """

    def __init__(self, watcher: LoopWatcher, on_mismatch: Callable[[LoopRun, ScheduleMismatch], None]) -> None:
        self.watcher = watcher
        self._on_mismatch = on_mismatch
        self._current = threading.local()

    def for_site(self, name: str, site: str, modules: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, Wrapper]]:
        """Yield the modules of a site, each with its wrapper.

        Args:
            name: The component name of the network.
            site: The name of the site.
            modules: The modules of the site.
        """
        unlike = len({type(module) for module in modules}) > 1
        for i, module in enumerate(modules):
            if site == "model":
                yield module, self._denoiser(name, module)
            elif site.startswith("stack:"):
                position = BlockPosition(module is modules[0], module is modules[-1], i if unlike else None)
                yield module, self._stack_block(name, site, module, position)
            else:
                yield module, self._module(name, site, module)

    def for_first_norm(self, name: str) -> Wrapper:
        """Return the wrapper of the normalisation whose output decides.

        Args:
            name: The component name of the network.
        """

        def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = inner(*args, **kwargs)
            call: Call | None = getattr(self._current, "call", None)
            if call is not None and call.denoiser == name and call.on_first_norm is not None:
                on_first_norm, call.on_first_norm = call.on_first_norm, None
                on_first_norm(Output.of(value).tensors[:1])
            return value

        return wrapper

    def _denoiser(self, name: str, module: nn.Module) -> Wrapper:
        """Return the wrapper of a network, which begins and ends a ``Call``."""
        read, time_of, conditions_of = reader(module), host.time_of(module), host.conditions_of(module)

        def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = self.watcher.forward(name, time_of(args, kwargs), lambda: conditions_of(args, kwargs))
            if found is None:  # a call outside the loop of this pipeline
                return inner(*args, **kwargs)
            run, forward = found
            inputs = read(args, kwargs)
            batch = len(inputs.main) if len(inputs.main) != 1 else len(inputs.main[0])
            doubt = check_forward(run, name, forward)
            decider = run.state.decider(name, forward.branch)
            call = Call(run.state, name, forward.step, forward.branch, batch, decider, doubt, forward.unsure)
            try:
                check_guidance(self.watcher.pipe, run, call, inputs.main, lambda why: self._on_mismatch(run, why))
            except ScheduleMismatch as why:
                self._on_mismatch(run, why)
                call = Call(run.state, name, forward.step, forward.branch, batch)
            if call.decider is not None and call.decider.decides_at_model:
                call.decide(inputs.main)

            def compute() -> Any:
                value = inner(*args, **kwargs)
                if call.decider is not None and not call.predicts:
                    call.decider.observe(inputs.main, Output.of(value).tensors)
                return value

            outer = getattr(self._current, "call", None)
            self._current.call = call
            try:
                if (name, "model") in call.state.programs:
                    return run_site(call, "model", inputs, compute)
                call.state.count(name, "model", call.branch).compute()
                return compute()
            finally:
                self._current.call = outer
                skipped = call.predicted / max(call.inner_calls, 1)
                call.state.forwards.append(Forward(name, forward.step, forward.branch, skipped))
                if call.state.unmatched_inputs and call.state.locate_sample not in run.waiting:
                    run.waiting.append(call.state.locate_sample)

        return wrapper

    def _module(self, name: str, site: str, module: nn.Module) -> Wrapper:
        """Return the wrapper of a block or a sublayer."""
        read = reader(module)

        def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            return run_site(call, site, read(args, kwargs), lambda: inner(*args, **kwargs))

        return wrapper

    def _stack_block(self, name: str, site: str, module: nn.Module, position: BlockPosition) -> Wrapper:
        """Return the wrapper of a block of a stack."""
        read = reader(module)

        def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call_of(name, site)
            if call is None:
                return inner(*args, **kwargs)
            return run_block(call, site, position, read(args, kwargs), lambda: inner(*args, **kwargs))

        return wrapper

    def _call_of(self, name: str, site: str) -> Call | None:
        """Return the forward that is running in this thread, or None if the run has no program for the site."""
        call: Call | None = getattr(self._current, "call", None)
        return call if call and call.denoiser == name and (name, site) in call.state.programs else None
