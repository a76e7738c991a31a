"""Loops written by the user: ``with diffcache.trajectory(network, timesteps)`` shows where they begin and end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffcache.errors import BadOption
from diffcache.host.arguments import Parameters, parameters_of, with_optional
from diffcache.host.call_values import brings_noise, check_values
from diffcache.host.forwards import demand_not_compiling
from diffcache.host.inspection import class_name
from diffcache.host.kinds._kind import Kind, LoopWatch, unsupported
from diffcache.host.own_loops import Clock, Loop, registered_loop
from diffcache.host.traits import Traits
from diffcache.host.watcher import NO_LOOP
from diffcache.patch import Undo, layer, spot

if TYPE_CHECKING:
    from diffcache.host.watcher import LoopWatcher

ASKED = ("predict_action", "predict_action_chunk", "select_action")  # methods of policies, which are no networks


class OwnLoop(Kind):
    """A sampling loop around an ``nn.Module``."""

    traits = Traits(returns="state", metrics=("latent", "state"), writes_arguments=True)
    allowed = "the network of a loop of your own, an nn.Module, with diffcache.trajectory around the loop"
    example = """\
calls = [{"seed": seed, **arguments}
         for seed in range(16)]"""
    fallback = True

    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` is a :class:`diffcache.Loop`, or a network that is not a policy."""
        return isinstance(value, Loop) or (
            isinstance(value, nn.Module) and not any(hasattr(value, name) for name in (*ASKED, "components"))
        )

    def adopt(self, value: Any, *, bare: bool = False) -> Any:
        """Return the loop. A network is a host only with ``bare``, as its registered loop."""
        if isinstance(value, Loop):
            return value.registered if bare else value
        return registered_loop(value) if bare else value

    def denoisers(self, host: Any) -> dict[str, nn.Module]:
        """Return the network of the loop."""
        loop = _loop(host)
        return {loop.name: loop.network}

    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        """Return a watch on ``trajectory``."""
        return OwnLoopWatch(watcher)

    def arguments(self, host: Any) -> Parameters | None:
        """Return the parameters of the function that runs the loop, and ``seed``."""
        sampler = _loop(host).sampler
        return None if sampler is None else with_optional(parameters_of(sampler), "seed")

    def check_callable(self, host: Any) -> None:
        """Raise BadOption if the loop was made without the function that runs it."""
        if _loop(host).sampler is None:
            raise BadOption("sample", None, "a function that runs the loop: diffcache.Loop(network, sample)")

    def check_values(self, call: Mapping[str, Any], where: str) -> None:
        """Check the arguments with names that pipelines use. The call needs no number of steps."""
        check_values(call, where, steps_optional=True)

    def noise_of(self, host: Any, seed: int) -> Mapping[str, Any]:
        """Return the argument ``seed``, which every loop takes."""
        return {"seed": seed}

    def repeats(self, call: Mapping[str, Any]) -> bool:
        """Return whether the call brings a seed, its noise, or a generator for it."""
        return brings_noise(call)

    def noise_scheduler(self, host: Any) -> Any:
        """Return ``host.scheduler``."""
        return host.scheduler

    def parts(self, host: Any) -> Mapping[str, Any]:
        """Return the components."""
        found: Mapping[str, Any] = host.components
        return found

    def settings(self, host: Any) -> Mapping[str, Any] | None:
        """Return the function that runs the loop."""
        return {"sample": host.sampler}


def _loop(host: Any) -> Loop:
    """Return the host, or raise UnsupportedModel if it is a network without its loop."""
    if not isinstance(host, Loop):
        raise unsupported(host)
    return host


class OwnLoopWatch(LoopWatch):
    """Follows ``Loop.begin`` and ``Loop.end``.

    The noise scheduler may still be given its timesteps after ``begin``. The watch therefore waits for the first
    forward before it opens the loop.
    """

    def __init__(self, watcher: LoopWatcher) -> None:
        super().__init__(watcher)
        self._early: list[contextlib.ExitStack] = []  # wrappers of all threads

    def attach(self) -> Iterator[Undo]:
        """Wrap the methods that the loop calls when it begins and ends."""
        yield layer(self.host.registered, "begin", self._begun, copies=True)
        yield layer(self.host.registered, "end", self._ended, copies=True)

    def detach(self) -> None:
        """Undo the wrappers of runs whose first forward has not come."""
        while self._early:
            self._early.pop().close()

    def enter(self) -> None:
        """Open the loop whose first forward is beginning."""
        if not getattr(self.local, "awaited", False):
            return
        self.local.awaited = False
        demand_not_compiling(self.host)
        scheduler = self.host.scheduler
        if isinstance(scheduler, Clock):  # each run has a clock, because threads may run several
            scheduler = Clock(*self.local.grid, config=scheduler.config)
        self.watcher.open(scheduler, 0)

    def outside(self) -> None:
        """Report a forward outside of ``trajectory``, unless the network is being trained."""
        network = self.host.network
        if network.training and torch.is_grad_enabled():
            return
        self.watcher.missed(
            NO_LOOP,
            f"{class_name(network)} was called outside of diffcache.trajectory: nothing was skipped. Put "
            "`with diffcache.trajectory(network, timesteps):` around the loop, or restore it. Of a pipeline, "
            "accelerate the pipeline.",
        )

    def _begun(self, inner: Callable[..., Any], timesteps: Tensor | None = None, branches: int = 1) -> None:
        """Wrap ``Loop.begin``: wait for the first forward."""
        self.watcher.close()
        self._leave()
        inner(timesteps, branches)
        self.watcher.observer.loop_awaited()
        early = contextlib.ExitStack()
        self.local.awaited, self.local.grid, self.local.early = True, (timesteps, branches), early
        self._early.append(early)
        # An observer that needs only the events of the loop has not wrapped the network.
        early.callback(layer(*spot(self.host.network), self._first, copies=True))
        scheduler = self.host.scheduler
        if not isinstance(scheduler, Clock):
            # In ``scheduler.step(network(x, t), t, x)`` the step is looked up before the forward.
            early.callback(layer(scheduler, "step", self.watcher.step, copies=True))

    def _ended(self, inner: Callable[..., Any], result: Any = None, broken: bool = False) -> None:
        """Wrap ``Loop.end``: close the loop, and report one without a forward."""
        unseen, self.local.awaited = getattr(self.local, "awaited", False), False
        run = self.watcher.run
        if run is not None:
            run.result, run.short = result, not broken and not run.whole
            run.cut = 0 if broken else run.cut
        self.watcher.close()
        self._leave()
        inner(result, broken)
        if unseen and not broken:
            self.watcher.missed(
                NO_LOOP,
                f"the loop of this {class_name(self.host.network)} ended without a forward of it: nothing was skipped. "
                "Give diffcache.trajectory the network that the loop calls, and accelerate that one.",
            )

    def _leave(self) -> None:
        """Undo the wrappers of one run in this thread."""
        early, self.local.early = getattr(self.local, "early", None), None
        if early in self._early:
            self._early.remove(early)
            early.close()

    def _first(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the network until its first forward, which opens the loop."""
        self.watcher.entered()
        return inner(*args, **kwargs)


KIND = OwnLoop()
