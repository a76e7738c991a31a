"""Errors of this library. Each message states what was requested, found and allowed, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from diffcache.text import printable


class DiffCacheError(Exception):
    """Base of all errors of this library.

    A message is one line. Control characters from files and paths are shown as escapes.

    Example:
        >>> try:
        ...     pipe = diffcache.accelerate(pipe, "schedule.safetensors")
        ... except diffcache.DiffCacheError as error:
        ...     print(f"running without a cache: {error}")
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class BadOption(DiffCacheError, ValueError):
    """An option has a value that is not allowed.

    Args:
        name: Name of the option.
        value: The value.
        allowed: The allowed values.
        example: Lines of code that show a valid use.
    """

    def __init__(self, name: str, value: object, allowed: str, *, example: str = "") -> None:
        super().__init__(f"{name}={value!r} was given. Allowed: {allowed}.")
        self.name, self.value, self.allowed, self.example = name, value, allowed, example

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.example}" if self.example else super().__str__()


class Unusable(BadOption):
    """A value is of the right type, but cannot be used here.

    The message names the reason and the next step. ``BadOption`` states the value and the allowed values instead.

    Args:
        what: The option, as the message writes it: ``profile``, ``backend='triton'`` or ``--compare``.
        why: What was found in the value, as a clause: "it has no dynamics".
        next_step: What the user does next, as a sentence without the full stop: "Pass a profile with dynamics".
        example: Lines of code that show a valid use.
    """

    def __init__(self, what: str, why: str, next_step: str, *, example: str = "") -> None:
        DiffCacheError.__init__(self, f"{what} cannot be used: {why}. {next_step}.")
        self.what, self.why, self.next_step = what, why, next_step
        self.name, self.value, self.allowed, self.example = what.partition("=")[0].lstrip("-"), why, next_step, example


class UnknownName(DiffCacheError, LookupError):
    """A name is not in the list of known names.

    Args:
        kind: The kind of object that the name is for.
        name: The name.
        known: The known names.
        next_step: Advice for the user.
        suggest: Whether to suggest a known name that looks alike.
    """

    def __init__(
        self, kind: str, name: str, known: Sequence[str], *, next_step: str = "", suggest: bool = True
    ) -> None:
        near = difflib.get_close_matches(name, known, n=1) if suggest else []
        text = f"no {kind} called {name!r}. Known: {', '.join(known) or 'none'}."
        if near:
            text += f" Did you mean {near[0]!r}?"
        super().__init__(f"{text} {next_step}".rstrip())
        self.name, self.known = name, tuple(known)


class DocumentError(DiffCacheError, ValueError):
    """A schedule, profile, record or other file is damaged, of another kind or inconsistent. Nothing in it was run.

    Args:
        where: The file or the class.
        field: The field.
        problem: The value that was found, the allowed values, and advice for the user.
    """

    def __init__(self, where: str, field: str, problem: str) -> None:
        super().__init__(f"{where}: field {field!r}: {problem}")
        self.where, self.field, self.problem = where, field, problem


class NotWritten(DiffCacheError, OSError):
    """A file or a folder could not be written. No part of it remains, and an older file of its name is unchanged."""

    def __init__(self, path: Path, cause: OSError | ValueError) -> None:
        reason = getattr(cause, "strerror", None) or cause
        super().__init__(
            f"{path!s:.200} cannot be written: {reason}. Free space or choose another place, then run again."
        )
        self.path, self.errno = path, getattr(cause, "errno", None)


class ScheduleMismatch(DiffCacheError):
    """The schedule was made for another loop, network, guidance or noise scheduler than those of the run."""


class UnsupportedModel(DiffCacheError, TypeError):
    """This library cannot load, measure or cache the object."""


class AlreadyAccelerated(DiffCacheError):
    """The object already has a schedule."""


class AcceleratedObjectCopied(DiffCacheError):
    """An accelerated object was copied or pickled. The copy would compute with the weights of the original."""


class HubUnavailable(DiffCacheError):
    """A file could not be downloaded from or uploaded to the Hugging Face Hub."""

    def __init__(self, repo: str, filename: str, cause: str, next_step: str) -> None:
        super().__init__(f"{filename} of {repo}: {cause}. {next_step}")
        self.repo, self.filename, self.cause = repo, filename, cause
