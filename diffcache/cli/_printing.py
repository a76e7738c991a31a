"""Print tables: drawn on a terminal, plain text elsewhere, so that pipes do not depend on the width of a window."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import typer

from diffcache.text import printable

Rows = Sequence[Sequence[str]]


def on_terminal() -> bool:
    """Return whether the output goes to a terminal."""
    return sys.stdout.isatty()


def table(heads: Sequence[str], groups: Mapping[str, Rows], *, right: Sequence[str] = ()) -> None:
    """Print a table. On a terminal, rows are grouped under headings; elsewhere, it is tab-separated, with a first line.

    Args:
        heads: Names of the columns.
        groups: Heading -> its rows. "" prints no heading.
        right: Names of the columns of numbers, aligned at the right on a terminal.
    """
    if not on_terminal():
        lines = [heads, *(row for rows in groups.values() for row in rows)]
        typer.echo("\n".join("\t".join(map(printable, line)) for line in lines))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, head in enumerate(heads):
        drawn.add_column(
            head,
            justify="right" if head in right else "left",
            overflow="fold",
            no_wrap=number == 0,
            ratio=1 if number == len(heads) - 1 else None,
        )
    for group, rows in groups.items():
        if group:
            drawn.add_row(Text(group, style="bold"))
        for row in rows:
            drawn.add_row(*map(Text, row))
        drawn.add_section()
    Console(file=sys.stdout).print(drawn)


def markdown(text: str) -> None:
    """Print text with Markdown tables. On a terminal the tables are drawn; elsewhere the text is printed as it is."""
    if not on_terminal():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(file=sys.stdout).print(Markdown(text))


def note(text: str) -> None:
    """Print a remark to the error stream, so that it is not part of the result."""
    typer.echo(f"note: {printable(text)}", err=True)
