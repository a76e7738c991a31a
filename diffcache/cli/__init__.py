"""The ``diffcache`` command. One file, one subcommand: a function of the file's name, or a group of that name.

What is heavy (torch, diffusers, matplotlib) is imported by the subcommand that needs it, when it runs.
"""

from __future__ import annotations

import typer

from diffcache import _rooms
from diffcache.errors import DiffCacheError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Training-free feature caching for diffusion models."
)


@app.callback()
def command() -> None:
    """Training-free feature caching for diffusion models."""


for _name in _rooms.names(__name__):
    _found = getattr(_rooms.load(__name__, _name), _name)
    if isinstance(_found, typer.Typer):
        app.add_typer(_found, name=_name)
    else:
        app.command(_name)(_found)


def main() -> None:
    """Entry point: errors of this library are one line, not a traceback."""
    try:
        app()
    except DiffCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
