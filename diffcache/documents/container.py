"""Convert a document to bytes and back.

The bytes are a safetensors file. Its only metadata key, ``diffcache``, holds canonical JSON. Files with an invalid
structure are rejected here, before their fields are interpreted. See docs/formats.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from diffcache.documents.checks import refuse
from diffcache.documents.files import MAX_BYTES, opened, parse_json
from diffcache.errors import DocumentError

KEY = "diffcache"
MAX_HEADER_BYTES = 4 * 2**20
LEAST_BYTES = 10  # 8 bytes for the length of the header, and 2 for "{}"
TEXT = (*range(32, 127), *b"\t\n\r")  # bytes of a text; in a length, they would mean a header of 10¹⁶ bytes or more
AGAIN = "Copy or download it again."
FOREIGN = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle", b"{": "a JSON text"}

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]


def pack(where: str, tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a tree and its arrays. Equal trees and arrays give equal bytes in every process.

    Args:
        where: The document, for errors.
        tree: The JSON of the document.
        arrays: The arrays by name: bool, uint8 or float64.

    Raises:
        DocumentError: If there are too many bytes to be read again.
    """
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    stored = {name: a.view(np.uint8) if a.dtype == bool else a for name, a in arrays.items()}
    data = safetensors.save(stored, metadata={KEY: canonical})
    _check_size(where, data)  # a document that could not be read again is not written
    return data


def unpack(where: str, data: bytes) -> tuple[Tree, Arrays]:
    """Return the tree and the arrays in ``data``.

    This runs no code, and allocates at most a small multiple of the length of ``data``.

    Raises:
        DocumentError: If ``data`` is not a valid file. Errors name it ``where``.
    """
    header = _header(where, data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [KEY] or not isinstance(metadata[KEY], str):
        refuse(
            where,
            "metadata",
            f"found {_names(metadata)}",
            f"one key, {KEY!r}, with the document as JSON",
            "This is a safetensors file of another kind, for example weights or a LoRA.",
        )
    tree = parse_json(where, "metadata", metadata[KEY])
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else entry
        if dtype not in ("U8", "F64"):
            refuse(where, name, f"found dtype {dtype!r:.80}", "U8 or F64")
    try:
        arrays = safetensors.load(data)
    except SafetensorError as error:
        refuse(where, "file", f"damaged: {error!s:.200}", "a whole safetensors file", AGAIN)
    return tree, {name: _as_bool(where, name, a) if a.dtype == np.uint8 else a for name, a in arrays.items()}


def format_in(path: Path) -> object:
    """Return the format that the header of a file names, or None if the file is not a document. No array is read."""
    try:
        with opened(path, most=sys.maxsize) as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(str(path), "header", file.read(length)) if length <= MAX_HEADER_BYTES else {}
            metadata = header.get("__metadata__")
            text = metadata.get(KEY) if isinstance(metadata, dict) else None
            return parse_json(str(path), "metadata", text).get("format") if isinstance(text, str) else None
    except (DocumentError, OSError):
        return None


def _check_size(where: str, data: bytes) -> int:
    """Return the length of the header that the first 8 bytes state.

    Raises:
        DocumentError: If the file or the header is too long.
    """
    if len(data) > MAX_BYTES:
        refuse(
            where,
            "file",
            f"found {len(data)} bytes",
            f"at most {MAX_BYTES}",
            "Check that the file is a diffcache document.",
        )
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        if all(byte in TEXT for byte in data[:8]):
            refuse(where, "file", "found a text", "a safetensors file", "Check the path.")
        refuse(
            where,
            "file",
            f"a header of {length} bytes",
            f"at most {MAX_HEADER_BYTES}",
            "Check that the file is a safetensors file.",
        )
    return length


def _header(where: str, data: bytes) -> Tree:
    """Return the JSON of the safetensors header, after checking its length."""
    for magic, kind in FOREIGN.items():
        if data.startswith(magic) and data[8:9] != b"{":
            refuse(where, "file", f"found {kind}", "a safetensors file", "Nothing in it was run.")
    if len(data) < LEAST_BYTES:
        refuse(where, "file", f"found {len(data)} bytes", f"a safetensors file, at least {LEAST_BYTES} bytes")
    end = 8 + _check_size(where, data)
    if end > len(data):
        refuse(where, "file", f"{len(data)} bytes, but its header ends at {end}", "a whole safetensors file", AGAIN)
    return parse_json(where, "header", data[8:end])


def _as_bool(where: str, name: str, array: np.ndarray) -> np.ndarray:
    if array.max(initial=0) > 1:
        refuse(where, name, f"found the byte {array.max()}", "0 (predict) or 1 (compute)")
    return array.view(bool)


def _names(metadata: object) -> str:
    if not isinstance(metadata, dict):
        return "none"
    return f"the keys {', '.join(sorted(map(repr, metadata))):.200}"
