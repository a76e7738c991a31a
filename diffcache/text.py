"""Make text from users and files safe to show in a terminal, an error or a Markdown table.

``card`` does so for notebooks.
"""

from __future__ import annotations

import html

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


def card(title: str, body: str) -> str:
    """Return a title and a text of several lines as HTML for a notebook.

    The HTML refers to no other file. Its colours are those of the notebook, light or dark.
    """
    lines = html.escape("\n".join(map(printable, body.splitlines())))
    return (
        '<div style="border:1px solid rgba(127,127,127,.4);border-radius:6px;padding:.5em .8em;overflow-x:auto;'
        'color:inherit;background:rgba(127,127,127,.06)">'
        f"<strong>{html.escape(printable(title))}</strong>"
        '<pre style="margin:.4em 0 0;color:inherit;background:transparent;line-height:1.35;font-size:.85em">'
        f"{lines}</pre></div>"
    )


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()
