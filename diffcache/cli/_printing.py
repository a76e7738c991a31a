"""Print tables: drawn on a terminal, plain text elsewhere, so that pipes do not depend on the width of a window."""

from __future__ import annotations

import html
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from diffcache.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

Rows = Sequence[Sequence[str]]

GAP = 2  # columns between cells
INDENT = 4  # of the last cell, if it is on a line below
LEAST_ROOM = 40  # columns that the last cell needs to share a line with the others


def on_terminal() -> bool:
    """Return whether the output goes to a terminal."""
    return sys.stdout.isatty()


def table(heads: Sequence[str], groups: Mapping[str, Rows], *, right: Sequence[str] = ()) -> None:
    """Print a table. On a terminal, rows are grouped under headings.

    Elsewhere, it is tab-separated, with the names of the columns in the first line and the heading in the last column.

    Args:
        heads: Names of the columns.
        groups: Heading -> its rows. "" prints no heading.
        right: Names of the columns of numbers, aligned at the right on a terminal.
    """
    if not on_terminal():
        if any(groups):
            heads = [*heads, "group"]
            groups = {group: [[*row, group] for row in rows] for group, rows in groups.items()}
        lines = [heads, *(row for rows in groups.values() for row in rows)]
        typer.echo("\n".join("\t".join(map(printable, line)) for line in lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    every = [list(heads), *(list(row) for rows in groups.values() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)][:-1]
    console.print(_drawn([heads], heads, right, widths, console.width, style="bold"))
    for group, rows in groups.items():
        if group and rows:
            console.print(Text(f"\n{group}", style="bold"))
        console.print(_drawn(rows, heads, right, widths, console.width))


def _drawn(
    rows: Rows, heads: Sequence[str], right: Sequence[str], widths: Sequence[int], width: int, *, style: str = ""
) -> RenderableType:
    """Return the rows as columns of these widths. The last column takes the rest, or the next line in a narrow window.

    Args:
        rows: The cells.
        heads: Names of the columns.
        right: Names of the columns that are aligned at the right.
        widths: Width of each column but the last, in characters.
        width: Width of the window, in characters.
        style: Style of all cells.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    below = width - sum(widths) - GAP * len(widths) < LEAST_ROOM
    parts: list[RenderableType] = []
    for row in rows:
        line = Table.grid(padding=(0, GAP, 0, 0), expand=not below)
        for head, size in zip(heads, widths, strict=False):
            line.add_column(justify="right" if head in right else "left", width=size, no_wrap=True)
        cells = [Text(cell, style=style) for cell in row]
        if below:
            line.add_row(*cells[:-1])
            parts += [line, Padding(cells[-1], (0, 0, 0, INDENT))]
        else:
            line.add_column(ratio=1)
            line.add_row(*cells)
            parts.append(line)
    return Group(*parts)


def remark(text: str) -> None:
    """Print a paragraph above a table on a terminal, and nothing elsewhere."""
    if on_terminal():
        from rich.console import Console
        from rich.text import Text

        Console(file=sys.stdout).print(Text(text))


def markdown(text: str) -> None:
    """Print text with Markdown tables. On a terminal the tables are drawn; elsewhere the text is printed as it is.

    In a narrow window, a table is drawn without the intervals in brackets, and then with the name of each row above its
    numbers.
    """
    if not on_terminal():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(file=sys.stdout)
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and all(line.startswith("|") for line in lines):
            console.print(*_markdown_table(lines, console.width), sep="\n")
        else:
            console.print(Markdown(block))


def _markdown_table(lines: Sequence[str], width: int) -> list[RenderableType]:
    """Return a Markdown table for a window of ``width`` characters. Columns of text, except the first, are put below.

    Args:
        lines: The lines of the table: names of the columns, their alignment, and the rows.
        width: Width of the window, in characters.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    heads, marks, *rows = ([_plain(cell) for cell in _PIPE.split(line.strip()[1:-1])] for line in lines)
    numbers = [n for n, mark in enumerate(marks) if n and mark.endswith(":")]
    prose = [n for n in range(1, len(heads)) if n not in numbers]

    def sizes() -> list[int]:
        cells = [[*heads[n].split(), *(row[n] for row in rows)] for n in numbers]
        return [max(map(len, column)) for column in cells]

    name = max(len(row[0]) for row in [heads, *rows])
    remarks = []
    if name + sum(sizes()) + GAP * len(numbers) > width:
        shorter = [[_INTERVAL.sub("", cell) if n in numbers else cell for n, cell in enumerate(row)] for row in rows]
        remarks = ["Without the intervals, which need a wider window."] if shorter != rows else []
        rows = shorter
    widths = sizes()
    above = name + sum(widths) + GAP * len(numbers) > width
    parts: list[RenderableType] = []
    for row in [heads, *rows]:
        style = "bold" if row is heads else ""
        grid = Table.grid(padding=(0, GAP, 0, 0))
        if not above:
            grid.add_column(width=name, vertical="bottom")
        for size in widths:
            grid.add_column(justify="right", width=size, overflow="fold", vertical="bottom")
        cells = [Text(row[n], style=style) for n in numbers]
        if above:
            parts.append(Text(row[0], style="bold"))
            grid.add_row(*cells)
            parts.append(Padding(grid, (0, 0, 0, GAP)))
        else:
            grid.add_row(Text(row[0], style=style), *cells)
            parts.append(grid)
        if row is not heads:
            parts += [Padding(Text(f"{heads[n]}: {row[n]}"), (0, 0, 0, INDENT)) for n in prose]
    return [*parts, *map(Text, remarks)]


_PIPE = re.compile(r"(?<!\\)\|")
_INTERVAL = re.compile(r" \([^()]* to [^()]*\)")


def _plain(cell: str) -> str:
    """Return the text of a cell of a Markdown table."""
    return html.unescape(re.sub(r"\\(.)", r"\1", cell.strip()))


def use_next(schedule: Path, measure: Sequence[str] = (), *, variable: str = "pipe", seen: str = "prompts") -> None:
    """Print what to do with a schedule that was just written.

    Args:
        schedule: The file.
        measure: The words of the command that measures it; none if it is not known.
        variable: The name of the object in the example.
        seen: What the calls of the calibration were made of.
    """
    lines = [
        "\nUse it with the same steps, size and guidance:",
        f"  {variable} = diffcache.accelerate({variable}, {str(schedule)!r})",
        f"Look at it, and measure it on {seen} that it has not seen:" if measure else "Look at it:",
        f"  {shlex.join(['diffcache', 'show', str(schedule)])}",
    ]
    typer.echo("\n".join([*lines, *([f"  {shlex.join(measure)}"] if measure else [])]))


def note(text: str) -> None:
    """Print a remark to the error stream, so that it is not part of the result."""
    typer.echo(f"note: {printable(text)}", err=True)
