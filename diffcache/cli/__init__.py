"""The ``diffcache`` command. Each file is a subcommand: a function of the file's name, or a group of that name.

Large packages (torch, diffusers, matplotlib) are imported by the subcommands that need them, when they run.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from diffcache import registry, settings
from diffcache.cli import _import_messages
from diffcache.cli._help import Command, Group
from diffcache.documents.document import version_of
from diffcache.errors import BadOption, DiffCacheError, UnknownName
from diffcache.text import printable

DEBUG = "--debug"
INTERRUPTED = 130  # exit status of a command that Ctrl-C stops
LONGEST = 600  # characters of an error that another library raised

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    """Print the versions of this package and of those that decide what it can do, and exit."""
    if wanted:
        others = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "diffusers"))
        typer.echo(f"diffcache {version_of('diffcache')} ({others})")
        raise typer.Exit


@app.callback()
def command(
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; also DIFFCACHE_DEBUG=1.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Training-free feature caching for diffusion models.

    Example:
        diffcache demo --quick
        diffcache optimize my-flux --prompts prompts.txt --steps 28 --computed 10
        diffcache eval run my-flux schedule.safetensors \\
            --prompts others.txt --steps 28

    Exit status: 0; 1 where loading or running failed; 2 where an option is wrong;
    130 where Ctrl-C stopped it.
    """


for _name in registry.names(__name__):
    _found = getattr(registry.load(__name__, _name), _name)
    if isinstance(_found, typer.Typer):
        app.add_typer(_found, name=_name)
    else:
        app.command(_name, cls=Command)(_found)


def main() -> None:
    """Run the command. An error is printed on one line.

    The exit status is 2 for a wrong option, 130 if Ctrl-C stops the command, and 1 for other errors.

    With ``--debug`` at any position, the traceback is printed too, and no message of another library is left out.
    """
    words = [word for word in sys.argv[1:] if word != DEBUG]
    debug = len(words) < len(sys.argv) - 1 or settings.debug()
    if not debug:
        _import_messages.leave_out()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(words, standalone_mode=False)
            if status == INTERRUPTED:
                _end_bars()
                typer.echo("stopped", err=True)
            raise SystemExit(status or 0)
        except Exception as error:
            _end_bars()
            if _is_usage(error):
                _show_usage(error)
                raise SystemExit(2) from None
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {printable(_line(error))}", err=True)
            raise SystemExit(2 if isinstance(error, (BadOption, UnknownName)) else 1) from None


def _is_usage(error: Exception) -> bool:
    """Return whether click raised an error about the words of the command. typer has its own copy of click."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def _show_usage(error: Any) -> None:
    """Print an error about the words of the command on one line; where there are no words, the help page."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    text = " ".join(error.format_message().split())
    text += "" if text.endswith((".", "?")) else "."
    path = getattr(error.ctx, "command_path", "diffcache")
    typer.echo(f"error: {printable(text)} {path} --help lists what is allowed.", err=True)


def _end_bars() -> None:
    """End the line of each progress bar that an error left open, so that the error begins a line."""
    bars = sys.modules.get("tqdm")
    for bar in [] if bars is None else list(getattr(bars.tqdm, "_instances", ())):
        bar.close()


def _line(error: Exception) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, DiffCacheError):
        return text
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return f"{type(error).__name__}: {text or 'no message'} ({DEBUG} shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning above the progress bars; a warning of this library takes one line."""
    if category.__module__.partition(".")[0] == "diffcache":
        text = f"warning: {printable(' '.join(str(message).split()))}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    bars = sys.modules.get("tqdm")
    if bars is None:
        typer.echo(text, err=True)
    else:
        bars.tqdm.write(text, file=sys.stderr)
