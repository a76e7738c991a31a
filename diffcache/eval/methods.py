"""Define the methods that an evaluation compares: how a pipeline is run, and the name of the method in the table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from diffcache import host
from diffcache.api import Schedule, accelerated, resolve_all
from diffcache.documents.checks import is_unicode
from diffcache.documents.context import ScheduleContext
from diffcache.documents.schedule import CacheSchedule, check_store
from diffcache.errors import BadOption, Unusable
from diffcache.eval.noise_schedulers import better_noise_scheduler, noise_free_scheduler, noise_scheduler_name
from diffcache.executor.by_steps import BySteps, Source, title
from diffcache.host.digest import TO_DIGEST, NoDigestError
from diffcache.schedulers import Rule, function
from diffcache.schedulers.uniform import evenly, reuse

Kind = Literal["full", "ours", "fewer steps", "reuse", "peer"]

FULL = "full run"
STEPS = "num_inference_steps"
LONGEST_NAME = 200  # characters in the name of a method


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to run a pipeline.

    Attributes:
        name: Name in the table.
        kind: Group of the method: the full run, a schedule or rule of this library, a run with fewer steps, uniform
            reuse, or a method of another package ("peer").
        on: Returns a context manager that applies the method to the pipeline, and removes it without a trace.
        change: Arguments of the call that the method replaces.
        source: The schedule or the rule of the method, if it has one; or several of them by number of steps.
        store: Format in which the outputs of ``source`` are kept. None: as it states.
        detail: Settings, for readers. If ``on`` captures an object without a digest, results are stored under the name
            and this text.

    Raises:
        BadOption: If the name is not Unicode text of 1 to LONGEST_NAME characters.
    """

    name: str
    kind: Kind
    on: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext
    change: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    detail: str = ""
    store: str | None = None

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not is_unicode(name):
            raise BadOption("name", ascii(name)[:80], f"Unicode text of 1 to {LONGEST_NAME} characters")

    @property
    def digest(self) -> str:
        """A digest of everything that decides how the method runs.

        It includes the code of ``on`` and the values that it captures.

        Raises:
            BadOption: If ``on`` has no digest and ``detail`` is empty, or if ``change`` has no digest.
        """
        change = host.digest_of_call(self.change, "change")
        told = [self.name, self.kind, change, self.detail]
        try:
            return host.digest_of([*told, self.source, _function_of(self.source), self.on])
        except NoDigestError as error:
            if self.detail and self.source is None:
                return host.digest_of(told)
            raise Unusable(
                f"detail={self.detail!r}",
                f"`on` of the method {self.name!r} has {error.what} at {error.where or 'the top'}, which a later run "
                "cannot recognise",
                f"Pass a text that names all settings of the method, or give the object {TO_DIGEST}",
            ) from None

    def for_steps(self, steps: int) -> Method:
        """Return the method for calls of ``steps`` steps. It differs if there are several schedules by number of steps.

        Raises:
            ScheduleMismatch: If there are several schedules, and none is for ``steps`` steps.
        """
        return ours(self.name, self.source.of(steps), store=self.store) if isinstance(self.source, BySteps) else self


def _function_of(source: Source | None) -> Any:
    """Return the function of a rule, which may be the user's; None if ``source`` is not a rule."""
    return function(source.name, "rule", source.options) if isinstance(source, Rule) else None


def full() -> Method:
    """Return the method that runs the pipeline unchanged."""
    return Method(name=FULL, kind="full")


def ours(name: str, source: Schedule, *, store: str | None = None) -> Method:
    """Return the method that accelerates the pipeline by a schedule or a rule.

    Args:
        name: Name in the table.
        source: A schedule, a rule, a path or a Hub id; or several by number of steps: a schedule set, its path, or a
            dictionary. The evaluation uses the one for the steps of its calls.
        store: Format in which outputs are kept. None: as the schedule states.

    Raises:
        BadOption: If ``store`` is not the name of a format.
        DiffCacheError: If ``source`` is not valid; see :func:`diffcache.accelerate`.
    """
    found = resolve_all(source)
    if store is not None:
        check_store(store)
    if isinstance(found, CacheSchedule):
        detail = found.provenance.get("scheduler", "")
    else:
        detail = title(found) if isinstance(found, BySteps) else str(found)
    given: Schedule = dict(found.sources) if isinstance(found, BySteps) else found
    return Method(
        name=name,
        kind="ours",
        on=lambda pipe: accelerated(pipe, given, store=store),
        source=found,
        detail=detail + (f", kept in {store}" if store else ""),
        store=store,
    )


