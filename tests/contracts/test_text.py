"""Foreign text cannot move a cursor, forge a line or become markup where it is shown."""

from __future__ import annotations

import pytest

from diffcache.errors import BadOption, DiffCacheError, DocumentError, ScheduleMismatch, UnknownName
from diffcache.text import markdown, printable

pytestmark = pytest.mark.fast

HOSTILE = "a\x1b[31mred\x1b[0m\nerror: forged\rline\u202egnp\x07\x9b2J\u2028next\ud800"


def test_what_does_not_show_becomes_an_escape() -> None:
    assert printable(HOSTILE) == (
        "a\\x1b[31mred\\x1b[0m error: forged line\\u202egnp\\x07\\x9b2J next\\ud800"
    )  # fmt: skip
    assert printable(HOSTILE).isprintable()
    for innocent in ("4 steps, Euler", "Ω × σ − …", "日本語", "naïve", "🦊", ""):
        assert printable(innocent) == innocent


@pytest.mark.parametrize(
    "error",
    [
        DiffCacheError(HOSTILE),
        ScheduleMismatch(f"made for {HOSTILE}"),
        DocumentError(HOSTILE, HOSTILE, HOSTILE),
        BadOption(HOSTILE, HOSTILE, HOSTILE),
        UnknownName(HOSTILE, HOSTILE, [HOSTILE]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_one_line_that_shows(error: DiffCacheError) -> None:
    assert str(error).isprintable()
    assert "error: forged" in str(error)


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("[x](http://e.org)", "\\[x\\](http\\://e.org)"),
        ("![x](http://e.org/p.png)", "!\\[x\\](http\\://e.org/p.png)"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("https://e.org www.e.org me@e.org", "https\\://e.org www\\.e.org me&#64;e.org"),
        ("a | b\n| forged |", "a \\| b \\| forged \\|"),
        ("`code` **bold** \\", "\\`code\\` \\*\\*bold\\*\\* \\\\"),
        ("cache-dit DBCache (F1B0 W3 R0.12)", "cache-dit DBCache (F1B0 W3 R0.12)"),
        ("closed_loop, 12 steps", "closed_loop, 12 steps"),
    ],
)
def test_markdown_shows_text_as_it_is(foreign: str, shown: str) -> None:
    assert markdown(foreign) == shown
