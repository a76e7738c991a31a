"""Files: read whole and within a bound, written whole or not at all.

A reader takes regular files only: a FIFO blocks, and a device may never end. A writer fills a new file of a random name
beside the target and renames it. A reader therefore finds the old file or the new one, a link at the target is replaced
and not followed, and two processes that write the same file both succeed.

``inside`` is a folder that others may have filled. Below it no link is followed; the folder itself may be a link.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffcache.documents.checks import refuse
from diffcache.errors import DocumentError, NotWritten

MAX_BYTES = 256 * 2**20
MAX_DEPTH = 32
MAX_DIGITS = 20  # a 64-bit number and its sign

# Windows has no FIFOs in folders; there the first is 0, and the second keeps line ends as they are.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def opened(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> Iterator[BinaryIO]:
    """Open a regular file of at most ``most`` bytes. Raises DocumentError for anything else."""
    where = str(path)
    try:
        if inside is not None:
            _demand_no_link(path, inside)
        descriptor = os.open(path, _FLAGS)
    except DocumentError:
        raise
    except FileNotFoundError:
        refuse(where, "file", "no such file", "a regular file", "Check the path.")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        refuse(where, "file", f"cannot be read: {error}", "a readable file")
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            refuse(where, "file", "found a folder or a device", "a regular file", "Check the path.")
        if about.st_size > most:
            refuse(where, "file", f"found {about.st_size} bytes", f"at most {most}", "Is it the right file?")
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> bytes:
    """Return the content of a regular file. Raises DocumentError."""
    with opened(path, most=most, inside=inside) as file:
        try:
            data = file.read(most + 1)  # the file may have grown
        except OSError as error:
            refuse(str(path), "file", f"cannot be read: {error}", "a readable file")
    if len(data) > most:
        refuse(str(path), "file", f"found more than {most} bytes", f"at most {most}", "Is it the right file?")
    return data


def read_text(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> str:
    """Return the content of a file in UTF-8, with or without a byte order mark. Raises DocumentError."""
    try:
        return read_bytes(path, most=most, inside=inside).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(str(path), "file", f"cannot be read as text: {error}", "text in UTF-8")


def read_json(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DocumentError."""
    return parse_json(str(path), "file", read_bytes(path, most=most, inside=inside))


def parse_json(where: str, field: str, source: str | bytes) -> dict[str, Any]:
    """Return the JSON object in ``source``. Raises DocumentError for other JSON, NaN, and a key given twice."""

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    def number(name: str) -> float:
        raise ValueError(f"the number {name}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError("the same key twice in one object")
        return tree

    try:
        tree = json.loads(source, parse_int=whole, parse_constant=number, object_pairs_hook=once)
        _demand_shallow(tree)
    except RecursionError:
        refuse(where, field, "JSON nested too deeply", f"at most {MAX_DEPTH} levels")
    except ValueError as error:
        refuse(where, field, f"not sound JSON: {error!s:.200}", "one JSON object", "The file is damaged or foreign.")
    if not isinstance(tree, dict):
        refuse(where, field, f"found a JSON {type(tree).__name__}", "one JSON object")
    return tree


def _demand_shallow(tree: object) -> None:
    """Raise RecursionError for JSON that code which goes down into it could not follow."""
    level = [tree] if isinstance(tree, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        nodes = (node.values() if isinstance(node, dict) else node for node in level)
        level = [item for node in nodes for item in node if isinstance(item, (dict, list))]
        if not level:
            return
    raise RecursionError


def read_arrays(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file by name, or that of an ``.npy`` file under "". Raises DocumentError.

    ``most`` bounds the file and the sum of what its members unpack to.
    """
    where = str(path)
    with opened(path, most=most, inside=inside) as file:
        try:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return {"": found}
            with found:
                size = sum(member.file_size for member in found.zip.infolist())
                if size > most:
                    refuse(where, "file", f"found arrays of {size} bytes", f"at most {most}")
                return {name: found[name] for name in found.files}
        except DocumentError:
            raise
        except Exception as error:  # damaged archives raise a dozen classes
            found_ = f"damaged: {type(error).__name__}: {error!s:.200}"
            refuse(where, "file", found_, "arrays as numpy.save and numpy.savez write them")


def write(path: Path, data: bytes | str | Callable[[BinaryIO], object], *, inside: Path | None = None) -> Path:
    """Write the whole file or none, and return its path.

    ``data`` is bytes, text (written as UTF-8), or a function that writes to the open file it is called with. With
    ``inside``, folders between it and the file are made.

    Raises DocumentError where no file can be, NotWritten (an OSError) where the system refuses, for example for want of
    space.
    """
    if inside is not None:
        make_folder(path.parent, inside=inside)
    beside = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        demand_place(path)
        with beside.open("xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise NotWritten(path, error) from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise NotWritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return path


def make_folder(path: Path, *, inside: Path | None = None) -> Path:
    """Make the folder, and those above it, where they are missing, and return its path.

    Raises DocumentError where something else has the name, NotWritten where the system refuses.
    """
    try:
        if inside is not None:
            _demand_no_link(path, inside)
        path.mkdir(parents=True, exist_ok=True)
    except DocumentError:
        raise
    except (FileExistsError, NotADirectoryError):
        refuse(str(path), "folder", "found something else in its place", "a folder, or a path where one can be made")
    except (OSError, ValueError) as error:
        raise NotWritten(path, error) from error
    return path


def demand_place(path: Path) -> None:
    """Raise DocumentError where no file can be written, or where one would replace a folder or a device."""
    if not path.parent.is_dir():
        refuse(str(path), "file", f"no folder {str(path.parent)!r}", "a folder that exists", "Create it first.")
    if path.is_dir():
        refuse(str(path), "file", "found a folder", "a file name", f"Try {str(path / 'name.safetensors')!r}.")
    if path.exists() and not path.is_file():
        refuse(str(path), "file", "found a device", "a file name", "It would be replaced by a file.")


def _demand_no_link(path: Path, inside: Path) -> None:
    """Raise DocumentError where ``path`` leads out of ``inside``, by its name or by a link."""
    parts = path.relative_to(inside).parts
    if ".." in parts:
        refuse(str(path), "file", "a path that leads out of the folder", f"a path inside {str(inside)!r}")
    for part in parts:
        inside = inside / part
        if inside.is_symlink():
            found = f"{str(inside)!r} is a link"
            refuse(str(path), "file", found, "files and folders themselves: links are not followed here", "Remove it.")