def fewer_steps(pipe: Any, steps: int, *, better: bool = False, solver: tuple[str, Any] | None = None) -> Method:
    """Return the method that takes ``steps`` steps without a cache.

    Args:
        pipe: The pipeline or the policy.
        steps: Number of steps.
        better: Whether to use a noise scheduler that is better at few steps, if there is one.
        solver: A name and a noise scheduler to use instead. None: the pipeline's own, or the better one.
    """
    scheduler = host.noise_scheduler(pipe)
    known = solver or (better_noise_scheduler(scheduler) if better else None)
    return _of_steps(host.traits(pipe), steps, noise_scheduler_name(scheduler), known)


def _of_steps(traits: host.Traits, steps: int, own: str, known: tuple[str, Any] | None) -> Method:
    """Return the method that takes ``steps`` steps without a cache.

    Args:
        traits: The facts about the kind of the pipeline.
        steps: Number of steps.
        own: The name of the pipeline's noise scheduler.
        known: A name and a noise scheduler to use instead; None for the pipeline's own.
    """
    change = {traits.steps_argument or STEPS: steps}
    if traits.has_step_setting:
        name, put = known or (own, None)
        return Method(name=f"{steps} steps, {name}", kind="fewer steps", on=_of_policy(steps, put), change=change)
    if known is None:
        return Method(name=f"{steps} steps, {own}", kind="fewer steps", change=change)
    name, put = known

    @contextlib.contextmanager
    def swapped(pipe: Any) -> Iterator[None]:
        before, pipe.scheduler = pipe.scheduler, put
        try:
            yield
        finally:
            pipe.scheduler = before

    detail = f"noise scheduler {type(put).__name__}"
    return Method(name=f"{steps} steps, {name}", kind="fewer steps", on=swapped, change=change, detail=detail)


def _of_policy(steps: int, solver: Any) -> Callable[[Any], AbstractContextManager[Any]]:
    """Return a context manager that makes a policy take ``steps`` steps, in calls by this library and by a task."""

    @contextlib.contextmanager
    def on(loop: Any) -> Iterator[None]:
        before = loop.scheduler
        if solver is not None:
            loop.scheduler = solver
        try:
            with loop.of_steps(steps):
                yield
        finally:
            if solver is not None:
                loop.scheduler = before

    return on


def uniform_reuse(pipe: Any, steps: int, computed: int) -> Method:
    """Return the method that computes ``computed`` evenly spaced steps and reuses the newest output of the denoiser."""
    return _reusing(tuple(host.denoisers(pipe)), steps, computed)


def _reusing(denoisers: Sequence[str], steps: int, computed: int) -> Method:
    """Return the method of ``uniform_reuse`` for denoisers of these names."""
    schedule = evenly_reused(denoisers, steps, computed)
    return Method(
        name=f"uniform reuse, {computed} computed",
        kind="reuse",
        on=lambda pipe: accelerated(pipe, schedule),
        source=schedule,
    )


def evenly_reused(denoisers: Sequence[str], steps: int, computed: int) -> CacheSchedule:
    """Return the schedule of ``uniform_reuse``."""
    plan = reuse(evenly(steps, computed))
    return ScheduleContext(steps=steps).schedule({name: {"model": plan} for name in denoisers})


def baselines(pipe: Any, steps: int, budgets: Sequence[int], *, fewer: bool = True) -> list[Method]:
    """Return the methods that every budget of computed steps is compared with.

    Args:
        pipe: The pipeline, the policy or the loop.
        steps: Number of steps of the full run.
        budgets: Numbers of computed steps.
        fewer: Whether the pipeline can be run with fewer steps. If so, its own noise scheduler is compared too.
    """
    found = []
    traits, scheduler, denoisers = host.traits(pipe), host.noise_scheduler(pipe), tuple(host.denoisers(pipe))
    own = noise_scheduler_name(scheduler)
    solvers = [noise_free_scheduler(scheduler), better_noise_scheduler(scheduler)] if traits.swaps_scheduler else []
    for computed in sorted({b for b in budgets if 0 < b < steps}, reverse=True):
        if fewer:
            found.append(_of_steps(traits, computed, own, None))
        found += [_of_steps(traits, computed, own, solver) for solver in solvers if solver is not None]
        found.append(_reusing(denoisers, steps, computed))
    return found
