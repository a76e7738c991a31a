"""Check that a saved part of an evaluation is valid and belongs to a run, because its file may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from diffcache.documents import checks
from diffcache.documents.checks import refuse
from diffcache.documents.schedule import StoreFormat

Part = dict[str, Any]
Span = tuple[float, float]

SLACK = 1e-4  # rounding at the ends of a metric's range
FIELDS = (
    *("key", "method", "call", "prompts", "seeds", "flops", "errors", "sizes", "cache_bytes", "schedule"),
    *("seconds", "peak_bytes", "scores", "pictures"),
)


@dataclass(frozen=True, slots=True)
class Due:
    """The part that a run requires.

    Attributes:
        key: Digest of everything that the part depends on.
        method: Name of the method.
        call: Index of the call.
        prompts: One prompt for every sample.
        seeds: One seed for every sample; None if it is not known.
        scores: Metric -> its least and its greatest value.
        optional: Metrics that a part may lack.
        scheduled: Whether the part may contain the schedule that ran.
        pictures: Number of pictures.
    """

    key: str
    method: str
    call: int
    prompts: list[str]
    seeds: list[int | None]
    scores: Mapping[str, Span]
    optional: frozenset[str]
    scheduled: bool
    pictures: int


def demand_sound(where: str, part: Part, due: Due) -> None:
    """Raise DocumentError, naming ``where`` and the field, unless the part matches ``due`` and is possible."""
    for name in sorted(part.keys() ^ set(FIELDS)):
        refuse(where, name, "the field is missing" if name in FIELDS else "the field is unknown", ", ".join(FIELDS))
    for name in ("key", "method", "call", "prompts", "seeds"):
        wanted = getattr(due, name)
        if not _alike(part[name], wanted):
            refuse(where, name, f"found {part[name]!r:.80}", f"{wanted!r:.80}")
    for name in ("flops", "cache_bytes", "peak_bytes"):
        if part[name] is not None:
            checks.count(where, name, part[name], least=0)
    _seconds(where, part["seconds"])
    _states(where, part["errors"], part["sizes"])
    _scores(where, part["scores"], due)
    if part["schedule"] is not None:
        if not due.scheduled:
            refuse(where, "schedule", "found a schedule", "none for this method")
        _schedule(where, part["schedule"])
    digests = _object(where, "pictures", part["pictures"])
    if len(digests) != due.pictures:
        refuse(where, "pictures", f"found {len(digests)}", f"{due.pictures}")
    for name, digest in digests.items():
        checks.sha256(where, f"pictures/{name}", digest)


def _seconds(where: str, found: object) -> None:
    clock = _object(where, "seconds", found, ("loop", "pipeline"))
    loop, pipeline = (checks.real(where, f"seconds/{name}", clock[name], least=0) for name in ("loop", "pipeline"))
    if loop > pipeline * (1 + SLACK):
        refuse(where, "seconds", f"found {loop:g} s in the loop", f"at most the {pipeline:g} s of the whole call")


def _states(where: str, errors: object, sizes: object) -> None:
    for n, size in enumerate(_list(where, "sizes", sizes)):
        checks.real(where, f"sizes/{n}", size, least=0)
    if errors is None:
        return
    if len(_list(where, "errors", errors)) != len(_list(where, "sizes", sizes)):
        refuse(where, "errors", f"found {len(_list(where, 'errors', errors))}", "one for each of the sizes")
    for n, error in enumerate(_list(where, "errors", errors)):
        if error is not None:  # a state that is not finite has no distance
            checks.real(where, f"errors/{n}", error, least=0)


def _scores(where: str, found: object, due: Due) -> None:
    scores = _object(where, "scores", found)
    for name in sorted(scores.keys() ^ due.scores.keys()):
        if name not in due.scores or name not in due.optional:
            refuse(where, f"scores/{name}", "missing or not asked for", ", ".join(sorted(due.scores)))
    for name, values in scores.items():
        low, high = due.scores[name]
        field = f"scores/{name}"
        if len(_list(where, field, values)) != len(due.prompts):
            refuse(where, field, f"found {len(values)} values", f"{len(due.prompts)}, one for each sample")
        for value in values:
            if not low - SLACK <= checks.real(where, field, value) <= high + SLACK:
                refuse(where, field, f"found {value:g}", f"{low:g} to {high:g}, which the metric can give")


def _schedule(where: str, found: object) -> None:
    lengths = set()
    denoisers = _object(where, "schedule/denoisers", _object(where, "schedule", found, ("denoisers",))["denoisers"])
    for name, sites in denoisers.items():
        checks.component(where, "schedule/denoisers", name)
        for site, plan in _object(where, f"schedule/{name}", sites).items():
            field = f"schedule/{name}/{site}"
            checks.site(where, field, site)
            plan = _object(where, field, plan, ("compute", "store"))
            steps = _list(where, f"{field}/compute", plan["compute"])
            lengths.add(len(steps))
            if not steps or not all(_alike(step, 0) or _alike(step, 1) for step in steps):
                refuse(where, f"{field}/compute", f"found {steps!r:.80}", "a 0 or 1 for each step")
            if plan["store"] is not None and plan["store"] not in get_args(StoreFormat):
                refuse(where, f"{field}/store", f"found {plan['store']!r:.80}", ", ".join(get_args(StoreFormat)))
    if len(lengths) != 1:
        refuse(where, "schedule", f"found sites of {sorted(lengths)} steps", "sites, all of as many steps")


def _object(where: str, field: str, value: object, names: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or (names is not None and set(value) != set(names)):
        refuse(where, field, f"found {value!r:.80}", f"an object{'' if names is None else ' of ' + ', '.join(names)}")
    return value


def _list(where: str, field: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        refuse(where, field, f"found {value!r:.80}", "a list")
    return value


def _alike(found: object, wanted: object) -> bool:
    """Return whether two values are equal and of one type: True differs from 1, and 0.0 from 0."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_alike, found, wanted))
    return type(found) is type(wanted) and found == wanted
