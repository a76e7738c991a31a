"""Reversible layers on one named method of one object.

A layer is a function ``around(inner, *args, **kwargs)``. All layers of a method live in one list inside one
callable, so they come off in any order and the last one off leaves the object's ``__dict__`` as it was found.
Classes are never touched. If third-party code wrapped the method above ours in the meantime, our callable stays where
that code holds it, and passes calls through. Given back to the object, it leaves at the next call.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from diffcache.errors import AcceleratedObjectCopied

Wrapper = Callable[..., Any]
Undo = Callable[[], None]

_ABSENT = object()


def layer(owner: Any, name: str, wrapper: Wrapper, *, copies: bool = False) -> Undo:
    """Put ``around`` on top of ``owner.name`` and return the function that takes it off again.

    ``copies`` says what a deep copy of ``owner`` gets: False refuses the copy (it would run with the original's
    weights), True gives the copy the plain method.
    """
    stack = owner.__dict__.get(name)
    if not isinstance(stack, Layers):
        stack = Layers(owner, name, copies)
        owner.__dict__[name] = stack
    entry = [wrapper]  # a list of its own: two equal functions stay two layers
    stack.entries.append(entry)

    def undo() -> None:
        if any(e is entry for e in stack.entries):
            stack.entries = [e for e in stack.entries if e is not entry]
            stack.leave_if_empty()

    return undo


class BoundMethod:
    """A method of a module, in the place of a part of a network that is no module of its own: the feed-forward of
    torch's decoder layers, the action expert of a policy that shares its layers with a language model.

    Called, it runs; what it is asked for beside that its owner answers, whom it does not keep alive.
    """

    __slots__ = ("__weakref__", "name", "of")

    def __init__(self, owner: Any, name: str) -> None:
        self.of, self.name = weakref.ref(owner), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.of(), self.name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of(), name)


def weak(part: Any) -> Callable[[], Any]:
    """A reference that does not keep a module alive, nor the owner of a method."""
    if isinstance(part, BoundMethod):
        return lambda: part if part.of() is not None else None
    return weakref.ref(part)


def spot(part: Any) -> tuple[Any, str]:
    """The object and the name of the method that a call of ``part`` runs, a module or a Method."""
    return (part.of(), part.name) if isinstance(part, BoundMethod) else (part, entry_point(part))


def inner_spot(part: Any) -> tuple[Any, str]:
    """The same, below whatever compiled a module."""
    return (part.of(), part.name) if isinstance(part, BoundMethod) else (part, "forward")


def entry_point(module: Any) -> str:
    """The method that a call of a network runs: what ``Module.compile()`` made, around which we stay, else forward."""
    return "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def on_top(owner: Any, name: str, wrapper: Wrapper) -> bool:
    """Whether a call of ``owner.name`` meets ``around`` before any third-party wrapper, or at all."""
    stack = owner.__dict__.get(name)
    return isinstance(stack, Layers) and any(e[0] is wrapper for e in stack.entries)


def unlayered(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object as they are without our layers."""
    found = dict(vars(owner))
    for name, held in vars(owner).items():
        if isinstance(held, Layers):
            if held.found is _ABSENT:
                del found[name]
            else:
                found[name] = held.found
    return found


class Layers:
    """The callable that stands in for a layered method."""

    # No __dict__: functools.update_wrapper would share it with whoever wraps us, and keep our layers alive there.
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
        """What lay in the owner's ``__dict__`` before the layers came; None if nothing did."""
        return None if self.found is _ABSENT else self.found

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method below all layers, bound: ``inspect.signature`` sees the true signature through it."""
        if self.found is not _ABSENT:
            return self.found  # type: ignore[no-any-return]
        owner = self.owner()
        return getattr(type(owner), self.name).__get__(owner)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.entries:
            self.leave_if_empty()
        call = self.__wrapped__
        for (wrapper,) in self.entries:
            call = _bind(wrapper, call)
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
        return bool(self.entries) and not self.copies


def refusal(class_name: str, action: str) -> str:
    return (
        f"a {action} of {class_name} was asked for while it is accelerated; the copy would compute with the original's "
        f"weights. Call diffcache.restore(pipe) first, {action} it, then accelerate both."
    )


def _bind(wrapper: Wrapper, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    return call


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
