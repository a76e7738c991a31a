"""Fixtures of several contract tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_criteria import PLANTED


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module ``planted_of_tests`` that is importable and not yet imported."""
    (tmp_path / "planted_of_tests.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("planted_of_tests", None)
    yield
    sys.modules.pop("planted_of_tests", None)
