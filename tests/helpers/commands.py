"""The ``diffcache`` command, run within the tests' own process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

from diffcache import cli

Command = Callable[..., tuple[int, str, str]]


def status_of(complaint: str) -> int:
    """The exit status that belongs to the line of an error: 2 for a wrong option or name, else 1."""
    wrong = r"error: (.+ was given\. Allowed: |.+ cannot be used: |no .+ called .+ Known: )"
    return 2 if re.match(wrong, complaint) else 1


def command_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Command:
    """``diffcache`` with these words and more: exit status, what it printed, what it complained of."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffcache", *first, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return run
