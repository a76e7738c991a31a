"""Errors that this library raises. Each says what was asked, what was found, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from diffcache.text import printable


class DiffCacheError(Exception):
    """Base of all errors of this library. A message is one line; what a file or a path put into it shows as text."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadOption(DiffCacheError, ValueError):
    """An option has a value it cannot have. ``example``: lines of code that show what to pass instead."""

    def __init__(self, name: str, value: object, allowed: str, *, example: str = "") -> None:
        super().__init__(f"{name}={value!r} was given. Allowed: {allowed}.")
        self.name, self.value, self.allowed, self.example = name, value, allowed, example

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.example}" if self.example else super().__str__()


class UnknownName(DiffCacheError, LookupError):
    """A name is not in the list it was looked up in."""

    def __init__(self, kind: str, name: str, known: Sequence[str], *, next_step: str = "") -> None:
        near = difflib.get_close_matches(name, known, n=1)
        text = f"no {kind} called {name!r}. Known: {', '.join(known) or 'none'}."
        if near:
            text += f" Did you mean {near[0]!r}?"
        super().__init__(f"{text} {next_step}".rstrip())
        self.name, self.known = name, tuple(known)


class DocumentError(DiffCacheError, ValueError):
    """A schedule, profile, record or other file is damaged, foreign, or contradicts itself. Nothing in it was run."""

    def __init__(self, where: str, field: str, problem: str) -> None:
        super().__init__(f"{where}: field {field!r}: {problem}")
        self.where, self.field, self.problem = where, field, problem


class NotWritten(DiffCacheError, OSError):
    """A file or a folder could not be written. No part of it is left, and an older file of its name is unchanged."""

    def __init__(self, path: Path, cause: OSError | ValueError) -> None:
        reason = getattr(cause, "strerror", None) or cause
        super().__init__(
            f"{path!s:.200} cannot be written: {reason}. Free space or choose another place, then run again."
        )
        self.path, self.errno = path, getattr(cause, "errno", None)


class ScheduleMismatch(DiffCacheError):
    """The schedule was made for something other than what is about to run."""


class UnsupportedModel(DiffCacheError, TypeError):
    """The object has no place this library knows how to cache."""


class AlreadyAccelerated(DiffCacheError):
    """The object carries a schedule already."""


class AcceleratedObjectCopied(DiffCacheError):
    """A copy or a pickle of an accelerated object was asked for; it would compute with the original's weights."""


class HubUnavailable(DiffCacheError):
    """The Hugging Face Hub did not deliver, or did not take, a file."""

    def __init__(self, repo: str, filename: str, cause: str, next_step: str) -> None:
        super().__init__(f"{filename} of {repo}: {cause}. {next_step}")
        self.repo, self.filename, self.cause = repo, filename, cause
