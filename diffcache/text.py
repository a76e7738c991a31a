"""Make text from users and files safe to show in a terminal, an error or a Markdown table.

``card`` and ``html_table`` do so for notebooks.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence

_MARKDOWN = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "\\|[]`*"},
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "@": "&#64;",  # GitHub turns e-mail addresses and names into links
    }
)


def printable(value: object) -> str:
    """Return ``value`` as one line of text in which every character is visible.

    White space becomes a space. Control characters (such as the first character of an ANSI sequence), marks that
    reverse the direction of text, and lone surrogates become escapes: ``\\x1b``, ``\\u202e``, ``\\ud800``.
    """
    text = str(value)
    return text if text.isprintable() else "".join(map(_shown, text))


def markdown(value: object) -> str:
    """Return ``value`` as printable text that Markdown shows literally: no column, tag, link, picture or emphasis."""
    line = " ".join(printable(value).split()).translate(_MARKDOWN)
    # GitHub also turns bare addresses into links.
    return line.replace("://", "\\://").replace("www.", "www\\.").replace("WWW.", "WWW\\.")


def card(title: str, body: str, *, table: str = "") -> str:
    """Return a title and a text of several lines as HTML for a notebook. Long lines wrap.

    The HTML refers to no other file. Its colours are those of the notebook, light or dark.

    Args:
        title: The title.
        body: The text.
        table: HTML between the title and the text; see ``html_table``.
    """
    lines = html.escape("\n".join(map(printable, body.splitlines())))
    return (
        f'<div style="border:{_RULE};border-radius:6px;padding:.5em .8em;overflow-x:auto;'
        'color:inherit;background:rgba(127,127,127,.06)">'
        f"<strong>{html.escape(printable(title))}</strong>{table}"
        '<pre style="margin:.4em 0 0;color:inherit;background:transparent;line-height:1.35;font-size:.85em;'
        f'white-space:pre-wrap;overflow-wrap:anywhere">{lines}</pre></div>'
    )


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Return a table as HTML for a notebook. Cells wrap at spaces. Text also wraps after ``_``, ``:`` and ``.``, and
    before a capital letter within a word.

    Args:
        heads: Names of the columns.
        rows: The cells.
        right: Names of the columns of numbers, aligned at the right.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = []
        for head, cell in zip(heads, cells, strict=True):
            align, text = "right", html.escape(printable(cell))
            if head not in right or tag == "th":
                text = re.sub(r"([_:.])(?=\w)|(?<=[a-z])(?=[A-Z])", r"\1<wbr>", text)
            if head not in right:
                align = "left"
            parts.append(f'<{tag} style="text-align:{align};{_CELL}">{text}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    style = "color:inherit;background:transparent;border-collapse:collapse;font-size:.8em;margin:.4em 0 0"
    return f'<table style="{style}">{line("th", heads)}{body}</table>'


_RULE = "1px solid rgba(127,127,127,.4)"
_CELL = f"padding:.2em .35em;border-bottom:{_RULE};color:inherit;white-space:normal;vertical-align:top"


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()
