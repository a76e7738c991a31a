"""Reversible layers on one named method of one object.

A layer is a function ``around(inner, *args, **kwargs)``. All layers of a method live in one list inside one
callable, so they come off in any order and the last one off leaves the object's ``__dict__`` as it was found.
Classes are never touched. If a stranger wrapped the method above us in the meantime, our callable stays where the
stranger holds it, and passes calls through.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from diffcache.errors import AcceleratedObjectCopied

Around = Callable[..., Any]
Undo = Callable[[], None]

_ABSENT = object()


def layer(owner: Any, name: str, around: Around, *, copies: bool = False) -> Undo:
    """Put ``around`` on top of ``owner.name`` and return the function that takes it off again.

    ``copies`` says what a deep copy of ``owner`` gets: False refuses the copy (it would run with the original's
    weights), True gives the copy the plain method.
    """
    stack = owner.__dict__.get(name)
    if not isinstance(stack, Layers):
        stack = Layers(owner, name, copies)
        owner.__dict__[name] = stack
    entry = [around]  # a list of its own: two equal functions stay two layers
    stack.entries.append(entry)

    def undo() -> None:
        if any(e is entry for e in stack.entries):
            stack.entries = [e for e in stack.entries if e is not entry]
            stack.leave_if_empty()

    return undo


class Layers:
    """The callable that stands in for a layered method."""

    def __init__(self, owner: Any, name: str, copies: bool) -> None:
        # Weak: an accelerated model must be freed when its last user drops it, without waiting for a cycle collection.
        self.owner = weakref.ref(owner)
        self.name = name
        self.copies = copies
        self.found = owner.__dict__.get(name, _ABSENT)
        self.entries: list[list[Around]] = []

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method below all layers, bound: ``inspect.signature`` sees the true signature through it."""
        if self.found is not _ABSENT:
            return self.found  # type: ignore[no-any-return]
        owner = self.owner()
        return getattr(type(owner), self.name).__get__(owner)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__wrapped__
        for (around,) in self.entries:
            call = _bind(around, call)
        return call(*args, **kwargs)

    def leave_if_empty(self) -> None:
        owner = self.owner()
        if self.entries or owner is None or owner.__dict__.get(self.name) is not self:
            return
        if self.found is _ABSENT:
            del owner.__dict__[self.name]
        else:
            owner.__dict__[self.name] = self.found

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        owner = self.owner()
        copy = memo.get(id(owner))
        if not self.copies or copy is None or self.found is not _ABSENT:
            raise AcceleratedObjectCopied(refusal(type(owner).__name__, "deep copy"))
        return getattr(type(copy), self.name).__get__(copy)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AcceleratedObjectCopied(refusal(type(self.owner()).__name__, "pickle"))


def refusal(class_name: str, action: str) -> str:
    return (
        f"a {action} of {class_name} was asked for while it is accelerated; the copy would compute with the original's "
        f"weights. Call diffcache.restore(pipe) first, {action} it, then accelerate both."
    )


def _bind(around: Around, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    return call
