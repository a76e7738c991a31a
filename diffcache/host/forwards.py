"""Inspect what replaces the ``forward`` of a module: wrappers, other functions, compiled functions.

None of it is called.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from diffcache.errors import ScheduleMismatch
from diffcache.host.inspection import host_name
from diffcache.patch import Layers, entry_point

COMPILED = "_torchdynamo_orig_callable"  # attribute of functions that torch.compile has compiled
HOOKS = ("accelerate.hooks", "diffusers.hooks.hooks")  # modules whose wrappers always call the forward below
DEPTH, FOLLOWED = 8, 400  # limits of a search: references in a row, functions in all


def outermost(part: nn.Module) -> Any:
    """Return the ``forward`` in the ``__dict__`` of ``part``, below diffcache's layers; None if there is none."""
    found = part.__dict__.get("forward")
    while isinstance(found, Layers):
        found = found.below
    return found


def own(part: nn.Module, function: Any) -> bool:
    """Return whether ``function`` is the forward of the class of ``part``, bound to ``part`` or not."""
    return getattr(function, "__func__", function) is type(part).forward


def on_class(kind: type[nn.Module]) -> Any:
    """Return the ``forward`` of a class if it was assigned to the class after its definition; else None."""
    owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    function = owner.__dict__["forward"]
    return None if getattr(function, "__qualname__", "") == f"{owner.__qualname__}.forward" else function


def chain(function: Any) -> Iterator[Any]:
    """Yield ``function`` and the functions that it declares to wrap, from the outermost to the innermost."""
    for _ in range(DEPTH):
        if function is None:
            return
        yield function
        if isinstance(function, Layers):
            function = function.below
        elif isinstance(function, functools.partial):  # update_wrapper gives it the name of the function below
            yield function.func
            function = getattr(function, "__wrapped__", None)
        else:
            function = getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)


def is_compiled(part: Any) -> bool:
    """Return whether a call of ``part`` runs a graph of ``torch.compile``, so that nothing inside can be skipped."""
    if entry_point(part) != "forward" or hasattr(part, "_orig_mod"):
        return True
    top = part.__dict__.get("forward")
    return top is not None and any(hasattr(function, COMPILED) for function in chain(top))


def demand_not_compiling(pipe: Any) -> None:
    """Raise ScheduleMismatch if the caller runs under ``torch.compile``, which would compile the layers as well."""
    if "torch._dynamo" not in sys.modules:
        return
    # While a frame is traced the first is true. The same frame then runs uncompiled: it finds the compiler's callback.
    if torch.compiler.is_dynamo_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise ScheduleMismatch(
            f"the network of this {host_name(pipe)} was accelerated, and is called through torch.compile: the "
            "compiled graph would hold the cache. Compile first, accelerate last: accelerate what torch.compile "
            "returned, and give it to trajectory."
        )


def compiled_with_layers(part: nn.Module) -> bool:
    """Return whether ``torch.compile`` was given a forward of ``part`` that diffcache has layered."""
    compiled = [function for function in chain(outermost(part)) if hasattr(function, COMPILED)]
    return any(_found(function, part, lambda inner: isinstance(inner, Layers)) for function in compiled)


def calls_on(part: nn.Module) -> bool:
    """Return whether the forward that was put on ``part`` can call the forward below it.

    The search follows wrappers, closures, defaults, ``functools.partial``, global variables, and attributes of ``part``
    that the code names. It distinguishes a wrapper from a function that replaces the forward.
    """
    return _found(
        outermost(part),
        part,
        lambda f: isinstance(f, Layers) or own(part, f) or getattr(f, "__module__", None) in HOOKS,
    )


def _found(function: Any, part: nn.Module, wanted: Callable[[Any], bool]) -> bool:
    """Return whether ``function`` refers, directly or through others, to a function that is ``wanted``.

    Search breadth first.
    """
    seen: set[int] = set()
    left = deque([(function, 0)])
    while left and len(seen) < FOLLOWED:
        function, depth = left.popleft()
        if id(function) in seen or not callable(function):
            continue
        seen.add(id(function))
        if wanted(function):
            return True
        if depth < DEPTH:
            left += [(referred, depth + 1) for referred in _referred(function, part)]
    return False


def _referred(function: Any, part: nn.Module) -> Iterator[Any]:
    """Yield the objects that a function can call."""
    if isinstance(function, Layers):
        yield function.below
        return
    if isinstance(function, (type, nn.Module)):
        return
    yield getattr(function, "__wrapped__", None)
    yield getattr(function, "__func__", None)
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif not isinstance(function, types.FunctionType):  # an object that can be called
        yield from getattr(function, "__dict__", {}).values()
        yield type(function).__call__
    else:
        yield from (cell.cell_contents for cell in function.__closure__ or () if _filled(cell))
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for name in function.__code__.co_names:
            yield function.__globals__.get(name)
            if name != "forward":
                yield part.__dict__.get(name)


def _filled(cell: types.CellType) -> bool:
    """Return whether a captured variable has a value."""
    try:
        cell.cell_contents  # noqa: B018 - reading raises for a variable that has no value yet
    except ValueError:
        return False
    return True
