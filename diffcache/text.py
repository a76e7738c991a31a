"""Make text from users and files safe to show in a terminal, an error or a Markdown table."""

from __future__ import annotations

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


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()
