"""Check the fields of a record against the types in docs/evaluation-record.md.

A record may lack fields, which the table and the report then leave out. Fields that are present must have their type;
otherwise the table and the report would fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffcache.documents.checks import refuse

Check = Callable[[str, str, Any], None]  # (file, field, value): raises DocumentError


def demand_fields(where: str, record: Mapping[str, Any]) -> None:
    """Raise DocumentError, naming ``where`` and the field, unless all fields of the record have documented types."""
    RECORD(where, "", record)


def _plain(kinds: tuple[type, ...], allowed: str) -> Check:
    def check(where: str, field: str, value: Any) -> None:
        right = isinstance(value, kinds) and (isinstance(value, bool) <= (bool in kinds))
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            refuse(where, field, f"found {value!r:.80}", allowed)

    return check


def _or_null(check: Check) -> Check:
    return lambda where, field, value: None if value is None else check(where, field, value)


def _list(check: Check) -> Check:
    def each(where: str, field: str, value: Any) -> None:
        if not isinstance(value, list):
            refuse(where, field, f"found {value!r:.80}", "an array")
        for n, one in enumerate(value):
            check(where, f"{field}/{n}", one)

    return each


def _by_name(check: Check) -> Check:
    def each(where: str, field: str, value: Any) -> None:
        _object(where, field, value)
        for name, one in value.items():
            check(where, f"{field}/{name}", one)

    return each


def _fields(needed: Sequence[str] = (), /, **checks: Check) -> Check:
    def each(where: str, field: str, value: Any) -> None:
        _object(where, field, value)
        for name in needed:
            if name not in value:
                refuse(where, f"{field}/{name}".strip("/"), "the field is missing", f"{', '.join(needed)} in each")
        for name in checks.keys() & value.keys():
            checks[name](where, f"{field}/{name}".strip("/"), value[name])

    return each


def _object(where: str, field: str, value: Any) -> None:
    if not isinstance(value, dict):
        refuse(where, field or "file", f"found {value!r:.80}", "an object")


TEXT = _plain((str,), "text")
WHOLE = _plain((int,), "a whole number")
NUMBER = _plain((int, float), "a finite number")
EITHER = _plain((bool,), "true or false")
PLAIN = _or_null(_plain((str, int, float, bool), "text, a finite number, true, false or null"))
BY_CLOCK = _by_name(_or_null(NUMBER))

VERDICT = _fields(("verdict", "against"), verdict=TEXT, against=TEXT)
SCORE = _fields(
    mean=_or_null(NUMBER),
    low=_or_null(NUMBER),
    high=_or_null(NUMBER),
    values=_or_null(_list(_or_null(NUMBER))),
    verdicts=_or_null(_list(VERDICT)),
)
SITE = _fields(("compute",), compute=_list(WHOLE), store=_or_null(TEXT))
PROMISE = _fields(
    **dict.fromkeys(("mean_db", "low_db", "high_db"), _or_null(NUMBER)), samples=_or_null(WHOLE), origin=_or_null(TEXT)
)
TRAJECTORY = _fields(steps=_list(WHOLE), measured=_list(_or_null(NUMBER)), expected=_or_null(_list(_or_null(NUMBER))))
METHOD = _fields(
    ("name", "kind"),
    name=TEXT,
    kind=TEXT,
    detail=TEXT,
    steps=WHOLE,
    computed_steps=_or_null(NUMBER),
    seconds=_or_null(_by_name(_or_null(BY_CLOCK))),
    speedup=_or_null(BY_CLOCK),
    flops_fraction=_or_null(NUMBER),
    cache_bytes=_or_null(WHOLE),
    peak_bytes=_or_null(WHOLE),
    scores=_or_null(_by_name(_or_null(SCORE))),
    promised=_or_null(PROMISE),
    schedule=_or_null(_fields(("denoisers",), denoisers=_by_name(_by_name(SITE)))),
    trajectory=_or_null(TRAJECTORY),
    pictures=_or_null(_by_name(TEXT)),
    note=TEXT,
)
METRIC = _fields(title=TEXT, unit=TEXT, better=TEXT, about=TEXT, floor=_or_null(NUMBER), of_pairs=EITHER)
RECORD = _fields(
    title=TEXT,
    circumstances=_by_name(PLAIN),
    pipeline=_fields(
        **dict.fromkeys(("class", "denoiser", "noise_scheduler", "steps", "guidance", "model"), PLAIN),
        arguments=_by_name(PLAIN),
    ),
    warning=TEXT,
    samples=_list(_fields(("id",), id=TEXT, prompt=TEXT, seed=_or_null(WHOLE))),
    metrics=_by_name(METRIC),
    methods=_list(METHOD),
)
