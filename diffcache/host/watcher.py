"""Watch the sampling loop of a host: where it begins, goes on and ends."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffcache.host import branches
from diffcache.host.branches import Branches, Conditions, Forward
from diffcache.host.dispatch import denoisers
from diffcache.host.inspection import host_name, unwrapped
from diffcache.host.kinds import kind_of
from diffcache.host.loop_run import LoopRun, position, start_of
from diffcache.host.own_loops import MARK, Clock
from diffcache.patch import Wrapper, layer

NO_LOOP, OVERLAP = "no-loop", "calls-overlap"  # kinds of ``missed`` events
ONE_CALL = (
    "this {} is called from several threads at once. The calls step one noise scheduler: their results are suspect, "
    "and steps may have been computed in full. Make one call at a time, with a lock around the pipeline, or give each "
    "thread a pipeline with another noise scheduler."
)


class LoopObserver:
    """Receives the events of a sampling loop. Every method does nothing unless a subclass overrides it.

    The events come in the thread that runs the loop. An exception in one of them reaches the caller of the host.
    """

    def loop_awaited(self) -> None:
        """Note that a loop was announced.

        ``loop_began`` comes with its first forward. Loops of pipelines are not announced.
        """

    def loop_began(self, run: LoopRun) -> None:
        """Note that a loop begins. No forward of it has run."""

    def loop_went_back(self, run: LoopRun) -> None:
        """Note that the loop enters an earlier step. Some pipelines run the loop once for each chunk."""

    def loop_ended(self, run: LoopRun) -> None:
        """Note that the loop is over. An exception may have ended it."""

    def missed(self, kind: str, why: str) -> None:
        """Note that a call of the host or of a denoiser belongs to no loop, or that two calls overlap."""


class LoopWatcher:
    """Watches the sampling loop of one host, and passes its events to an observer.

    Args:
        pipe: The host: a pipeline, a policy's loop or a loop.
        observer: Receives the events.
    """

    def __init__(self, pipe: Any, observer: LoopObserver) -> None:
        # Weak, because wrappers on a pipeline must not keep it alive once its last user drops it.
        self._pipe = weakref.ref(pipe)
        self.observer = observer
        self._watch = kind_of(pipe).watch(self)
        self._running: weakref.WeakKeyDictionary[threading.Thread, LoopRun] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # guards ``_running``
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # threads in which a loop was seen
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()  # pipelines that share a denoiser, and were reported
        self._local = threading.local()
        self._undo = contextlib.ExitStack()

    @property
    def pipe(self) -> Any:
        """Return the host, or None once it is gone."""
        return self._pipe()

    @property
    def run(self) -> LoopRun | None:
        """Return the loop that this thread is in, or None."""
        return getattr(self._local, "run", None)

    def attach(self) -> None:
        """Wrap the methods that show the loop."""
        for name, module in denoisers(self.pipe).items():
            if hasattr(module, "cache_context"):
                self._undo.callback(layer(unwrapped(module), "cache_context", self._context(name), copies=True))
        for undo in self._watch.attach():
            self._undo.callback(undo)

    def detach(self) -> None:
        """End the loop in progress and undo every wrapper."""
        self.close()
        self._watch.detach()
        self._undo.close()

    def forward(
        self, denoiser: str, time: Any, given: Callable[[], Conditions] = dict
    ) -> tuple[LoopRun, Forward] | None:
        """Return the loop, and the place in it, of a forward that is beginning; None outside the host's loop.

        If the noise scheduler was given another grid for a separate stage, one loop ends here and the next begins.

        Args:
            denoiser: The name of the component.
            time: The time that the component is given.
            given: Returns the conditioning. It is called only if the branch has no name.
        """
        run = self.entered()
        if run is None:
            self._watch.outside()
            return None
        if self._set_up_anew(run, time):
            self.observer.loop_ended(run)
            run.begin_anew(run.scheduler.timesteps, start_of(run.scheduler, None))
            self.observer.loop_began(run)
        return run, run.forward(denoiser, time, self.branch(denoiser), given)

    def branch(self, denoiser: str) -> str:
        """Return the name of the branch that this thread's forwards of ``denoiser`` belong to, or ""."""
        contexts = getattr(self._local, "contexts", {}).get(denoiser)
        return contexts[-1] if contexts else branches.named()

    def entered(self) -> LoopRun | None:
        """Return the loop of a forward that is beginning. The forward may be the first of a loop."""
        if self.run is None:
            self._watch.enter()
        return self.run

    def open(self, scheduler: Any, start: int) -> LoopRun:
        """Begin a loop, and end the previous one if it is still open.

        Args:
            scheduler: The noise scheduler that the loop steps, or a ``Clock``.
            start: The first iteration that the loop enters.
        """
        self.close()
        run = LoopRun(scheduler, scheduler.timesteps, start, start)
        if isinstance(scheduler, Clock):
            run.forwards = scheduler.branches
            run.assigned = Branches(scheduler.branches if scheduler.branches > 1 else 0)
        run.went_back = self.observer.loop_went_back
        thread = threading.current_thread()
        with self._lock:
            self._running[thread] = run  # before the check: of two threads that begin at once, one sees the other
        undo, began = contextlib.ExitStack(), False
        try:
            self._check_overlap(scheduler)
            self.observer.loop_began(run)
            began = True
            for one in self._watch.opened(run):
                undo.callback(one)
        except BaseException:
            self._forget(thread)
            undo.close()
            if began:
                self.observer.loop_ended(run)
            raise
        run.undo = undo.close
        self._local.run = run
        self._threads.add(thread)
        return run

    def close(self, run: LoopRun | None = None) -> None:
        """End ``run``, or the loop that this thread is in. A loop that is over stays over."""
        current = self.run
        if current is None or (run is not None and run is not current):
            return
        self._local.run = None
        self._forget(threading.current_thread())
        current.undo()
        self.observer.loop_ended(current)
        if current.idle:
            self.no_loop()

    def step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the ``step`` of a noise scheduler: it ends a step of the loop."""
        run = self.run
        if run is not None and run.waiting:
            waiting, run.waiting = run.waiting, []
            sample = _sample(run.scheduler, args, kwargs)
            for seen in waiting if isinstance(sample, Tensor) else ():
                seen(sample)
        result = inner(*args, **kwargs)
        run = self.run
        if run is not None:
            run.step_done(args[1] if len(args) > 1 else kwargs.get("timestep"))
        return result

    def missed(self, kind: str, why: str) -> None:
        """Report a call that belongs to no loop.

        Args:
            kind: ``NO_LOOP`` or ``OVERLAP``.
            why: The message for the user.
        """
        self.observer.missed(kind, why)

    def no_loop(self) -> None:
        """Report that the host was called and no loop of it was seen."""
        name = host_name(self.pipe)
        if any(thread is not threading.current_thread() for thread in self._threads):
            self.missed(OVERLAP, ONE_CALL.format(name))
            return
        self.missed(
            NO_LOOP,
            f"{name} was called and its sampling loop was not seen: nothing was skipped. Its loop does not use "
            "pipe.progress_bar or pipe.scheduler, or runs in another pipeline inside: accelerate that.",
        )

    def called_by(self, other: Any) -> None:
        """Report once that another pipeline shares a denoiser of this one and has no schedule."""
        if other is None or other is self.pipe or MARK in other.__dict__ or other in self._others:
            return
        self._others.add(other)
        name = host_name(other)
        self.missed(
            NO_LOOP,
            f"a {name} that shares components with this accelerated {host_name(self.pipe)} was called: nothing was "
            f"skipped, because it has no schedule. Call diffcache.accelerate on that {name} as well.",
        )

    def _set_up_anew(self, run: LoopRun, time: Any) -> bool:
        """Return whether the noise scheduler was given another grid within the loop, for a separate stage."""
        grid = run.scheduler.timesteps
        if grid is run.timesteps or grid is run.saved:
            return False
        same = grid.shape == run.timesteps.shape and torch.equal(grid.to(run.timesteps), run.timesteps)
        on_old, on_new = (position(time, timesteps) is not None for timesteps in (run.timesteps, grid))
        if not same or on_new or (run.index >= run.steps and not on_old):
            return True
        run.saved = grid
        return False

    def _check_overlap(self, scheduler: Any) -> None:
        """Report another thread that is in a loop with the same noise scheduler."""
        with self._lock:
            running = list(self._running.items())
        for thread, run in running:
            if thread is not threading.current_thread() and thread.is_alive() and run.scheduler is scheduler:
                self.missed(OVERLAP, ONE_CALL.format(host_name(self.pipe)))

    def _forget(self, thread: threading.Thread) -> None:
        """Remove the loop of a thread from ``_running``."""
        with self._lock:
            self._running.pop(thread, None)

    def _context(self, denoiser: str) -> Wrapper:
        """Return the wrapper of a denoiser's ``cache_context``. Its argument names a branch."""

        @contextlib.contextmanager
        def entered(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
            name = args[0] if args else kwargs.get("name")
            contexts = self._local.__dict__.setdefault("contexts", {}).setdefault(denoiser, [])
            contexts.append(name if isinstance(name, str) else "")
            try:
                with inner(*args, **kwargs) as value:
                    yield value
            finally:
                contexts.pop()

        return entered


def _sample(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the argument ``sample`` of a call of ``scheduler.step``; None if it is not known."""
    try:
        return inspect.signature(scheduler.step).bind(*args, **kwargs).arguments.get("sample")  # through all layers
    except TypeError:
        return None
