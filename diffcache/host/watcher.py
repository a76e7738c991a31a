"""Where the sampling loop of a pipeline begins and ends, and when it goes on."""

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
from diffcache.host.forwards import demand_not_compiling
from diffcache.host.frames import calling_pipeline
from diffcache.host.inspection import GUIDER_METHODS, class_name, denoisers, guiders, looping_blocks, unwrapped
from diffcache.host.loop_state import Run, position
from diffcache.host.own_loops import MARK, Clock, Loop
from diffcache.host.policies import PolicyLoop
from diffcache.patch import Wrapper, layer, spot

NO_LOOP, OVERLAP = "no-loop", "calls-overlap"  # kinds
ONE_CALL = (
    "this {} is called from several threads at once. The calls step one noise scheduler: their results are suspect, "
    "and steps may have been computed in full. Make one call at a time, with a lock around the pipeline, or give each "
    "thread a pipeline with another noise scheduler."
)


class Host:
    """Watches one pipeline.

    Args:
        pipe: The pipeline, policy loop or loop.
        begin: Called with the run when a sampling loop begins. What it raises reaches the caller of the pipeline.
        end: Called with the run when the loop is over.
        missed: Called with a kind and a text if a call of the pipeline or of a denoiser is served by no loop, or two
            calls overlap.
        awaited: Called before the first forward of a loop that is no pipeline's, where ``begin`` comes within it.
    """

    def __init__(
        self,
        pipe: Any,
        begin: Callable[[Run], None],
        end: Callable[[Run], None],
        missed: Callable[[str, str], None] = lambda kind, why: None,
        awaited: Callable[[], None] = lambda: None,
    ) -> None:
        # Weak: what hangs on a pipeline must not keep it alive once its last user drops it.
        self._pipe = weakref.ref(pipe)
        self._begin, self._end, self._missed, self._awaited = begin, end, missed, awaited
        self._running: weakref.WeakKeyDictionary[threading.Thread, Run] = weakref.WeakKeyDictionary()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # in which a loop was seen
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()  # pipelines that share a denoiser, and were told of
        self._open = threading.local()
        self._undo = contextlib.ExitStack()
        self._early: list[contextlib.ExitStack] = []  # of all threads

    @property
    def pipe(self) -> Any:
        return self._pipe()

    @property
    def run(self) -> Run | None:
        """The loop this thread is in, or None."""
        return getattr(self._open, "run", None)

    def forward(self, denoiser: str, time: Any, given: Callable[[], Conditions] = dict) -> tuple[Run, Forward] | None:
        """Return the loop, and the place in it, of a forward that is beginning; None outside this pipeline's loop.

        Args:
            denoiser: name of the component.
            time: what it is given as time.
            given: returns its conditioning; called only where its branch has no name.
        """
        run = self.entered()
        if run is None:
            self._stray()
            return None
        if self._set_up_anew(run, time):
            self._end(run)
            run.begin_anew(run.scheduler.timesteps, _start(run.scheduler, None))
            self._begin(run)
        return run, run.forward(denoiser, time, self.branch(denoiser), given)

    def branch(self, denoiser: str) -> str:
        """Return the name of the branch that this thread's forwards of ``denoiser`` serve, or ""."""
        contexts = getattr(self._open, "contexts", {}).get(denoiser)
        return contexts[-1] if contexts else branches.named()

    def _set_up_anew(self, run: Run, time: Any) -> bool:
        """Whether the noise scheduler was given another grid within the loop, for a stage of its own."""
        grid = run.scheduler.timesteps
        if grid is run.timesteps or grid is run.saved:
            return False
        same = grid.shape == run.timesteps.shape and torch.equal(grid.to(run.timesteps), run.timesteps)
        on_old, on_new = (position(time, timesteps) is not None for timesteps in (run.timesteps, grid))
        if not same or on_new or (run.index >= run.steps and not on_old):
            return True
        run.saved = grid
        return False

    def entered(self) -> Run | None:
        """The loop that a forward which is beginning belongs to. It may be the first of a loop that is awaited."""
        if self.run is None and getattr(self._open, "awaited", False):
            self._open.awaited = False
            demand_not_compiling(self.pipe)
            scheduler = self.pipe.scheduler
            if isinstance(scheduler, Clock):  # one for each run: threads may run several
                scheduler = Clock(*self._open.grid, config=scheduler.config)
            self.open(scheduler, 0)
        return self.run

    def _stray(self) -> None:
        """A forward outside of any loop: of training, of another pipeline, or of a loop without ``trajectory``."""
        pipe = self.pipe
        if not isinstance(pipe, Loop):
            self._called_by(calling_pipeline())
        elif not isinstance(pipe, PolicyLoop) and not (pipe.network.training and torch.is_grad_enabled()):
            self._missed(
                NO_LOOP,
                f"{class_name(pipe.network)} was called outside of diffcache.trajectory: nothing was skipped. Put "
                "`with diffcache.trajectory(network, timesteps):` around the loop, or restore it. Of a pipeline, "
                "accelerate the pipeline.",
            )

    def _called_by(self, other: Any) -> None:
        """Say once that another pipeline shares a denoiser of this one and has no schedule of its own."""
        if other is None or other is self.pipe or MARK in other.__dict__ or other in self._others:
            return
        self._others.add(other)
        name = type(other).__name__
        self._missed(
            NO_LOOP,
            f"a {name} that shares components with this accelerated {type(self.pipe).__name__} was called: nothing was "
            f"skipped, because it has no schedule. Call diffcache.accelerate on that {name} as well.",
        )

    def attach(self) -> None:
        for name, module in denoisers(self.pipe).items():
            if hasattr(module, "cache_context"):
                self._undo.callback(layer(unwrapped(module), "cache_context", self._context(name), copies=True))
        if isinstance(self.pipe, Loop):
            self._undo.callback(layer(self.pipe.told, "begin", self._begun, copies=True))
            self._undo.callback(layer(self.pipe.told, "end", self._ended, copies=True))
        if isinstance(self.pipe, PolicyLoop):
            self._undo.callback(layer(*self.pipe.runs, self._policy_runs, copies=True))
        if hasattr(self.pipe, "progress_bar"):
            self._undo.callback(layer(self.pipe, "progress_bar", self._progress_bar))
            self._undo.callback(layer(self.pipe, "maybe_free_model_hooks", self._last_call))
        for block in looping_blocks(self.pipe):  # two pipelines may share them
            self._undo.callback(layer(block, "progress_bar", self._progress_bar, copies=True))
            self._undo.callback(layer(block, "loop_step", self._loop_step, copies=True))

    def detach(self) -> None:
        self.close()
        while self._early:
            self._early.pop().close()
        self._undo.close()

    def open(self, scheduler: Any, start: int) -> Run:
        self.close()  # an interrupted run that nobody closed
        self._demand_one_call(scheduler)
        run = Run(scheduler, scheduler.timesteps, start, start)
        if isinstance(scheduler, Clock):
            run.forwards = scheduler.branches
            run.assigned = Branches(scheduler.branches if scheduler.branches > 1 else 0)
        self._begin(run)
        undo = contextlib.ExitStack()
        if not isinstance(self.pipe, Loop):
            undo.callback(layer(scheduler, "step", self._step, copies=True))
        for guider in guiders(self.pipe):
            for method in GUIDER_METHODS:
                undo.callback(layer(guider, method, self._prepare, copies=True))
        run.undo = undo.close
        self._open.run = run
        self._open.seen = True
        self._running[threading.current_thread()] = run
        self._threads.add(threading.current_thread())
        return run

    def _demand_one_call(self, scheduler: Any) -> None:
        """Say so if another thread is in a loop that steps the same noise scheduler."""
        for thread, run in list(self._running.items()):
            if thread is not threading.current_thread() and thread.is_alive() and run.scheduler is scheduler:
                self._missed(OVERLAP, ONE_CALL.format(type(self.pipe).__name__))

    def close(self, run: Run | None = None) -> None:
        """End ``run``, or whichever is open; a run that is over already stays over."""
        current = self.run
        if current is None or (run is not None and run is not current):
            return
        self._open.run = None
        self._running.pop(threading.current_thread(), None)
        current.undo()
        self._end(current)
        if current.idle:
            self._no_loop()

    def _begun(self, inner: Callable[..., Any], timesteps: Tensor | None = None, branches: int = 1) -> None:
        """Of a loop that is no pipeline's. Its noise scheduler may still be given its timesteps: until the first
        forward the run is only awaited."""
        self.close()
        self._leave()
        inner(timesteps, branches)
        self._awaited()
        early = contextlib.ExitStack()
        self._open.awaited, self._open.grid, self._open.early = True, (timesteps, branches), early
        self._early.append(early)
        # Whoever watches the loop alone, a clock say, has no layer of its own there.
        early.callback(layer(*spot(self.pipe.network), self._first, copies=True))
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, Clock):
            # In ``scheduler.step(network(x, t), t, x)`` the step is looked up before the forward.
            early.callback(layer(scheduler, "step", self._step, copies=True))

    def _ended(self, inner: Callable[..., Any], result: Any = None, broken: bool = False) -> None:
        unseen, self._open.awaited = getattr(self._open, "awaited", False), False
        run = self.run
        if run is not None:
            run.result, run.short = result, not broken and not run.whole
            run.cut = 0 if broken else run.cut
        self.close()
        self._leave()
        inner(result, broken)
        if unseen and not broken:
            self._missed(
                NO_LOOP,
                f"the loop of this {class_name(self.pipe.network)} ended without a forward of it: nothing was skipped. "
                "Give diffcache.trajectory the network that the loop calls, and accelerate that one.",
            )

    def _leave(self) -> None:
        """Take off what is layered for one run of such a loop in this thread."""
        early, self._open.early = getattr(self._open, "early", None), None
        if early in self._early:
            self._early.remove(early)
            early.close()

    def _context(self, denoiser: str) -> Wrapper:
        """Return what to layer on a denoiser's ``cache_context``, whose argument names a branch."""

        @contextlib.contextmanager
        def entered(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
            name = args[0] if args else kwargs.get("name")
            contexts = self._open.__dict__.setdefault("contexts", {}).setdefault(denoiser, [])
            contexts.append(name if isinstance(name, str) else "")
            try:
                with inner(*args, **kwargs) as value:
                    yield value
            finally:
                contexts.pop()

        return entered

    def _first(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.entered()
        return inner(*args, **kwargs)

    def _policy_runs(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.pipe.run(inner, *args, **kwargs)

    def _progress_bar(
        self, inner: Callable[..., Any], iterable: Any = None, total: int | None = None, **more: Any
    ) -> Any:
        return _Bar(self, inner(iterable=iterable, total=total, **more), iterable, total)

    def _loop_step(self, inner: Callable[..., Any], components: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a modular pipeline: its bar does not know whose loop it is, its steps do. Those that are given no time are
        chunks, with the sampling loop inside: it may have no bar of its own."""
        bar: _Bar | None = getattr(self._open, "bar", None)
        own, chunk = components is self.pipe, "t" not in kwargs
        if bar is not None and own and not chunk:
            bar.begin()
            self._open.bar = None
        result = inner(components, *args, **kwargs)
        if own and chunk and not getattr(self._open, "seen", False):
            self._no_loop()
        return result

    def wait_for_step(self, bar: _Bar | None) -> None:
        self._open.bar = bar

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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

    def _prepare(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of a guider: it may leave a branch out at some steps, and those behind it move up."""
        batches = inner(*args, **kwargs)
        run = self.run
        if run is not None:
            names = [getattr(batch, "__guidance_identifier__", "") for batch in batches]
            run.branches += [name for name in names if name not in run.branches]  # two guiders may share forwards
        return batches

    def _last_call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.close()
        if not getattr(self._open, "seen", False):
            self._no_loop()
        self._open.seen = False
        return inner(*args, **kwargs)

    def _no_loop(self) -> None:
        name = type(self.pipe).__name__
        if any(thread is not threading.current_thread() for thread in self._threads):
            self._missed(OVERLAP, ONE_CALL.format(name))
            return
        self._missed(
            NO_LOOP,
            f"{name} was called and no sampling loop of its own was seen: nothing was skipped. Its loop does not use "
            "pipe.progress_bar or pipe.scheduler, or runs in another pipeline inside: accelerate that.",
        )


def _sample(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a call of ``scheduler.step`` is given as ``sample``; None where it is not known."""
    try:
        return inspect.signature(scheduler.step).bind(*args, **kwargs).arguments.get("sample")  # through all layers
    except TypeError:
        return None


class _Bar:
    """A progress bar that is the sampling loop while its ``with`` block or its iteration lasts."""

    def __init__(self, host: Host, bar: Any, iterable: Any, total: int | None) -> None:
        self._host, self._bar, self._iterable, self._total = host, bar, iterable, total
        self._run: Run | None = None

    def begin(self) -> None:
        scheduler = self._host.pipe.scheduler
        self._run = self._host.open(scheduler, _start(scheduler, self._total))

    def __enter__(self) -> Any:
        if hasattr(self._host.pipe, "progress_bar"):
            self.begin()
        else:
            self._host.wait_for_step(self)
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._host.wait_for_step(None)
        if self._run is not None:
            self._host.close(self._run)
        return self._bar.__exit__(*exception)

    def update(self, *args: Any) -> Any:
        if self._run is not None and self._run is self._host.run:
            self._run.bar_moved()
        return self._bar.update(*args)

    def __iter__(self) -> Iterator[Any]:
        scheduler = self._host.pipe.scheduler
        start = _start_of(self._iterable, scheduler.timesteps)
        run = None if start is None else self._host.open(scheduler, start)
        try:
            yield from self._bar
        finally:
            if run is not None:
                self._host.close(run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _start(scheduler: Any, total: int | None) -> int:
    """First iteration of the loop: what the pipeline told the scheduler, else what its progress bar leaves out."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    planned = getattr(scheduler, "num_inference_steps", None)
    if total is None or planned is None or total >= planned:
        return 0
    return min((int(planned) - total) * int(getattr(scheduler, "order", 1)), len(scheduler.timesteps) - 1)


def _start_of(iterable: Any, timesteps: Tensor) -> int | None:
    """First iteration of a loop over ``iterable``; None if these are not the noise scheduler's timesteps."""
    if isinstance(iterable, Tensor) and iterable.device == timesteps.device:
        return position(iterable, timesteps)
    length = len(iterable) if hasattr(iterable, "__len__") else -1
    moved = isinstance(iterable, Tensor) and 0 < length <= len(timesteps)
    return len(timesteps) - length if moved or length == len(timesteps) else None
