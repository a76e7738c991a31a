"""Choose among several schedules by the number of steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import ScheduleMismatch, Unusable
from diffcache.schedulers import Rule


@dataclass(frozen=True, slots=True)
class BySteps:
    """Schedules and rules for runs of different numbers of steps.

    Attributes:
        sources: Number of steps -> the schedule or the rule. Steps are iterations of the loop.

    Raises:
        BadOption: There is none, a key is not a number of steps, or a schedule is of another number of steps.
    """

    sources: Mapping[int, CacheSchedule | Rule]

    def __post_init__(self) -> None:
        if not self.sources:
            raise Unusable("schedule", "the dictionary is empty", "Pass a dictionary, number of steps -> schedule")
        for steps, source in self.sources.items():
            if not host.is_count(steps, 1):
                allowed = "Pass whole numbers of steps as keys, such as {28: schedule, 50: other}"
                raise Unusable("schedule", f"the dictionary has the key {steps!r:.80}", allowed)
            if isinstance(source, CacheSchedule) and source.steps != steps:
                allowed = f"Use the key {source.steps}: the number of its steps, in iterations of the loop"
                raise Unusable("schedule", f"the key {steps} holds a schedule of {source.steps} steps", allowed)

    def of(self, steps: int) -> CacheSchedule | Rule:
        """Return the schedule or the rule for a run of ``steps`` steps.

        Raises:
            ScheduleMismatch: There is none.
        """
        if steps not in self.sources:
            raise ScheduleMismatch(
                f"no schedule is given for {steps} steps. Covered: {self.covered} steps. Pass one of these numbers, or "
                f"add a schedule for {steps}; mismatch='full' computes such runs in full."
            )
        return self.sources[steps]

    @property
    def covered(self) -> str:
        """Return the covered numbers of steps as text."""
        return ", ".join(map(str, sorted(self.sources)))


Source = CacheSchedule | Rule | BySteps


def members(source: Source) -> Mapping[int | None, CacheSchedule | Rule]:
    """Return number of steps -> schedule or rule. One for runs of any number of steps has the key None."""
    if isinstance(source, BySteps):
        return {steps: source.of(steps) for steps in source.sources}
    return {None: source}


def stored(source: Source, how: str | None) -> Source:
    """Return the source with outputs kept in one format, where it holds schedules. None keeps their formats."""
    if how is None or isinstance(source, Rule):
        return source
    if isinstance(source, CacheSchedule):
        return source.stored(how)
    made = {n: one.stored(how) if isinstance(one, CacheSchedule) else one for n, one in source.sources.items()}
    return BySteps(made)


def title(source: Source) -> str:
    """Return how errors and reports refer to ``source``."""
    if isinstance(source, BySteps):
        return f"schedules of {source.covered} steps"
    if isinstance(source, Rule):
        return f"the rule {str(source)!r}"
    return f"a schedule of {source.steps} steps ({source.provenance.get('scheduler', 'hand-made')})"


class _SeenError(Exception):
    """Ends a call of the pipeline when its loop begins."""


def for_call(pipe: Any, source: Source, call: Mapping[str, Any]) -> CacheSchedule | Rule:
    """Return the schedule or the rule for ``pipe(**call)``.

    If only a run shows the number of steps, the call runs until its loop begins.

    Raises:
        ScheduleMismatch: None covers the steps of the call.
    """
    if not isinstance(source, BySteps):
        return source
    steps = host.iterations(pipe, call)
    return source.of(_steps_seen(pipe, call) if steps is None else steps)


def _steps_seen(pipe: Any, call: Mapping[str, Any]) -> int:
    """Run a call until its loop begins, and return the number of steps of the loop."""
    seen: list[int] = []

    class Observer(host.LoopObserver):
        def loop_began(self, run: host.LoopRun) -> None:
            seen.append(run.steps)
            raise _SeenError

    watcher = host.LoopWatcher(pipe, Observer())
    watcher.attach()
    try:
        pipe(**call)
    except _SeenError:
        return seen[-1]
    finally:
        watcher.detach()
    raise ScheduleMismatch(f"the call of this {host.host_name(pipe)} has no loop, so its number of steps is not known.")
