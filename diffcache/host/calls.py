"""Calls of a pipeline, made of what the user passes and checked before the pipeline runs.

A call is a dictionary of arguments for ``pipe(**call)``. ``calls_of`` makes calls of texts and of common arguments.
Every function that takes calls checks them here first, so that a mistake in the last call is found before the first one
runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffcache.errors import BadOption, UnknownName, Unusable
from diffcache.host.arguments import Parameters, parameters_of
from diffcache.host.call_values import shown
from diffcache.host.inspection import host_name
from diffcache.host.kinds import kind_of

ALLOWED = "a list of at least one dictionary of arguments for pipe(**call)"
ALSO = f"{ALLOWED}, a single dictionary, or prompts as texts"
PROMPT = "prompt"


def calls_of(
    pipe: Any,
    given: Any,
    common: Mapping[str, Any],
    taker: Callable[..., Any],
    name: str = "calls",
    *,
    first_seed: int = 0,
) -> Sequence[Mapping[str, Any]]:
    """Return calls, made of the texts or dictionaries that the user passed.

    A text becomes ``{"prompt": text}`` with a seeded generator. A single text or dictionary becomes a list of one call.
    The result still has to be checked by ``check_calls``.

    Args:
        pipe: A pipeline, or the ``Loop`` of a policy or a network.
        given: A text, a dictionary of arguments, or a list of either.
        common: Arguments that are added to every call.
        taker: The public function that was called with ``common``. Its own options are listed if a name is unknown.
        name: The name of the argument that holds ``given``, for errors.
        first_seed: The seed of the first text. The seeds of further texts count up from it.

    Returns:
        The calls. ``given`` itself, if it is a list of dictionaries and there are no common arguments.

    Raises:
        BadOption: ``given`` is neither, the pipeline takes no prompts, or a common argument is in a call as well.
        UnknownName: The pipeline has no argument of the name of a common argument.
    """
    kind = kind_of(pipe)
    _check_common(pipe, common, taker)
    calls: Any = [given] if isinstance(given, (str, Mapping)) else given
    if isinstance(calls, bytes) or not isinstance(calls, Sequence) or not calls:
        raise BadOption(name, shown(given), ALSO, example=kind.example)
    texts = [isinstance(one, str) for one in calls]
    if any(texts) and not all(texts):
        raise BadOption(name, "texts and other values in one list", ALSO, example=kind.example)
    if any(texts):
        _check_takes_prompts(pipe, calls[0], name)
        return [_of_text(pipe, text, first_seed + i, common, name) for i, text in enumerate(calls)]
    if not common:
        made: Sequence[Mapping[str, Any]] = calls
        return made
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise BadOption(name, f"{shown(calls)} with {shown(call)} in it", ALSO, example=kind.example)
        if twice := sorted(common.keys() & call.keys(), key=str):
            allowed = f"each argument once: in the dictionaries, or as {twice[0]}=… for all of them"
            raise BadOption(f"{name}[{index}]", f"{', '.join(twice)}, which is also given for all calls", allowed)
    return [{**call, **common} for call in calls]


def _check_common(pipe: Any, common: Mapping[str, Any], taker: Callable[..., Any]) -> None:
    """Raise UnknownName for a common argument that the pipeline does not have."""
    parameters = arguments_of(pipe)
    for key in common:
        if parameters is not None and key not in parameters:
            own = [p.name for p in inspect.signature(taker).parameters.values() if p.kind is p.KEYWORD_ONLY]
            kind = f"option of {taker.__name__} and no argument of {host_name(pipe)}"
            raise UnknownName(kind, key, (*own, *parameters))


def _check_takes_prompts(pipe: Any, text: str, name: str) -> None:
    """Raise BadOption if calls cannot be made of texts because the pipeline has no argument ``prompt``."""
    parameters = arguments_of(pipe)
    if parameters is None or PROMPT in parameters:
        return
    empty = inspect.Parameter.empty
    wanted = [key for key, p in parameters.items() if p.default is empty] or [
        key for key in ("class_labels", "image", "batch_size") if key in parameters
    ]
    listed = ", ".join(wanted or parameters) or "no arguments"
    example = f"dictionaries such as {{{wanted[0]!r}: …}}" if wanted else "dictionaries of its arguments"
    raise BadOption(name, text, f"{example}: {host_name(pipe)} takes no argument {PROMPT!r}; it takes {listed}")


def _of_text(pipe: Any, text: str, seed: int, common: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the call for one prompt, with the noise of ``seed``."""
    call = {PROMPT: text, **kind_of(pipe).noise_of(pipe, seed)}
    if twice := sorted(common.keys() & call.keys()):
        allowed = "dictionaries, if you choose prompts or generators yourself: each text brings a prompt and a seed"
        value = common[twice[0]]
        raise BadOption(twice[0], value if isinstance(value, str) else shown(value), f"{allowed}, in {name}")
    return {**call, **common}


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
                example=kind.example,
            )


def check_call(pipe: Any, call: Mapping[Any, Any], where: str = "call") -> None:
    """Raise BadOption or UnknownName unless ``call`` can be the arguments of ``pipe(**call)``."""
    kind = kind_of(pipe)
    check_names(kind.arguments(pipe), host_name(pipe), call, where)
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
