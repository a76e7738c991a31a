"""Files that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"`([a-z_]+(?:/[a-z_0-9]+)+(?:\.py|/))`")


def missing(text: str) -> list[str]:
    """Return the paths in backticks that are in neither the repository nor the package."""
    return [
        path for path in PATH.findall(text) if not any((root / path).exists() for root in (ROOT, ROOT / "diffcache"))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    assert missing(document.read_text(encoding="utf-8")) == []


def test_a_file_that_does_not_exist_is_noticed() -> None:
    assert missing("`host/kinds/` and `host/loops.py`") == ["host/loops.py"]
