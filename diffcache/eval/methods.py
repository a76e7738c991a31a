"""What is compared: a way of running a pipeline, and what it is to be called in the table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffcache import host
from diffcache.api import accelerated, resolve
from diffcache.documents.checks import is_unicode
from diffcache.documents.context import ScheduleContext
from diffcache.documents.schedule import CacheSchedule, check_store
from diffcache.errors import BadOption
from diffcache.eval.noise_schedulers import better_noise_scheduler, noise_free_scheduler, noise_scheduler_name
from diffcache.host.digest import TO_DIGEST, NoDigestError
from diffcache.schedulers import Rule, function
from diffcache.schedulers.uniform import evenly, reuse

Kind = Literal["full", "ours", "fewer steps", "reuse", "peer"]

FULL = "full run"
STEPS = "num_inference_steps"
LONGEST_NAME = 200  # characters, of a method


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way of running a pipeline.

    on      puts it on the pipeline for the length of a ``with`` block, and leaves no trace
    change  arguments of the call that it replaces
    source  the schedule or rule, where it is one of ours
    detail  settings, for the reader. Where ``on`` captures what has no digest, results are kept under name and detail
    """

    name: str
    kind: Kind
    on: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext
    change: Mapping[str, Any] = field(default_factory=dict)
    source: CacheSchedule | Rule | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not is_unicode(name):
            raise BadOption("name", ascii(name)[:80], f"Unicode text of 1 to {LONGEST_NAME} characters")

    @property
    def digest(self) -> str:
        """A digest of what decides how it runs; the code of ``on`` and the values that it captures are part of it.

        Raises BadOption if ``on`` has no digest and ``detail`` is empty, or if ``change`` has no digest.
        """
        change = host.digest_of_call(self.change, "change")
        told = [self.name, self.kind, change, self.detail]
        try:
            return host.digest_of([*told, self.source, _function_of(self.source), self.on])
        except NoDigestError as error:
            if self.detail and self.source is None:
                return host.digest_of(told)
            raise BadOption(
                "detail",
                self.detail,
                f"a text that names all settings of the method {self.name!r}, for its `on` has {error.what} at "
                f"{error.where or 'the top'}. Or give the object {TO_DIGEST}",
            ) from None


def _function_of(source: CacheSchedule | Rule | None) -> Any:
    """Return the function of a rule, which may be the user's."""
    return function(source.name, "rule", source.options) if isinstance(source, Rule) else None


def full() -> Method:
    """The pipeline as it is."""
    return Method(name=FULL, kind="full")


def ours(name: str, source: CacheSchedule | Rule | str | Path, *, store: str | None = None) -> Method:
    """Accelerated by a schedule or a rule. Raises what :func:`diffcache.accelerate` raises for what cannot be one."""
    found = resolve(source)
    if store is not None:
        check_store(store)
    return Method(
        name=name,
        kind="ours",
        on=lambda pipe: accelerated(pipe, found, store=store),
        source=found,
        detail=(found.provenance.get("scheduler", "") if isinstance(found, CacheSchedule) else str(found))
        + (f", kept in {store}" if store else ""),
    )


def fewer_steps(pipe: Any, steps: int, *, better: bool = False, solver: tuple[str, Any] | None = None) -> Method:
    """So many steps and no cache: with the pipeline's own noise scheduler, with a ``better`` one for few steps, or with
    ``solver``, a name and a noise scheduler."""
    own, known = noise_scheduler_name(pipe), solver or (better_noise_scheduler(pipe) if better else None)
    if host.traits(pipe).has_step_setting:
        name, put = known or (own, None)
        change = {STEPS: steps}
        return Method(name=f"{steps} steps, {name}", kind="fewer steps", on=_of_policy(steps, put), change=change)
    if known is None:
        return Method(name=f"{steps} steps, {own}", kind="fewer steps", change={STEPS: steps})
    name, put = known

    @contextlib.contextmanager
    def swapped(pipe: Any) -> Iterator[None]:
        before, pipe.scheduler = pipe.scheduler, put
        try:
            yield
        finally:
            pipe.scheduler = before

    detail = f"noise scheduler {type(put).__name__}"
    change = {STEPS: steps}
    return Method(name=f"{steps} steps, {name}", kind="fewer steps", on=swapped, change=change, detail=detail)


def _of_policy(steps: int, solver: Any) -> Callable[[Any], AbstractContextManager[Any]]:
    """Return what makes a policy take so many steps, in calls by this library and by a task."""

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
    """The newest output of the denoiser, reused between ``computed`` evenly spread steps."""
    schedule = evenly_reused(tuple(host.denoisers(pipe)), steps, computed)
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
    """What every budget of computed steps has to stand beside. ``fewer``: than it has, if it can be told; of a loop of
    one's own with the solver that is written into it."""
    found = []
    solvers = [noise_free_scheduler(pipe), better_noise_scheduler(pipe)] if host.traits(pipe).swaps_scheduler else []
    for computed in sorted({b for b in budgets if 0 < b < steps}, reverse=True):
        if fewer:
            found.append(fewer_steps(pipe, computed))
        found += [fewer_steps(pipe, computed, solver=solver) for solver in solvers if solver is not None]
        found.append(uniform_reuse(pipe, steps, computed))
    return found
