"""Define the schedule set, one document that holds schedules for several numbers of steps. Pure data, numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from diffcache.documents import checks
from diffcache.documents.checks import put, refuse
from diffcache.documents.document import Document
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, Unusable
from diffcache.text import card, printable

MOST_LISTED = 4  # schedules that the line at the prompt lists one by one


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ScheduleSet(Document):
    """Schedules of one pipeline for several numbers of steps, in one file.

    :func:`diffcache.accelerate` takes the set or its path. Each run uses the schedule for its number of steps.

    Attributes:
        schedules: Number of steps, in iterations of the loop -> the schedule for it; at least one. All schedules are
            for the same networks.

    Raises:
        DocumentError: If there is no schedule, a key is not the number of steps of its schedule, or two schedules are
            for different networks.

    Example:
        >>> schedules = diffcache.ScheduleSet({28: schedule, 50: longer})
        >>> path = schedules.save("flux.safetensors")
        >>> pipe = diffcache.accelerate(pipe, "flux.safetensors")
        >>> schedule = diffcache.ScheduleSet.load("flux.safetensors")[28]
    """

    FORMAT: ClassVar[str] = "diffcache.schedule_set"
    VERSION: ClassVar[int] = 1  # holds schedules in version 3 of their format; a new one there makes a new one here
    FILENAME: ClassVar[str] = "schedules.safetensors"
    ADVICE: ClassVar[Mapping[str, str]] = MappingProxyType(
        {CacheSchedule.FORMAT: "The file holds one schedule: read it with CacheSchedule.load."}
    )

    schedules: Mapping[int, CacheSchedule]

    def __post_init__(self) -> None:
        me = type(self).__name__
        if not isinstance(self.schedules, Mapping):
            allowed = "a mapping, number of steps -> CacheSchedule"
            refuse(me, "schedules", f"found {type(self.schedules).__name__}", allowed, "Write {28: a, 50: b}.")
        found: dict[int, CacheSchedule] = {}
        for key, schedule in self.schedules.items():
            steps = checks.count(me, "schedules", key, least=1)
            if steps in found:
                refuse(me, "schedules", f"found {steps} twice", "one schedule for each number of steps")
            found[steps] = checks.instance(me, f"schedules/{steps}", schedule, CacheSchedule)
            if schedule.steps != steps:
                what = f"a schedule of {schedule.steps} steps"
                refuse(me, f"schedules/{steps}", f"found {what}", f"a schedule of {steps} steps", "Correct the key.")
        if not found:
            refuse(me, "schedules", "found none", "at least one schedule")
        put(self, schedules=MappingProxyType(dict(sorted(found.items()))))
        _check_networks(me, self.schedules)

    @classmethod
    def of(cls, *schedules: CacheSchedule) -> ScheduleSet:
        """Return the set of these schedules. Each is stored under its own number of steps.

        Raises:
            DocumentError: If there is none, two are for the same number of steps, or the set is not valid.
        """
        me = cls.__name__
        found: dict[int, CacheSchedule] = {}
        for schedule in schedules:
            steps = checks.instance(me, "schedules", schedule, CacheSchedule).steps
            if steps in found:
                refuse(me, "schedules", f"found two of {steps} steps", "one schedule for each number of steps")
            found[steps] = schedule
        return cls(found)

    def __getitem__(self, steps: int) -> CacheSchedule:
        """Return the schedule for a number of steps.

        Raises:
            BadOption: If the set has none. The error lists those that it has.
        """
        if isinstance(steps, bool) or steps not in self.schedules:
            raise BadOption("steps", steps, f"{self.covered}, the numbers of steps of this ScheduleSet")
        return self.schedules[steps]

    def __iter__(self) -> Iterator[int]:
        """Return an iterator over the numbers of steps, in rising order."""
        return iter(self.schedules)

    def __len__(self) -> int:
        return len(self.schedules)

    @property
    def covered(self) -> str:
        """The numbers of steps as text."""
        return ", ".join(map(str, self.schedules))

    def check_file(self, where: str) -> None:
        """Raise DocumentError if a schedule is not allowed in a file. See ``CacheSchedule.check_file``.

        Args:
            where: Name of the document in errors.
        """
        for schedule in self.schedules.values():
            schedule.check_file(where)

    def describe(self) -> str:
        """Return a summary for readers: for each number of steps, the summary of its schedule."""
        plural = "s" * (len(self) != 1)
        lines = [f"{len(self)} schedule{plural}, for runs of {self.covered} steps"]
        for steps, schedule in self.schedules.items():
            lines += ["", f"{steps} steps", *(f"  {line}" for line in schedule.describe().splitlines())]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        plans = [(name, plan) for one in self.schedules.values() for name, plan in one.denoisers.items()]
        networks = dict.fromkeys(plan.class_name or name for name, plan in plans)
        counts = [f"{one.computed_steps} of {one.called.sum()} steps" for one in self.schedules.values()]
        if len(counts) > MOST_LISTED:
            counts = [f"{len(counts)} schedules of {min(self.schedules)} to {max(self.schedules)} steps"]
        return f"<ScheduleSet {printable(', '.join([*counts, *networks]))}>"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, for notebooks."""
        return card("ScheduleSet", self.describe())


def demand_one(name: str, value: object) -> CacheSchedule:
    """Return ``value`` if it is a schedule. If it is a set, the error says how to take one out.

    Args:
        name: Name of the argument, for errors.
        value: The value.

    Raises:
        BadOption: If it is not a schedule.
    """
    if isinstance(value, ScheduleSet):
        found = f"it is a ScheduleSet, for {value.covered} steps, and one schedule is needed"
        raise Unusable(name, found, f"Take one out: schedules[{next(iter(value))}]")
    if not isinstance(value, CacheSchedule):
        raise BadOption(name, type(value).__name__, "a CacheSchedule")
    return value


def _check_networks(where: str, schedules: Mapping[int, CacheSchedule]) -> None:
    """Raise DocumentError if two schedules are for different networks. A schedule that fits any network fits all."""
    first, *_ = schedules
    names = schedules[first].denoisers
    known: dict[tuple[str, str], tuple[int, str]] = {}  # (denoiser, field) -> the first schedule that states it
    for steps, schedule in schedules.items():
        if names.keys().isdisjoint(schedule.denoisers):
            found = f"found plans for {', '.join(schedule.denoisers)}"
            _refuse_network(where, f"{steps}/denoisers", found, f"plans for {', '.join(names)}", first)
        for name, plan in schedule.denoisers.items():
            for field in ("class_name", "config_digest"):
                value = getattr(plan, field)
                if value is None:
                    continue
                other, wanted = known.setdefault((name, field), (steps, value))
                if value != wanted:
                    _refuse_network(where, f"{steps}/{name}/{field}", f"found {value}", wanted, other)


def _refuse_network(where: str, field: str, found: str, wanted: str, other: int) -> None:
    allowed = f"{wanted}, as in the schedule of {other} steps"
    refuse(
        where, field, found, allowed, "All schedules of a set are for one pipeline: save the others to another file."
    )
