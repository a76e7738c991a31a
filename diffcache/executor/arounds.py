"""The functions that are layered on a denoiser and its parts: each finds out which forward it serves, then decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffcache import host
from diffcache.executor.checks import check_guidance
from diffcache.executor.decide import guess, keep, visit
from diffcache.executor.state import Call, Stack
from diffcache.host import Host
from diffcache.patch import Around
from diffcache.store import Output


class Arounds:
    """Makes the layers of one pipeline's denoisers; ``watched`` knows where its loop is, a run what its schedule is."""

    def __init__(self, watched: Host) -> None:
        self.host = watched
        self._current = threading.local()

    def of(self, name: str, site: str, modules: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, Around]]:
        """What to layer on the modules of one site."""
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
            check_guidance(self.host.pipe, run, call, x)
            outer = getattr(self._current, "call", None)
            self._current.call = call
            try:
                if (name, "model") in call.state.programs:
                    return visit(call, "model", x, lambda: inner(*args, **kwargs))
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
            return visit(call, site, _tensors(main, args, kwargs), lambda: inner(*args, **kwargs))

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
                call.stacks[site] = Stack(x, guess(call, site, x))
            stack = call.stacks[site]
            if stack.guess is None:
                value = inner(*args, **kwargs)
                if last:
                    keep(call, site, stack.x, value)
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


def _tensors(main: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a forward's main input."""
    return Output.of(args[0] if args else kwargs.get(main)).tensors
