"""Read settings from the environment."""

from __future__ import annotations

import os


def debug() -> bool:
    """Return whether DIFFCACHE_DEBUG asks for the traceback of an error on the command line."""
    return os.environ.get("DIFFCACHE_DEBUG", "") not in ("", "0")
