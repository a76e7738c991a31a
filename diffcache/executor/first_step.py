"""Run the first step of a call, and compute from it the work and the memory of the whole call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diffcache import host
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan
from diffcache.errors import UnsupportedModel
from diffcache.executor import criteria
from diffcache.executor.attach import deciding_stack, demand_visible
from diffcache.executor.bound import Bound
from diffcache.executor.checks import check_run
from diffcache.executor.criteria import TIME_EMBEDDING, Where
from diffcache.executor.decider import signal_format
from diffcache.executor.engine import grid_of, scheduled
from diffcache.executor.pairing import Inputs, pair, reader
from diffcache.executor.program import NEWEST, Program, compile_schedule
from diffcache.executor.site import own_inputs
from diffcache.executor.store import Output, kept_bytes
from diffcache.host.structure import first_norm
from diffcache.kernels import format_of
from diffcache.patch import inner_spot, layer
from diffcache.schedulers import Rule


@dataclass(slots=True)
class Visit:
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


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The first step of a call, with what it shows about the whole call.

    Attributes:
        schedule: The schedule of the run.
        start: The first step of the run.
        visits: The calls of all sites in the first step. If a criterion decides in the first block of a stack, the
            operations of the stack are those of its other blocks, because the first block always runs.
        deciding: Denoiser -> the stack in which a criterion decides, and where (see ``deciding_stack``).
        programs: The compiled plans, by denoiser and site.
    """

    schedule: CacheSchedule
    start: int
    visits: Sequence[Visit]
    deciding: Mapping[str, tuple[str, Where | None]]
    programs: Mapping[tuple[str, str], Program]

    @property
    def steps(self) -> int:
        """Return the number of steps of the call."""
        return self.schedule.steps - self.start

    @property
    def online(self) -> bool:
        """Return whether a rule decides in the run."""
        return any(plan.online for plan in self.schedule.denoisers.values())

    @property
    def compute_fraction(self) -> float:
        """Return the operations of the denoisers in the call, relative to a full run.

        If a rule decides in the run, this is the least possible fraction.
        """
        may = self.may_predict
        done = sum(self._work(step, may) for step in range(self.start, self.schedule.steps))
        full = self.steps * sum(v.flops for v in self.visits if v.site == "model")
        return done / max(full, 1)

    @property
    def cache_bytes(self) -> int:
        """Return the most bytes of kept tensors at one time, of outputs and of criteria."""
        return self._peak_bytes() + self._criteria_bytes()

    @property
    def may_predict(self) -> dict[str, np.ndarray]:
        """Return denoiser -> the steps that are predicted if its online rule always allows it: bool [T]."""
        return {name: _may_predict(plan, self.start) for name, plan in self.schedule.denoisers.items()}

    def _work(self, step: int, may: Mapping[str, np.ndarray]) -> int:
        """Return the operations at a step: those of the forwards that run, without the sites predicted inside them."""
        total = 0
        for v in self.visits:
            program = self.programs.get((v.denoiser, v.site))
            root = self.programs.get((v.denoiser, "model"))
            here = v.denoiser in may and bool(may[v.denoiser][step])
            predicted = here and program is not None and program.terms[step] is not None
            root_predicted = here and root is not None and root.terms[step] is not None
            if v.site == "model":
                total += 0 if root_predicted else v.flops
            elif predicted and not root_predicted:
                total -= v.flops
        return total

    def _peak_bytes(self) -> int:
        """Return the most bytes at one time in a store that keeps and drops outputs as the programs state."""
        held: dict[tuple[int, int], int] = {}  # (visit, anchor step) -> bytes
        peak = 0
        for step in range(self.start, self.schedule.steps):
            for n, v in enumerate(self.visits):
                program = self.programs.get((v.denoiser, v.site))
                if program is None:
                    continue
                if program.terms[step] is None and step in program.keeps:
                    at = NEWEST if program.newest else step
                    held[n, at] = v.kept_bytes(program, step)
                    peak = max(peak, sum(held.values()))
                for dropped in program.drops[step]:
                    held.pop((n, dropped), None)
        return peak

    def _criteria_bytes(self) -> int:
        """Return the bytes that criteria keep: the signals that they compare with, and what they observe."""
        total = 0
        for v in self.visits:
            plan = self.schedule.denoisers.get(v.denoiser)
            criterion = criteria.of(plan)
            if plan is None or criterion is None:
                continue
            first = self.deciding[v.denoiser][0]
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


class EnoughError(Exception):
    """Ends a call of the pipeline when enough of its steps have run."""


