"""Wrap one named method of one object, and undo it without a trace.

A layer is a function ``wrapper(inner, *args, **kwargs)``. All layers of a method are in one list inside one callable,
so they can be removed in any order, and the last removal leaves the object's ``__dict__`` as it was before. Classes are
never changed. If third-party code has wrapped the layered method in the meantime, the callable remains in that wrapper
and passes calls through. If that code later puts the callable back on the object, the next call removes it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from diffcache.errors import AcceleratedObjectCopied

Wrapper = Callable[..., Any]
Undo = Callable[[], None]

_ABSENT = object()


def layer(owner: Any, name: str, wrapper: Wrapper, *, copies: bool = False) -> Undo:
    """Put ``wrapper`` on top of ``owner.name``.

    Args:
        owner: The object with the method.
        name: The name of the method.
        wrapper: The layer. It is called with the method below it and the arguments of the call.
        copies: What a deep copy of ``owner`` gets. False refuses the copy, which would run with the weights of the
            original. True gives the copy the method without layers.

    Returns:
        A function that removes the layer.
    """
    stack = owner.__dict__.get(name)
    if not isinstance(stack, Layers):
        stack = Layers(owner, name, copies)
        owner.__dict__[name] = stack
    entry = [wrapper]  # a list, compared by identity: the same function can be layered twice
    stack.entries.append(entry)

    def undo() -> None:
        if any(e is entry for e in stack.entries):
            stack.entries = [e for e in stack.entries if e is not entry]
            stack.leave_if_empty()

    return undo


class BoundMethod:
    """A method of a module that is treated as a module.

    Some parts of a network are methods, such as the feed-forward of torch's decoder layers, and the action expert of a
    policy that shares its layers with a language model. Calling the object calls the method. All other attributes are
    those of the owner.

    Args:
        owner: The module. Only a weak reference to it is kept.
        name: The name of the method.

    Attributes:
        of: Returns the owner, or None if it no longer exists.
        name: The name of the method.
    """

    __slots__ = ("__weakref__", "name", "of")

    def __init__(self, owner: Any, name: str) -> None:
        self.of, self.name = weakref.ref(owner), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.of(), self.name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of(), name)


def weak(part: Any) -> Callable[[], Any]:
    """Return a weak reference to a module. A ``BoundMethod`` itself is kept, and its owner is not."""
    if isinstance(part, BoundMethod):
        return lambda: part if part.of() is not None else None
    return weakref.ref(part)


def spot(part: Any) -> tuple[Any, str]:
    """Return the object and the name of the method that a call of ``part`` runs.

    Args:
        part: A module or a ``BoundMethod``.
    """
    return (part.of(), part.name) if isinstance(part, BoundMethod) else (part, entry_point(part))


def inner_spot(part: Any) -> tuple[Any, str]:
    """Return the same as ``spot``, but ``forward`` for a module that ``Module.compile()`` compiled."""
    return (part.of(), part.name) if isinstance(part, BoundMethod) else (part, "forward")


def entry_point(module: Any) -> str:
    """Return the name of the method that a call of ``module`` runs: the compiled call, if there is one, or forward."""
    return "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def on_top(owner: Any, name: str, wrapper: Wrapper) -> bool:
    """Return whether a call of ``owner.name`` reaches ``wrapper`` before any third-party wrapper."""
    stack = owner.__dict__.get(name)
    return isinstance(stack, Layers) and any(e[0] is wrapper for e in stack.entries)


def unlayered(owner: Any) -> dict[str, Any]:
    """Return the attributes of ``owner`` as they are without layers."""
    found = dict(vars(owner))
    for name, held in vars(owner).items():
        if isinstance(held, Layers):
            if held.found is _ABSENT:
                del found[name]
            else:
                found[name] = held.found
    return found


class Layers:
    """The callable that replaces a layered method.

    Args:
        owner: The object with the method. Only a weak reference to it is kept.
        name: The name of the method.
        copies: Whether a deep copy of ``owner`` gets the method without layers. If False, the copy is refused.
    """

    # No __dict__: functools.update_wrapper would share it with the wrapper, and so keep the layers alive.
    __slots__ = ("copies", "entries", "found", "name", "owner")

    def __init__(self, owner: Any, name: str, copies: bool) -> None:
        # Weak: an accelerated model must be freed when its last user drops it, without waiting for a cycle collection.
        self.owner = weakref.ref(owner)
        self.name = name
        self.copies = copies
        self.found = owner.__dict__.get(name, _ABSENT)
        self.entries: list[list[Wrapper]] = []

    @property
    def below(self) -> Any:
        """Return what was in the owner's ``__dict__`` before the first layer, or None if nothing was."""
        return None if self.found is _ABSENT else self.found

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the bound method below all layers. ``inspect.signature`` reads the signature from it."""
        if self.found is not _ABSENT:
            return self.found  # type: ignore[no-any-return]
        owner = self.owner()
        found = getattr(type(owner), self.name)
        if isinstance(found, FunctionType):  # the tracer of torch 2.6 cannot follow __get__
            return MethodType(found, owner)
        return found.__get__(owner)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.entries:
            self.leave_if_empty()
        call = self.__wrapped__
        for (wrapper,) in self.entries:
            call = _bind(wrapper, call)
        return call(*args, **kwargs)

    def leave_if_empty(self) -> None:
        """Give the owner its method back if no layer is left."""
        owner = self.owner()
        if self.entries or owner is None or owner.__dict__.get(self.name) is not self:
            return
        if self.found is _ABSENT:
            del owner.__dict__[self.name]
        else:
            owner.__dict__[self.name] = self.found

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        owner = self.owner()
        twin = memo.get(id(owner))
        if self.copies and twin is None:  # a copy of the owner's __dict__, to be put back into it
            return self
        if self._stays_with_owner() or twin is None:
            raise AcceleratedObjectCopied(refusal(type(owner).__name__, "deep copy"))
        if self.found is not _ABSENT:
            return copy.deepcopy(self.found, memo)  # type: ignore[no-any-return]
        return getattr(type(twin), self.name).__get__(twin)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._stays_with_owner():
            raise AcceleratedObjectCopied(refusal(type(self.owner()).__name__, "pickle"))
        return _itself, (self.__wrapped__,)

    def _stays_with_owner(self) -> bool:
        """Return whether copies are refused."""
        return bool(self.entries) and not self.copies


def refusal(class_name: str, action: str) -> str:
    """Return the text of the error for a copy of an accelerated object.

    Args:
        class_name: The class of the object.
        action: The kind of copy, such as "pickle".
    """
    return (
        f"a {action} of {class_name} was asked for while it is accelerated; the copy would compute with the original's "
        f"weights. Call diffcache.restore(pipe) first, {action} it, then accelerate both."
    )


def _bind(wrapper: Wrapper, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``wrapper`` with ``inner``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    return call


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method``. A pickle of a layered method calls it."""
    return method
