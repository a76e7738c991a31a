"""Checks of options."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache.errors import BadOption


def at_least(name: str, value: int, least: int) -> None:
    """Raise BadOption unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadOption(name, value, f"a whole number of at least {least}")


def flag(name: str, value: str | int) -> bool:
    """Return whether an option is on. Raise BadOption unless it is true, false, 1 or 0."""
    if str(value) not in ("true", "false", "1", "0"):
        raise BadOption(name, value, "true or false")
    return str(value) in ("true", "1")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise BadOption unless ``value`` is allowed."""
    if value not in allowed:
        raise BadOption(name, value, ", ".join(allowed))