@contextlib.contextmanager
def without_trace(pipe: Any, call: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Yield a function that runs ``pipe(**call)``, in full or until EnoughError is raised in it.

    The end of the block undoes what a run that is cut short leaves on the pipeline: its step, guidance scale, …. It
    also restores the state of every random generator, including those in ``call``.
    """
    given = call.get("generator")
    generators = [g for g in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    found = dict(pipe.__dict__)

    def run() -> None:
        with contextlib.suppress(EnoughError), torch.no_grad():
            pipe(**call)

    try:
        with torch.random.fork_rng():
            yield run
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        pipe.__dict__.clear()
        pipe.__dict__.update(found)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()


def first_step(
    bound: Bound, source: CacheSchedule | Rule, call: Mapping[str, Any], store: str | None = None
) -> FirstStep:
    """Run the first step of a call and measure it.

    Denoisers that the step does not call are not counted.

    Args:
        bound: The pipeline.
        source: The schedule, or the rule that makes one. It has been checked against the pipeline and the call.
        call: The arguments of the call. Random generators in it keep their states.
        store: The format in which the outputs of a rule are kept. None keeps the formats of the rule.

    Raises:
        DiffCacheError: The schedule does not fit the run, or the rule cannot make one for it.
    """
    sites = bound.sites
    visits: list[Visit] = []
    seen: list[tuple[CacheSchedule, int]] = []

    def begin(run: host.LoopRun) -> None:
        scales = host.guidance_values(bound.pipe)
        if isinstance(source, Rule):
            schedule = scheduled(source, grid_of(run, bound.networks, scales), bound.site_names, store)
        else:
            schedule = source
            check_run(run, schedule, scales, strict=True)
        demand_visible(schedule, bound.denoisers)
        seen.append((schedule, run.start))
        if not run.forwards:
            undo.callback(layer(run.scheduler, "step", enough, copies=True))

    def enough(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise EnoughError

    def counted(denoiser: str, module: nn.Module) -> Callable[..., Any]:
        """Return the wrapper of a network that ends the first step if forwards are counted as steps."""
        time_of = host.time_of(module)

        def count(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = watcher.entered()
            if run is not None and run.forwards:
                forward = run.forward(denoiser, time_of(args, kwargs), watcher.branch(denoiser))
                if forward.step > run.start:
                    raise EnoughError
            return inner(*args, **kwargs)

        return count

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            begin(run)

    watcher = host.LoopWatcher(bound.pipe, Observer())
    with without_trace(bound.pipe, call) as run_call, contextlib.ExitStack() as undo:
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
        run_call()
    schedule, start = seen[-1]
    visits = _stacks_summed(visits)
    _demand_own_inputs(schedule, visits)
    deciding = {name: deciding_stack(schedule, name, sites) for name in schedule.denoisers}
    always = [(name, site) for name, (site, where) in deciding.items() if where is Where.FIRST_BLOCK]
    for visit in visits:
        if (visit.denoiser, visit.site) in always:
            visit.flops -= visit.first_flops
    return FirstStep(schedule, start, visits, deciding, compile_schedule(schedule))


def _demand_own_inputs(schedule: CacheSchedule, visits: list[Visit]) -> None:
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


def _meter(
    visits: list[Visit], denoiser: str, site: str, module: nn.Module, *, first: bool, last: bool
) -> Callable[..., Any]:
    """Return a wrapper that adds a ``Visit`` for every call of a module.

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
        visits.append(Visit(denoiser, site, flops, inputs, outputs, flops if first else 0))
        return value

    return wrapper


def _shapes(inputs: Inputs) -> Inputs:
    """Return inputs without data."""
    return Inputs(tuple(t.to("meta") for t in inputs.main), {n: t.to("meta") for n, t in inputs.others.items()})


def _stacks_summed(visits: list[Visit]) -> list[Visit]:
    """Return one entry per stack and denoiser call, the sum of its parts, and all other entries as they are."""
    summed: list[Visit] = []
    open_stacks: dict[tuple[str, str], Visit] = {}
    for v in visits:
        if not v.site.startswith("stack:"):
            summed.append(v)
            continue
        whole = Visit(v.denoiser, v.site, 0, v.inputs, (), v.first_flops)
        whole = open_stacks.setdefault((v.denoiser, v.site), whole)
        whole.flops += v.flops
        whole.outputs = v.outputs
        if v.outputs:
            summed.append(open_stacks.pop((v.denoiser, v.site)))
    return summed
