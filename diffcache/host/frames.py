"""Read calls in progress from the stack: which pipeline is running, and with which arguments.

A pipeline keeps few of its arguments, and layering ``__call__`` would change the class. The frames of the calls hold
all arguments, including defaults, before the first step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any


def variables_of(pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments and the local variables, as they are now, of the call of ``pipe`` that is running.

    Both are empty if no call is running. If the call of a subclass runs that of its base, the values of the inner call
    count.
    """
    arguments: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for frame in _calls():
        first = frame.f_code.co_varnames[0]
        if _locals(frame, (first,)).get(first) is pipe:
            names = _parameters(frame.f_code)
            arguments = _locals(frame, names) | arguments
            others = _locals(frame, tuple(set(frame.f_code.co_varnames) - set(names))) | others
    return arguments, others


def calling_pipeline() -> Any:
    """Return the pipeline or loop of the innermost call that is running, or None."""
    for frame in _calls():
        first = frame.f_code.co_varnames[0]
        owner = _locals(frame, (first,)).get(first)
        if hasattr(type(owner), "components") and hasattr(owner, "scheduler"):
            return owner
    return None


def _parameters(code: CodeType) -> tuple[str, ...]:
    """Return the names of a function's parameters. The name of ``**kwargs`` comes last."""
    count = code.co_argcount + code.co_kwonlyargcount
    starred = bool(code.co_flags & inspect.CO_VARARGS)
    keywords = code.co_varnames[count + starred :][: bool(code.co_flags & inspect.CO_VARKEYWORDS)]
    return code.co_varnames[:count] + keywords


def _calls() -> Iterator[FrameType]:
    """Yield the frames of ``__call__`` methods, from the inside out."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_argcount:
            yield frame
        frame = frame.f_back


def _locals(frame: FrameType, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of these variables of a function, by name."""
    found = frame.f_locals
    values = {name: found[name] for name in names if name in found}
    # Before Python 3.13 the dictionary is a copy that the frame keeps, and with it every tensor in it.
    if type(found) is dict:
        found.clear()
    return values
