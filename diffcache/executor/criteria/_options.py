"""Read the options of a criterion from the keyword-only arguments of its functions, and check given values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from diffcache.errors import BadOption, UnknownName, Unusable

Option = float | int | str
_ALLOWED = {float: "a number", int: "a whole number", str: "text"}  # type of a default -> the values it stands for


def declared(criterion: str, functions: Iterable[Callable[..., Any]]) -> dict[str, Option]:
    """Return option -> default: the keyword-only arguments of all functions of a criterion.

    Args:
        criterion: The name of the criterion, for errors.
        functions: Its functions.

    Raises:
        Unusable: An option has no default, a default is neither a number nor text, or two functions give an option
            different defaults.
    """
    found: dict[str, Option] = {}
    for function in functions:
        for name, default in keywords(function).items():
            if type(default) not in _ALLOWED:
                why = f"its option {name!r} has no default that is a number or text"
                raise Unusable(f"criterion {criterion!r}", why, f"Write {name}: float = 0.5, for example")
            if name in found and (type(found[name]), found[name]) != (type(default), default):
                why = f"its option {name!r} has the defaults {found[name]!r} and {default!r}"
                raise Unusable(f"criterion {criterion!r}", why, "Use one default in all of its functions")
            found[name] = default
    return found


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword-only arguments of a function and their defaults, ``Parameter.empty`` for a missing one."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def completed(criterion: str, defaults: Mapping[str, Option], given: Mapping[str, Option]) -> dict[str, Option]:
    """Return the value of every option, of the type of its default.

    Args:
        criterion: The name of the criterion, for errors.
        defaults: Option -> default.
        given: Option -> value. Missing ones have their defaults.

    Raises:
        UnknownName: The criterion has no such option.
        BadOption: A value is not of the type of the default.
    """
    values = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise UnknownName(f"option of the criterion {criterion!r}", name, list(defaults))
        kind = type(defaults[name])
        if not (isinstance(value, Real) if kind is float else type(value) is kind):
            raise BadOption(name, value, f"{_ALLOWED[kind]}, for the criterion {criterion!r}")
        values[name] = kind(value)
    return values


def bound(function: Callable[..., Any], values: Mapping[str, Option]) -> Callable[..., Any]:
    """Return a function with the values of its options filled in."""
    own = {name: values[name] for name in keywords(function)}
    return partial(function, **own) if own else function
