"""Read settings from the environment.

Where output goes, to a terminal, a notebook or a file, is part of the environment.
"""

from __future__ import annotations

import os
import sys


def debug() -> bool:
    """Return whether DIFFCACHE_DEBUG asks for the traceback of an error on the command line."""
    return os.environ.get("DIFFCACHE_DEBUG", "") not in ("", "0")


def shows_progress(asked: bool | None) -> bool:
    """Return whether to show progress bars.

    Args:
        asked: True or False, or None to show them where a person reads them: on a terminal or in a notebook.
    """
    if asked is not None:
        return bool(asked)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())
