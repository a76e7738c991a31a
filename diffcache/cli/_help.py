"""Commands with help pages that show no type for options without a value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command. Its help page shows ``--quick``, and not ``--quick <bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the arguments and options, those of typer (``--help``) too."""
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands. Its help page is written like that of :class:`Command`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, those of typer (``--help``, ``--install-completion``) too."""
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    """Set an empty type for options that take no value."""
    for one in params:
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""
    return params
