"""Estimate what a schedule will cost and save in a call, before the call runs."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diffcache import host, text
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.executor import criteria
from diffcache.executor.attach import deciding_stack, demand_visible
from diffcache.executor.bound import Bound
from diffcache.executor.by_steps import BySteps, Source, for_call
from diffcache.executor.checks import Sites, check_call, check_criteria, check_granularity, check_pipeline, check_run
from diffcache.executor.criteria import TIME_EMBEDDING, Where
from diffcache.executor.decider import signal_format
from diffcache.executor.engine import Executor, any_grid, grid_of, scheduled
from diffcache.executor.pairing import Inputs, pair, reader
from diffcache.executor.program import NEWEST, Program, compile_schedule
from diffcache.executor.site import own_inputs
from diffcache.executor.store import Output, kept_bytes
from diffcache.host.structure import first_norm
from diffcache.kernels import format_of
from diffcache.patch import inner_spot, layer, spot
from diffcache.presets import NetworkFacts
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


@dataclass(slots=True)
class _Visit:
    """One call of a site in the first step.

    Attributes:
        denoiser: The component name of the network.
        site: The name of the site, or ``"norm:"`` and a stack for the first normalisation in the stack.
        flops: The floating-point operations of the call.
        inputs: The inputs, as tensors without data.
        outputs: The outputs, as tensors without data.
        first_flops: The operations of the first block, if the site is a stack.
    """

    denoiser: str
    site: str
    flops: int
    inputs: Inputs
    outputs: tuple[torch.Tensor, ...]
    first_flops: int = 0

    def kept_bytes(self, program: Program, step: int) -> int:
        """Return the bytes that the store keeps of the call at ``step``."""
        how = None if program.store is None else format_of(program.store)
        channels = None if program.prescale is None else program.prescale.shape[1]
        if step not in program.keeps_x:
            return kept_bytes(self.outputs, how, channels)
        pairing = pair(self.inputs, self.outputs, {})
        x = pairing.x(self.inputs)
        if step in program.differences and own_inputs(self.outputs, x, pairing, how) is not None:
            return kept_bytes(self.outputs, how)
        return kept_bytes(self.outputs, how, channels) + kept_bytes(x, how, channels)


class _EnoughError(Exception):
    """Ends a call of the pipeline when enough of its steps have run."""


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
    pipe, sites = bound.pipe, bound.sites
    host.demand_no_other_cache(pipe)
    host.check_call(pipe, call)
    if timed and bound.executor is not None:
        allowed = "False for an accelerated pipeline: the full call is timed. Call diffcache.restore(pipe) first"
        raise BadOption("timed", timed, allowed)
    source = _for_call(pipe, source, call)
    if isinstance(source, CacheSchedule):
        source = source if store is None else source.stored(store)
        check_pipeline(pipe, source, sites, strict=True)
        check_call(pipe, call, source)
    known = source
    if isinstance(known, Rule):
        check_granularity(known, sites)
        grid = any_grid(_networks(pipe, sites))
        known = scheduled(known, grid, {name: tuple(found) for name, found in sites.items()}, store)
    check_criteria(known)
    for name in known.denoisers:
        deciding_stack(known, name, sites)
    with _unchanged(pipe):
        schedule, start, visits = _first_step(pipe, source, sites, call, store)
        asks, until = _early_decisions(schedule, start)
        decided: list[bool] = []
        if asks and bound.executor is None:
            executor = Executor(pipe, source, sites, store=store, quiet=True)
            with _random_state(call):
                decided = _decided(executor, asks, until, sites, functools.partial(pipe, **call))
        seconds = _seconds(pipe, call) if timed else (None, None)
    programs = compile_schedule(schedule)
    _demand_own_inputs(schedule, visits)
    deciding_stacks = {name: deciding_stack(schedule, name, sites) for name in schedule.denoisers}
    always = [(name, site) for name, (site, where) in deciding_stacks.items() if where is Where.FIRST_BLOCK]
    for visit in visits:
        if (visit.denoiser, visit.site) in always:
            visit.flops -= visit.first_flops  # the stack then counts only what follows the first block
    may = {name: _may_predict(plan, start) for name, plan in schedule.denoisers.items()}
    done = sum(_work(programs, visits, step, may) for step in range(start, schedule.steps))
    full = (schedule.steps - start) * sum(v.flops for v in visits if v.site == "model")
    peak = _peak_bytes(programs, visits, start, schedule.steps) + _criteria_bytes(schedule, deciding_stacks, visits)
    online = any(plan.online for plan in schedule.denoisers.values())
    measured = schedule.expected is not None
    return Estimate(
        schedule.steps - start, done / max(full, 1), peak, online, len(decided), sum(decided), measured, *seconds
    )


def _for_call(pipe: Any, source: Source, call: Mapping[str, Any]) -> CacheSchedule | Rule:
    """Return the schedule or the rule for a call, and leave the pipeline and random generators as they were."""
    if not isinstance(source, BySteps):
        return source
    with _unchanged(pipe), _random_state(call), torch.no_grad():
        return for_call(pipe, source, call)


def _seconds(pipe: Any, call: Mapping[str, Any]) -> tuple[float, float]:
    """Run a call in full. Return its seconds, and those between the beginning and the end of its sampling loops."""
    found: list[float] = []
    began = 0.0

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            nonlocal began
            began = _now()

        def loop_ended(self, run: host.LoopRun) -> None:
            found.append(_now() - began)

    watcher = host.LoopWatcher(pipe, Observer())
    with contextlib.ExitStack() as undo, _random_state(call), torch.no_grad():
        undo.callback(watcher.detach)
        watcher.attach()
        start = _now()
        pipe(**call)
        return _now() - start, sum(found)


def _now() -> float:
    """Return the time in seconds, after all work of the GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch has no types here
        torch.cuda.synchronize()
    return time.perf_counter()


