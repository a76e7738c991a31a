"""Which test files hold tests marked ``fast``, read from their text."""

from __future__ import annotations

import re
from pathlib import Path


def holds_fast_tests(path: Path) -> bool:
    """Return whether a test file marks itself or one of its tests ``fast``."""
    return bool(re.search(r"^(pytestmark = .*|@)pytest\.mark\.fast\b", path.read_text(encoding="utf-8"), re.MULTILINE))
