"""Apply a schedule, or a rule, to the runs of one pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, ScheduleMismatch
from diffcache.executor import criteria
from diffcache.executor.afterwards import about_finiteness, about_work
from diffcache.executor.attach import Deciding, deciding_stacks, demand_visible, make_patches
from diffcache.executor.by_steps import BySteps, Source, members, stored, title
from diffcache.executor.checks import (
    Sites,
    check_criteria,
    check_granularity,
    check_in_parts,
    check_networks,
    check_noise_scheduler,
    check_run,
)
from diffcache.executor.doubts import ADVICE, end_notices
from diffcache.executor.noise_levels import move_levels
from diffcache.executor.notices import Notice, counted, publish
from diffcache.executor.program import Program, compile_schedule
from diffcache.executor.state import OnPrediction, RunState
from diffcache.executor.wrappers import Wrappers
from diffcache.kernels.library import Backend, check_backend
from diffcache.presets import NetworkFacts
from diffcache.schedulers import Grid, Rule

Misfit = Literal["refuse", "full"]
MOST_MADE = 8  # loops for which the schedules of a rule are kept


def any_grid(networks: Mapping[str, NetworkFacts]) -> Grid:
    """Return a loop on which a rule is checked before the loop of the run is known.

    It is longer than usual loops, so that a rule that computes the first steps shows that it predicts later ones.
    """
    return Grid(np.linspace(1.0, 0.1, 100), networks=networks)


def scheduled(rule: Rule, grid: Grid, sites: Mapping[str, tuple[str, ...]], store: str | None = None) -> CacheSchedule:
    """Return the schedule that a rule makes.

    Args:
        rule: The rule.
        grid: The timesteps of the loop.
        sites: The names of the sites, by denoiser.
        store: The format in which all outputs are kept. None keeps the formats of the rule.
    """
    schedule = rule.schedule(grid, sites)
    return schedule if store is None else schedule.stored(store)


def grid_of(run: host.LoopRun, networks: Mapping[str, NetworkFacts], scales: Mapping[str, float | None]) -> Grid:
    """Return what a rule may know about a run that is beginning.

    Args:
        run: The run.
        networks: The facts about the networks, by component name.
        scales: The guidance scales of the run (see ``host.guidance_values``).
    """
    return Grid(
        run.timesteps.detach().cpu().double().numpy(),
        run.start,
        networks,
        guided=host.is_guided(scales),
        propagation=lambda: host.propagation(run.scheduler, run.timesteps, run.start),
    )


def _reads_levels(schedule: CacheSchedule) -> bool:
    """Return whether a criterion of a schedule reads the share of noise at every step."""
    found = [criteria.of(plan) for plan in schedule.denoisers.values()]
    return any(criterion is not None and criterion.about.levels for criterion in found)


@dataclass(frozen=True, slots=True)
class Ready:
    """A schedule or a rule, checked against the pipeline.

    Attributes:
        source: The schedule, or the rule that makes one for each run.
        schedule: The schedule. Of a rule, one for any grid, which has the same sites.
        programs: The compiled plans, by denoiser and site. It is empty for a rule.
        deciding: Where criteria decide, by denoiser.
        predicts: Whether the schedule has predictions.
    """

    source: CacheSchedule | Rule
    schedule: CacheSchedule
    programs: dict[tuple[str, str], Program]
    deciding: Deciding
    predicts: bool


class Executor(host.LoopObserver):
    """Applies a schedule to one pipeline, between ``attach`` and ``detach``.

    Of several schedules, each run chooses the one for its number of steps when its loop begins. The layers are those
    that any of the schedules needs; a layer at a site that the run's schedule does not plan passes calls through.

    The layers on the pipeline hold the executor. The executor holds neither the pipeline nor a module.

    Args:
        pipe: The pipeline.
        source: The schedule, the rule that makes one for each run, or several of them by number of steps.
        sites: The modules of every site of the denoisers.
        strict: See ``diffcache.accelerate``.
        on_prediction: See ``OnPrediction``.
        store: The format in which all outputs are kept. None keeps the formats of the schedule.
        backend: What runs operations on tensors kept in fewer bytes.
        mismatch: What happens to a run that does not fit the schedule. ``"refuse"`` raises, ``"full"`` computes it in
            full.
        quiet: Whether to count notices without logging them and without warnings.

    Attributes:
        last: The state of the last run, or of the run in progress. It is None before the first run.
        runs: The number of runs that have begun.
        strays: The number of calls outside any loop since the last run began, by kind and text of their notice.
        totals: The number of times by kind of notice, over all runs and calls.

    Raises:
        DiffCacheError: All that ``diffcache.accelerate`` raises.
    """

    def __init__(
        self,
        pipe: Any,
        source: Source,
        sites: Sites,
        *,
        strict: bool = True,
        on_prediction: OnPrediction | None = None,
        store: str | None = None,
        backend: Backend = "auto",
        mismatch: Misfit = "refuse",
        quiet: bool = False,
    ) -> None:
        check_backend(backend)
        if mismatch not in get_args(Misfit):
            raise BadOption("mismatch", mismatch, ", ".join(map(repr, get_args(Misfit))))
        host.demand_no_other_cache(pipe)
        self.wrapping = host.Wrapping(pipe, sites)
        self.source = stored(source, store)
        self.store, self.backend = store, backend
        self.on_prediction = on_prediction
        self.strict = strict
        self.sites = {name: tuple(names) for name, names in sites.items()}
        self.networks = host.network_facts(pipe, {name: modules["model"][0] for name, modules in sites.items()})
        self.host = host.LoopWatcher(pipe, self)
        self.last: RunState | None = None
        self.mismatch, self.quiet = mismatch, quiet
        self._made: dict[tuple[Any, ...], tuple[CacheSchedule, dict[tuple[str, str], Program]]] = {}
        self.runs = 0
        self.strays: Counter[tuple[str, str]] = Counter()
        self.totals: Counter[str] = Counter()
        self._ready = {steps: self._checked(pipe, one, sites) for steps, one in members(self.source).items()}
        schedules = [ready.schedule for ready in self._ready.values()]
        self._patches = make_patches(Wrappers(self.host, self._misfit), schedules, sites)

    def _checked(self, pipe: Any, source: CacheSchedule | Rule, sites: Sites) -> Ready:
        """Check a schedule or a rule against the pipeline, and compile a schedule."""
        if isinstance(source, CacheSchedule):
            check_networks(source, sites, host.host_name(pipe), strict=self.strict)
            check_noise_scheduler(host.noise_scheduler(pipe), source, strict=self.strict)
            schedule = source
            check_criteria(schedule)
            programs = compile_schedule(schedule)
        else:
            check_granularity(source, sites)
            # On any grid: errors of the rule are raised now, and its sites do not depend on the grid
            schedule, programs = scheduled(source, any_grid(self.networks), self.sites, self.store), {}
            check_criteria(schedule)
        check_in_parts(host.in_parts(pipe), schedule)
        demand_visible(schedule, {name: found["model"][0] for name, found in sites.items()})
        predicts = any(not plan.compute.all() for _, _, plan in schedule.plans())
        return Ready(source, schedule, programs, deciding_stacks(schedule, sites), predicts)

    def attach(self) -> None:
        """Put all layers on the pipeline. If that fails, remove them again."""
        try:
            for patch in self._patches:
                patch.apply()
            self.host.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove all layers. The pipeline is then as it was before ``attach``."""
        try:
            self.host.detach()
        finally:
            for patch in self._patches:
                patch.undo()

    def loop_awaited(self) -> None:
        """Check the pipeline before a run, and put the layers on top of other wrappers."""
        self.wrapping.demand_unchanged(self.host.pipe)
        host.demand_ready(self.host.pipe)
        for patch in self._patches:
            patch.apply()

    def loop_began(self, run: host.LoopRun) -> None:
        """Give a run that begins its state."""
        self.loop_awaited()
        try:
            state = self._planned(run)
        except ScheduleMismatch as why:
            if self.mismatch == "refuse":
                raise
            state = self._in_full(why)
        self.last = run.state = state
        self.runs += 1
        self.strays.clear()

    def _planned(self, run: host.LoopRun) -> RunState:
        """Return the state of a run.

        Raises:
            ScheduleMismatch: The schedule does not fit the run.
            UnsupportedModel: The schedule cannot run on the pipeline in its present state.
        """
        pipe, ready = self.host.pipe, self._ready_for(run)
        in_parts = host.in_parts(pipe)
        if isinstance(ready.source, Rule):
            schedule, programs = self._made_by(ready.source, run)
        else:
            schedule, programs = ready.schedule, ready.programs
            check_run(run, schedule, host.guidance_values(pipe), strict=self.strict)
        run.assigned.expect(schedule.layout.names)
        check_in_parts(in_parts, schedule)
        demand_visible(schedule, self.wrapping.denoisers)
        levels_back = move_levels(pipe, run, schedule)  # last: nothing after it can fail
        return RunState(
            schedule,
            programs,
            start=run.start,
            together=bool(in_parts),
            levels_back=levels_back,
            on_prediction=self.on_prediction,
            backend=self.backend,
            deciding=ready.deciding,
            predicts=ready.predicts,
            levels=host.noise_shares(run.scheduler, run.timesteps) if _reads_levels(schedule) else None,
            chosen=f"{title(ready.source)}, of those for {self.source.covered} steps"
            if isinstance(self.source, BySteps)
            else "",
        )

    def _ready_for(self, run: host.LoopRun) -> Ready:
        """Return the schedule or the rule of a run.

        Raises:
            ScheduleMismatch: None covers its number of steps.
        """
        if isinstance(self.source, BySteps):
            self.source.of(run.steps)
            return self._ready[run.steps]
        return self._ready[None]

    def _made_by(self, rule: Rule, run: host.LoopRun) -> tuple[CacheSchedule, dict[tuple[str, str], Program]]:
        """Return the schedule that a rule makes for a run, and its programs. Runs of one loop share them."""
        grid = grid_of(run, self.networks, host.guidance_values(self.host.pipe))
        scheduler = run.scheduler
        levels = getattr(scheduler, "sigmas", None)
        key = (
            str(rule),
            grid.timesteps.tobytes(),
            grid.start,
            grid.guided,
            type(scheduler),
            repr(getattr(scheduler, "config", None)),
            levels.detach().cpu().numpy().tobytes() if isinstance(levels, Tensor) else None,
        )
        if key not in self._made:
            schedule = scheduled(rule, grid, self.sites, self.store)
            check_criteria(schedule)
            while len(self._made) >= MOST_MADE:
                self._made.pop(next(iter(self._made)))
            self._made[key] = schedule, compile_schedule(schedule)
        return self._made[key]

    def _in_full(self, why: ScheduleMismatch) -> RunState:
        """Return a state in which every step is computed and nothing is kept, for any number of steps.

        Args:
            why: The reason, for the notice.
        """
        state = RunState(scheduled(Rule("full"), Grid(np.ones(1)), self.sites), programs={})
        state.notices.append(Notice("mismatch", 1, f"the run was computed in full: {why}"))
        return state

    def _misfit(self, run: host.LoopRun, why: ScheduleMismatch) -> None:
        """Compute the rest of a run in full, because its first forwards show that the schedule does not fit.

        Nothing has been predicted yet.

        Raises:
            ScheduleMismatch: Mismatches are refused, or the schedule has moved noise levels, which the run has used.
        """
        before: RunState = run.state
        if self.mismatch == "refuse" or before.schedule.sigmas is not None:
            raise why
        state = self._in_full(why)
        state.forwards, state.counts = before.forwards, before.counts
        before.drop_tensors()
        self.last = run.state = state

    def loop_went_back(self, run: host.LoopRun) -> None:
        """Drop the kept outputs of a run that enters an earlier step."""
        run.state.go_back()

    def loop_ended(self, run: host.LoopRun) -> None:
        """Drop the tensors of a run that is over, and publish its notices. A second call does nothing."""
        state: RunState = run.state
        state.levels_back()
        state.levels_back = lambda: None  # releases the noise scheduler
        state.drop_tensors()
        if state.over:
            return
        state.over = True
        state.notices += about_finiteness(state)
        if run.short:
            state.notices.append(
                Notice(
                    "short-loop",
                    1,
                    f"the loop ended in step {run.index + 1} of {run.steps}: its network was called less often than "
                    "trajectory was asked to expect, so steps may have been counted wrongly. Pass trajectory one "
                    "timestep for each evaluation.",
                )
            )
        elif run.index >= run.steps or (run.forwards and run.whole):
            state.notices += about_work(state, predicts=state.predicts and bool(state.programs))
        if run.cut:
            state.notices.append(
                Notice(
                    "short-steps",
                    1,
                    f"{run.cut} steps of the loop have fewer forwards than trajectory was asked to expect, as the "
                    f"times that the network received show. {ADVICE}",
                )
            )
        state.notices += end_notices(run)
        self._publish([*state.failures(), *state.notices])

    def missed(self, kind: str, why: str) -> None:
        """Count and publish a notice about a call outside any loop."""
        self.wrapping.demand_unchanged(self.host.pipe)
        self.strays[kind, why] += 1
        self._publish([Notice(kind, 1, why)])

    def notices(self) -> list[Notice]:
        """Return the notices of the last run, or of the run in progress, and of later calls outside any loop."""
        found = [] if self.last is None else [*self.last.failures(), *self.last.notices]
        return found + [Notice(kind, times, why) for (kind, why), times in self.strays.items()]

    def _publish(self, notices: Sequence[Notice]) -> None:
        """Count notices, and publish them unless the executor is quiet."""
        self.totals += counted(notices)
        if not self.quiet:
            publish(notices, pipeline=host.host_name(self.host.pipe), run=self.runs)
