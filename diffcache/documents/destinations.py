"""Check the paths that a long job will write to, before the job begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from diffcache.errors import BadOption


def check_file(name: str, path: str | Path) -> Path:
    """Return ``path`` if a file can be written there, in a folder that exists. No file remains.

    Args:
        name: Name of the option, for errors.
        path: The file.

    Raises:
        BadOption: If the file cannot be written.
    """
    where = _path(name, path)
    try:
        fits = not where.is_dir() and where.absolute().parent.is_dir()
    except (OSError, ValueError) as error:
        raise BadOption(name, _short(path), f"a file that can be written ({_reason(error)})") from None
    if not fits:
        raise BadOption(name, _short(path), "a file in a folder that exists")
    _probe(name, where, where.absolute().parent)
    return where


def check_folder(name: str, path: str | Path) -> Path:
    """Return ``path`` if it is a writable folder, or one can be made there. No file remains.

    Args:
        name: Name of the option, for errors.
        path: The folder.

    Raises:
        BadOption: If the folder cannot be written to or made.
    """
    where = _path(name, path)
    above = where.absolute()
    try:
        while not above.exists() and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise BadOption(name, _short(path), f"a folder, or a path where one can be made; {above} is a file")
    except (OSError, ValueError) as error:
        if isinstance(error, BadOption):
            raise
        raise BadOption(name, _short(path), f"a folder that can be made ({_reason(error)})") from None
    _probe(name, where, above)
    return where


def _path(name: str, path: object) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise BadOption(name, path, "a path")
    return Path(path)


def _probe(name: str, where: Path, folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder, prefix=".diffcache-").close()
    except OSError as error:
        raise BadOption(name, _short(where), f"a place that can be written to ({_reason(error)})") from None


def _short(path: object) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
