"""Read files whole and with a limit on their size; write files whole or not at all.

Only regular files are read, because a FIFO blocks and a device may have no end. A file is written under a random name
in the same folder and then renamed. A reader therefore finds either the old or the new file, a link at the target is
replaced and not followed, and two processes can write the same file.

``inside`` is a folder that other users may have filled. No link below it is followed. The folder itself may be a link.
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

# Windows has no FIFOs in folders: O_NONBLOCK is missing there. O_BINARY keeps line ends as they are.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def opened(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> Iterator[BinaryIO]:
    """Open a regular file of at most ``most`` bytes.

    Args:
        path: The file.
        most: Largest allowed size in bytes.
        inside: A folder above the file, below which no link is followed.

    Raises:
        DocumentError: If the file is missing, not regular, too large or not readable, or a link leads to it.
    """
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
    """Return the content of a regular file.

    Raises:
        DocumentError: As in ``opened``.
    """
    with opened(path, most=most, inside=inside) as file:
        try:
            data = file.read(most + 1)  # the file may have grown
        except OSError as error:
            refuse(str(path), "file", f"cannot be read: {error}", "a readable file")
    if len(data) > most:
        refuse(str(path), "file", f"found more than {most} bytes", f"at most {most}", "Is it the right file?")
    return data


def read_text(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> str:
    """Return the content of a file in UTF-8, with or without a byte order mark.

    Raises:
        DocumentError: As in ``opened``, or if the file is not UTF-8.
    """
    try:
        return read_bytes(path, most=most, inside=inside).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(str(path), "file", f"cannot be read as text: {error}", "text in UTF-8")


def read_json(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DocumentError: As in ``opened`` and ``parse_json``.
    """
    return parse_json(str(path), "file", read_bytes(path, most=most, inside=inside))


def parse_json(where: str, field: str, source: str | bytes) -> dict[str, Any]:
    """Return the JSON object in ``source``.

    Args:
        where: Name of the file in errors.
        field: Name of the field in errors.
        source: The JSON.

    Raises:
        DocumentError: If ``source`` is not a JSON object, is nested too deeply, or contains NaN, infinity, a duplicate
            key, or a whole number of more than MAX_DIGITS digits.
    """

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
    """Raise RecursionError for JSON of more than MAX_DEPTH levels, which recursive code could not process."""
    level = [tree] if isinstance(tree, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        nodes = (node.values() if isinstance(node, dict) else node for node in level)
        level = [item for node in nodes for item in node if isinstance(item, (dict, list))]
        if not level:
            return
    raise RecursionError


def read_arrays(path: Path, *, most: int = MAX_BYTES, inside: Path | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file by name, or the array of an ``.npy`` file under "".

    Args:
        path: The file.
        most: Largest allowed size in bytes, of the file and of all unpacked arrays together.
        inside: A folder above the file, below which no link is followed.

    Raises:
        DocumentError: As in ``opened``, or if the file does not hold arrays.
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
        except Exception as error:  # damaged archives raise many classes
            found_ = f"damaged: {type(error).__name__}: {error!s:.200}"
            refuse(where, "file", found_, "arrays as numpy.save and numpy.savez write them")


def write(path: Path, data: bytes | str | Callable[[BinaryIO], object], *, inside: Path | None = None) -> Path:
    """Write a file whole or not at all, and return its path.

    Args:
        path: The file.
        data: Bytes, text (written as UTF-8), or a function that writes to the open file that it receives.
        inside: A folder above the file. Folders between it and the file are made, and no link below it is followed.

    Raises:
        DocumentError: If ``path`` cannot be a file.
        NotWritten: If the system does not allow it, for example because no space is left. It is an OSError.
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
    """Make a folder and the missing folders above it, and return its path.

    Raises:
        DocumentError: If another object has the name, or a link leads to it below ``inside``.
        NotWritten: If the system does not allow it.
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
    """Raise DocumentError if no file can be written to ``path``, or if it would replace a folder or a device."""
    if not path.parent.is_dir():
        refuse(str(path), "file", f"no folder {str(path.parent)!r}", "a folder that exists", "Create it first.")
    if path.is_dir():
        refuse(str(path), "file", "found a folder", "a file name", f"Try {str(path / 'name.safetensors')!r}.")
    if path.exists() and not path.is_file():
        refuse(str(path), "file", "found a device", "a file name", "It would be replaced by a file.")


def _demand_no_link(path: Path, inside: Path) -> None:
    """Raise DocumentError if ``path`` leads out of ``inside``, by its name or by a link."""
    parts = path.relative_to(inside).parts
    if ".." in parts:
        refuse(str(path), "file", "a path that leads out of the folder", f"a path inside {str(inside)!r}")
    for part in parts:
        inside = inside / part
        if inside.is_symlink():
            found = f"{str(inside)!r} is a link"
            refuse(str(path), "file", found, "files and folders themselves: links are not followed here", "Remove it.")
