"""Estimate what a schedule will cost and save in a call, before the call runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffcache import host, text
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.executor.attach import deciding_stacks
from diffcache.executor.bound import Bound
from diffcache.executor.by_steps import BySteps, Source
from diffcache.executor.checks import (
    check_call,
    check_criteria,
    check_granularity,
    check_networks,
    check_noise_scheduler,
)
from diffcache.executor.engine import Executor, any_grid, scheduled
from diffcache.executor.first_step import EnoughError, FirstStep, first_step, without_trace
from diffcache.patch import layer, spot
from diffcache.schedulers import Rule

DISTILLED = 4  # steps: skipping one of so few is seldom worth its error
FEW_STEPS = 8  # the usual number of steps of distilled models, or fewer
LOOKED_AT = 4  # steps that run to see the decisions of an online rule, from the first that it decides about
LOOKED_UNTIL = 12  # steps; decisions after them are not looked at
NO_GAIN = 0.95  # above this fraction of the work, the overhead is larger than the saving


@dataclass(frozen=True, slots=True, repr=False)
class Estimate:
    """The expected work and memory of one call. It says nothing about fidelity.

    Attributes:
        steps: The steps of the call.
        compute_fraction: The floating-point operations of the denoiser in the sampling loop, relative to a full run.
        cache_bytes: The most bytes of kept tensors at one time.
        online: Whether a rule decides in the run. If so, the fraction is the least possible one, and the run lies
            between it and a full run.
        asked: The forwards in the first steps about which an online rule decided.
        predicted: The forwards among them that it predicted.
        measured: Whether the schedule holds the fidelity that it was measured at.
        seconds: The seconds of the whole full call, from ``timed=True``, else None.
        loop_seconds: The seconds of its sampling loop, else None.
    """

    steps: int
    compute_fraction: float
    cache_bytes: int
    online: bool = False
    asked: int = 0
    predicted: int = 0
    measured: bool = False
    seconds: float | None = None
    loop_seconds: float | None = None

    @property
    def gain(self) -> float:
        """Return the speed-up of the sampling loop if nothing but the denoiser takes time: 1 / compute_fraction."""
        return 1 / max(self.compute_fraction, 1e-9)

    def __str__(self) -> str:
        return f"{self._saving()}{self._outside()}"

    def __repr__(self) -> str:
        least = "at least " if self.online else ""
        work = f"{least}{self.compute_fraction:.1%} of the work of {self.steps} steps"
        return f"<Estimate {work}, {shown(self.cache_bytes)} of cache>"

    def _repr_html_(self) -> str:
        """Return the sentence as HTML, for notebooks."""
        return text.card("Estimate", str(self))

    def _saving(self) -> str:
        """Return the work, the gain and the memory as text."""
        if self.compute_fraction >= 1 and not self.online:
            return f"no gain expected: nothing is skipped, all {self.steps} steps are computed"
        if self.compute_fraction > NO_GAIN:
            return f"no gain expected: {self.compute_fraction:.0%} of the work of {self.steps} steps is still done"
        work = f"{self.steps} steps at {self.compute_fraction:.1%} of the denoiser's work"
        held = f"{shown(self.cache_bytes)} of cache at most"
        if self.steps <= DISTILLED and not self.measured:
            return (
                f"{work}; {held}. Distilled models of few steps leave little to skip: each of {self.steps} steps "
                "changes the sample much, and predictions may be far off. Compare with the full run by "
                "diffcache.evaluate before you use it"
            )
        if not self.online:
            return f"{work}: up to {self.gain:.2f}x faster sampling; {held}{self._few()}"
        seen = f"{self.predicted or 'none'} of the {self.asked} forwards that it was asked about in the first steps"
        if self.asked and not self.predicted:
            return f"no gain seen: the rule predicted {seen}. {work} or more, as the run decides; {held}"
        between = f"between no gain and {self.gain:.2f}x faster sampling; {held}"
        looked = f". The rule predicted {seen}" if self.asked else ""
        return f"{work} or more, as the run decides: {between}{looked}{self._few()}"

    def _few(self) -> str:
        """Return a warning about schedules of few steps that were not measured."""
        if self.measured or self.steps > FEW_STEPS:
            return ""
        return (
            f". {self.steps} steps are few: each changes the sample much, above all in distilled models, and "
            "predictions may be far off. Compare with the full run by diffcache.evaluate before you use it"
        )

    def _outside(self) -> str:
        """Return the share of the call's time outside of the sampling loop, and what it leaves of the gain."""
        if self.seconds is None or self.loop_seconds is None:
            return ""
        share = 1 - self.loop_seconds / self.seconds
        call = f"The full call takes {self.seconds:.3g} s, {share:.0%} of them outside of the sampling loop"
        most = self.seconds / (self.seconds - self.loop_seconds * (1 - min(self.compute_fraction, 1)))
        least = "between no gain and" if self.online else "up to"
        return f". {call}: {least} {most:.2f}x faster as a whole" if most > 1 else f". {call}"