def _networks(pipe: Any, sites: Sites) -> dict[str, NetworkFacts]:
    """Return the facts about the networks of a pipeline, by component name."""
    return host.network_facts(pipe, {name: modules["model"][0] for name, modules in sites.items()})


def _demand_own_inputs(schedule: CacheSchedule, visits: list[_Visit]) -> None:
    """Raise UnsupportedModel for an online rule that reuses F − x if F has another shape than x."""
    for v in visits:
        plan = schedule.denoisers.get(v.denoiser)
        if v.site != "model" or plan is None or plan.online is None or v.site not in plan.sites:
            continue
        if plan.sites[v.site].kappa is not None and all(i is None for i in pair(v.inputs, v.outputs, {}).own):
            shapes = [[list(t.shape) for t in tensors] for tensors in (v.inputs.main, v.outputs)]
            raise UnsupportedModel(
                f"the online rule {plan.online.rule!r} reuses what {v.denoiser!r} adds to its input. Here the input "
                f"has the shape {shapes[0]}, the output {shapes[1]}, so no step could be predicted. Allowed: "
                "rules that reuse or extrapolate outputs, such as 'uniform:every=2'."
            )


def _first_step(
    pipe: Any, source: CacheSchedule | Rule, sites: Sites, call: Mapping[str, Any], store: str | None
) -> tuple[CacheSchedule, int, list[_Visit]]:
    """Run the first step of a call and measure it.

    Returns:
        The schedule of the run, its first step, and the calls of all sites in that step.
    """
    visits: list[_Visit] = []
    seen: list[tuple[CacheSchedule, int]] = []
    networks = _networks(pipe, sites)

    def begin(run: host.LoopRun) -> None:
        if isinstance(source, Rule):
            schedule = scheduled(source, grid_of(pipe, run, networks), {d: tuple(s) for d, s in sites.items()}, store)
        else:
            schedule = source
            check_run(pipe, run, schedule, strict=True)
        demand_visible(schedule, {name: found["model"][0] for name, found in sites.items()})
        seen.append((schedule, run.start))
        if not run.forwards:
            undo.callback(layer(run.scheduler, "step", enough, copies=True))

    def enough(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise _EnoughError

    def counted(denoiser: str, module: nn.Module) -> Callable[..., Any]:
        """Return the wrapper of a network that ends the first step if forwards are counted as steps."""
        time_of = host.time_of(module)

        def count(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = watcher.entered()
            if run is not None and run.forwards:
                forward = run.forward(denoiser, time_of(args, kwargs), watcher.branch(denoiser))
                if forward.step > run.start:
                    raise _EnoughError
            return inner(*args, **kwargs)

        return count

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            begin(run)

    watcher = host.LoopWatcher(pipe, Observer())
    with contextlib.ExitStack() as undo, _random_state(call), torch.no_grad():
        for denoiser, found in sites.items():
            for site, modules in found.items():
                for i, module in enumerate(modules):
                    wrapper = _meter(visits, denoiser, site, module, first=i == 0, last=i == len(modules) - 1)
                    undo.callback(layer(*inner_spot(module), wrapper))
                if site == "model":
                    undo.callback(layer(*inner_spot(modules[0]), counted(denoiser, modules[0])))
                norm = first_norm(modules[0]) if site.startswith("stack:") else None
                if norm is not None:
                    wrapper = _meter(visits, denoiser, f"norm:{site}", norm, first=True, last=True)
                    undo.callback(layer(norm, "forward", wrapper))
        undo.callback(watcher.detach)
        watcher.attach()
        with contextlib.suppress(_EnoughError):
            pipe(**call)
    schedule, start = seen[-1]
    return schedule, start, _stacks_summed(visits)


def _may_predict(plan: DenoiserPlan, start: int) -> np.ndarray:
    """Return the steps that are predicted if the online rule of the plan always allows it: bool [T]."""
    asked: np.ndarray = np.any([~site.compute for site in plan.sites.values()], axis=0)
    if plan.online is None:
        return asked
    may: np.ndarray = asked & (plan.online.limit > 0)
    most = plan.online.most
    in_a_row = 0
    for step in range(start, len(may)):
        may[step] &= most is None or in_a_row < most
        in_a_row = in_a_row + 1 if may[step] else 0
    return may


def _early_decisions(schedule: CacheSchedule, start: int) -> tuple[dict[str, np.ndarray], int]:
    """Return the first steps that online rules decide about.

    Args:
        schedule: The schedule of the run.
        start: The first step of the run.

    Returns:
        Denoiser -> the steps that its rule may predict, bool [T]; and the step at which there is enough to see. The
        mapping is empty if no rule decides early.
    """
    asks = {n: _may_predict(plan, start) for n, plan in schedule.denoisers.items() if plan.online is not None}
    first = min((int(may[start:].argmax()) for may in asks.values() if may[start:].any()), default=LOOKED_UNTIL)
    if first + LOOKED_AT > LOOKED_UNTIL:
        return {}, 0
    return asks, start + first + LOOKED_AT


def _decided(
    executor: Executor, asks: Mapping[str, np.ndarray], until: int, sites: Sites, run: Callable[[], Any]
) -> list[bool]:
    """Run the first steps of an accelerated call.

    Args:
        executor: The executor, not attached.
        asks: See ``_early_decisions``.
        until: The step before which the run ends.
        sites: The modules of every site of the denoisers.
        run: Runs the call.

    Returns:
        For each forward that an online rule decided about, whether it predicted the forward.
    """

    def ended(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = executor.host.run
        if loop is not None and loop.index >= until:
            raise _EnoughError
        return inner(*args, **kwargs)

    with contextlib.ExitStack() as undo, torch.no_grad():
        undo.callback(executor.detach)
        executor.attach()
        for modules in sites.values():
            undo.callback(layer(*spot(modules["model"][0]), ended))
        with contextlib.suppress(_EnoughError):
            run()
    forwards = [] if executor.last is None else executor.last.forwards
    return [f.skipped > 0 for f in forwards if f.denoiser in asks and asks[f.denoiser][f.step]]


def _meter(
    visits: list[_Visit], denoiser: str, site: str, module: nn.Module, *, first: bool, last: bool
) -> Callable[..., Any]:
    """Return a wrapper that adds a ``_Visit`` for every call of a module.

    Args:
        visits: The list to add to.
        denoiser: The component name of the network.
        site: The name of the site.
        module: The module.
        first: Whether it is the first module of the site.
        last: Whether it is the last module of the site.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings triton in: only when something is measured

    read = reader(module)

    def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = _shapes(read(args, kwargs))
        with FlopCounterMode(display=False) as counter:
            value = inner(*args, **kwargs)
        flops = counter.get_total_flops()
        # All parts of a stack cost work; only its last part's output is kept.
        outputs = tuple(t.to("meta") for t in Output.of(value).tensors) if last else ()
        visits.append(_Visit(denoiser, site, flops, inputs, outputs, flops if first else 0))
        return value

    return wrapper


def _shapes(inputs: Inputs) -> Inputs:
    """Return inputs without data."""
    return Inputs(tuple(t.to("meta") for t in inputs.main), {n: t.to("meta") for n, t in inputs.others.items()})


def _stacks_summed(visits: list[_Visit]) -> list[_Visit]:
    """Return one entry per stack and denoiser call, the sum of its parts, and all other entries as they are."""
    summed: list[_Visit] = []
    open_stacks: dict[tuple[str, str], _Visit] = {}
    for v in visits:
        if not v.site.startswith("stack:"):
            summed.append(v)
            continue
        whole = _Visit(v.denoiser, v.site, 0, v.inputs, (), v.first_flops)
        whole = open_stacks.setdefault((v.denoiser, v.site), whole)
        whole.flops += v.flops
        whole.outputs = v.outputs
        if v.outputs:
            summed.append(open_stacks.pop((v.denoiser, v.site)))
    return summed


def _work(
    programs: Mapping[tuple[str, str], Program], visits: list[_Visit], step: int, may: Mapping[str, np.ndarray]
) -> int:
    """Return the operations at one step: those of the forwards that run, without the sites predicted inside them."""
    total = 0
    for v in visits:
        program = programs.get((v.denoiser, v.site))
        root = programs.get((v.denoiser, "model"))
        here = v.denoiser in may and bool(may[v.denoiser][step])
        predicted = here and program is not None and program.terms[step] is not None
        root_predicted = here and root is not None and root.terms[step] is not None
        if v.site == "model":
            total += 0 if root_predicted else v.flops
        elif predicted and not root_predicted:
            total -= v.flops
    return total


def _peak_bytes(programs: Mapping[tuple[str, str], Program], visits: list[_Visit], start: int, steps: int) -> int:
    """Return the most bytes at one time in a store that keeps and drops outputs as the programs state."""
    held: dict[tuple[int, int], int] = {}  # (visit, anchor step) -> bytes
    peak = 0
    for step in range(start, steps):
        for n, v in enumerate(visits):
            program = programs.get((v.denoiser, v.site))
            if program is None:
                continue
            if program.terms[step] is None and step in program.keeps:
                at = NEWEST if program.newest else step
                held[n, at] = v.kept_bytes(program, step)
                peak = max(peak, sum(held.values()))
            for dropped in program.drops[step]:
                held.pop((n, dropped), None)
    return peak


def _criteria_bytes(
    schedule: CacheSchedule, deciding_stacks: Mapping[str, tuple[str, Where | None]], visits: list[_Visit]
) -> int:
    """Return the bytes that criteria keep: the signals that they compare with, and what they observe."""
    total = 0
    for v in visits:
        plan = schedule.denoisers.get(v.denoiser)
        criterion = criteria.of(plan)
        if plan is None or criterion is None:
            continue
        first = deciding_stacks[v.denoiser][0]
        signals = {  # where the criterion decides -> the site there, and the tensors that it is given
            Where.MODEL: ("model", v.inputs.main),
            Where.FIRST_BLOCK: (first, v.inputs.main),  # the residual has the form of the input
            Where.FIRST_NORM: (f"norm:{first}", v.outputs[:1]),
            Where.TIME_EMBEDDING: (first, tuple(t for n, t in v.inputs.others.items() if n == TIME_EMBEDDING)),
        }
        site, tensors = signals[criterion.about.where]
        if v.site == site:
            total += kept_bytes(criterion.signal(tensors), signal_format(plan))
        if v.site == "model":
            total += kept_bytes(criterion.keeps(v.inputs.main, v.outputs), None)
    return total


@contextlib.contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """Undo at the end of the block what a run that is cut short leaves on a pipeline: its step, guidance scale, …."""
    found = dict(pipe.__dict__)
    try:
        yield
    finally:
        pipe.__dict__.clear()
        pipe.__dict__.update(found)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()


@contextlib.contextmanager
def _random_state(call: Mapping[str, Any]) -> Iterator[None]:
    """Restore the state of every random generator at the end of the block, including those in ``call``."""
    given = call.get("generator")
    generators = [g for g in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    with torch.random.fork_rng():
        yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
