"""Calls of a pipeline, checked before the pipeline runs.

A call is a dictionary of arguments for ``pipe(**call)``. Every function that takes calls checks them here first, so
that a mistake in the last call is found before the first one runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffcache.errors import BadOption, UnknownName, Unusable
from diffcache.host.arguments import Parameters, parameters_of
from diffcache.host.call_values import shown
from diffcache.host.kinds import kind_of

ALLOWED = "a list of at least one dictionary of arguments for pipe(**call)"


def check_calls(pipe: Any, calls: object, name: str = "calls", *, repeatable: bool = False) -> None:
    """Raise an error unless each of ``calls`` can be the arguments of ``pipe(**call)``.

    Args:
        pipe: A pipeline, or the ``Loop`` of a policy or a network.
        calls: The calls that the user passed.
        name: The name of the argument, for errors.
        repeatable: Whether each call runs several times and must begin with the same noise every time.

    Raises:
        BadOption: ``calls`` is not a list of dictionaries, or a value in it is out of range.
        UnknownName: The pipeline has no argument of that name.
    """
    kind = kind_of(pipe)
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence) or not calls:
        raise BadOption(name, shown(calls), ALLOWED, example=kind.example)
    for call in calls:
        if not isinstance(call, Mapping):
            raise BadOption(name, f"{shown(calls)} with {shown(call)} in it", ALLOWED, example=kind.example)
    kind.check_callable(pipe)
    for index, call in enumerate(calls):
        check_call(pipe, call, f"{name}[{index}]")
        if repeatable and not kind.repeats(call):
            raise Unusable(
                name,
                f"call {index} has no generator",
                "Pass one generator, or one for each sample, in each call; a policy or a loop takes a seed",
            )


def check_call(pipe: Any, call: Mapping[Any, Any], where: str = "call") -> None:
    """Raise BadOption or UnknownName unless ``call`` can be the arguments of ``pipe(**call)``."""
    kind = kind_of(pipe)
    check_names(kind.arguments(pipe), type(pipe).__name__, call, where)
    kind.check_values(call, where)


def check_names(
    parameters: Mapping[str, inspect.Parameter] | None, title: str, call: Mapping[Any, Any], where: str
) -> None:
    """Raise an error unless the names in ``call`` are among ``parameters`` and no required name is missing.

    Args:
        parameters: The arguments of the pipeline (see ``arguments_of``). None allows any.
        title: The name of the pipeline in errors.
        call: The arguments by name.
        where: The name of the call in errors.

    Raises:
        BadOption: A name is not a text, or a required argument is missing.
        UnknownName: The pipeline has no argument of that name.
    """
    for key in call:
        if not isinstance(key, str):
            raise Unusable(where, f"the key {key!r:.80} is not a string", "Use the names of arguments as keys")
    if parameters is None:
        return
    for key in call:
        if key not in parameters:
            raise UnknownName(f"argument of {title}", key, tuple(parameters), next_step=f"It is in {where}.")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in call:
            raise Unusable(where, f"{key!r} is missing, and {title} requires it", f"Pass a value for {key!r}")


def arguments_of(pipe: Any) -> Parameters | None:
    """Return the arguments that a call may have, by name; None if the pipeline takes any."""
    return kind_of(pipe).arguments(pipe)


def arguments_of_class(kind: type) -> Parameters | None:
    """Return the arguments that a call of a pipeline of this class may have, by name; None if it takes any."""
    return parameters_of(kind.__call__, leave_out=1)


def steps_asked(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """Return the number of steps that a call asks for, or None if only a run shows it."""
    return kind_of(pipe).steps_asked(pipe, call)


def iterations(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """Return the iterations that the noise scheduler plans for a call, or None if only a run shows them.

    A second-order solver has more iterations than steps are asked for. Iterations that a late start (image to image)
    leaves out count too, as they do in a schedule.
    """
    return kind_of(pipe).iterations(pipe, call)


def check_same_steps(pipe: Any, calls: Sequence[Mapping[str, Any]], name: str = "calls") -> None:
    """Raise BadOption if the calls ask for different numbers of steps."""
    found = sorted({steps for call in calls if (steps := steps_asked(pipe, call)) is not None})
    if len(found) > 1:
        raise Unusable(name, f"they take different steps, {found}", "Pass calls that all take the same steps")