def shown(size: int) -> str:
    """Return a number of bytes as text, in bytes, kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size} bytes"


def estimate_for(
    bound: Bound, source: Source, call: Mapping[str, Any], store: str | None = None, *, timed: bool = False
) -> Estimate:
    """Run the first step of a call, measure it, and compute the rest from the schedule.

    If an online rule decides and the pipeline is not accelerated, the first steps that the rule decides about run as
    well. Random generators in ``call`` keep their states. Denoisers that the first step does not call are not counted.

    Args:
        bound: The pipeline.
        source: The schedule, the rule that makes one, or several of them by number of steps.
        call: The arguments of the call.
        store: The format in which all outputs are kept. None keeps the formats of the schedule.
        timed: Whether to run the call once in full as well, and time it.

    Raises:
        BadOption: ``timed`` is True, and the pipeline is accelerated.
        DiffCacheError: All that ``diffcache.accelerate`` raises.
    """
    pipe = bound.pipe
    host.demand_no_other_cache(pipe)
    host.check_call(pipe, call)
    if timed and bound.executor is not None:
        allowed = "False for an accelerated pipeline: the full call is timed. Call diffcache.restore(pipe) first"
        raise BadOption("timed", timed, allowed)
    one = _for_call(bound, source, call)
    one = one if store is None or isinstance(one, Rule) else one.stored(store)
    _check(bound, one, call, store)
    first = first_step(bound, one, call, store)
    decided = [] if bound.executor is not None else _early_decisions(bound, one, first, call, store)
    seconds = _seconds(bound, call) if timed else (None, None)
    measured = first.schedule.expected is not None
    return Estimate(
        first.steps,
        first.compute_fraction,
        first.cache_bytes,
        first.online,
        len(decided),
        sum(decided),
        measured,
        *seconds,
    )


def _check(bound: Bound, source: CacheSchedule | Rule, call: Mapping[str, Any], store: str | None) -> None:
    """Check a schedule or a rule against the pipeline and the call, as ``diffcache.accelerate`` and a run do."""
    if isinstance(source, Rule):
        check_granularity(source, bound.sites)
        schedule = scheduled(source, any_grid(bound.networks), bound.site_names, store)
    else:
        check_networks(source, bound.sites, host.host_name(bound.pipe), strict=True)
        check_noise_scheduler(host.noise_scheduler(bound.pipe), source, strict=True)
        check_call(source, call, host.iterations(bound.pipe, call))
        schedule = source
    check_criteria(schedule)
    deciding_stacks(schedule, bound.sites)


def _for_call(bound: Bound, source: Source, call: Mapping[str, Any]) -> CacheSchedule | Rule:
    """Return the schedule or the rule for a call.

    If only a run shows the number of steps, the call runs until its loop begins.

    Raises:
        ScheduleMismatch: None covers the steps of the call.
    """
    if not isinstance(source, BySteps):
        return source
    steps = host.iterations(bound.pipe, call)
    return source.of(_steps_seen(bound, call) if steps is None else steps)


def _steps_seen(bound: Bound, call: Mapping[str, Any]) -> int:
    """Run a call until its loop begins, and return the number of steps of the loop."""
    seen: list[int] = []

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            seen.append(run.steps)
            raise EnoughError

    with _watched(bound, call, Observer()) as run_call:
        run_call()
    if not seen:
        title = host.host_name(bound.pipe)
        raise ScheduleMismatch(f"the call of this {title} has no loop, so its number of steps is not known.")
    return seen[-1]


@contextlib.contextmanager
def _watched(bound: Bound, call: Mapping[str, Any], observer: host.LoopObserver) -> Iterator[Callable[[], None]]:
    """Yield a function that runs a call and leaves no trace, while ``observer`` receives the events of its loop."""
    watcher = host.LoopWatcher(bound.pipe, observer)
    with without_trace(bound.pipe, call) as run_call, contextlib.ExitStack() as undo:
        undo.callback(watcher.detach)
        watcher.attach()
        yield run_call


def _seconds(bound: Bound, call: Mapping[str, Any]) -> tuple[float, float]:
    """Run a call in full. Return its seconds, and those between the beginning and the end of its sampling loops."""
    found: list[float] = []
    began = 0.0

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            nonlocal began
            began = _now()

        def loop_ended(self, run: host.LoopRun) -> None:
            found.append(_now() - began)

    with _watched(bound, call, Observer()) as run_call:
        start = _now()
        run_call()
        return _now() - start, sum(found)


def _now() -> float:
    """Return the time in seconds, after all work of the GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch has no types here
        torch.cuda.synchronize()
    return time.perf_counter()


def _early_decisions(
    bound: Bound, source: CacheSchedule | Rule, first: FirstStep, call: Mapping[str, Any], store: str | None
) -> list[bool]:
    """Run the first steps of an accelerated call, if online rules decide early enough.

    Args:
        bound: The pipeline, not accelerated.
        source: The schedule or the rule.
        first: The first step of the call.
        call: The arguments of the call.
        store: The format in which all outputs are kept. None keeps the formats of the schedule.

    Returns:
        For each forward that an online rule decided about, whether it predicted the forward.
    """
    may_predict, start = first.may_predict, first.start
    asks = {name: may_predict[name] for name, plan in first.schedule.denoisers.items() if plan.online is not None}
    asked = min((int(may[start:].argmax()) for may in asks.values() if may[start:].any()), default=LOOKED_UNTIL)
    if asked + LOOKED_AT > LOOKED_UNTIL:
        return []
    until = start + asked + LOOKED_AT  # enough is seen before this step
    executor = Executor(bound.pipe, source, bound.sites, store=store, quiet=True)

    def ended(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = executor.host.run
        if loop is not None and loop.index >= until:
            raise EnoughError
        return inner(*args, **kwargs)

    with without_trace(bound.pipe, call) as run_call, contextlib.ExitStack() as undo:
        undo.callback(executor.detach)
        executor.attach()
        for modules in bound.sites.values():
            undo.callback(layer(*spot(modules["model"][0]), ended))
        run_call()
    forwards = [] if executor.last is None else executor.last.forwards
    return [f.skipped > 0 for f in forwards if f.denoiser in asks and asks[f.denoiser][f.step]]
