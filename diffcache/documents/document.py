"""Base classes of documents: equality by value, digests and files. The format follows from the annotations."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from diffcache.documents import container, files, hub
from diffcache.documents.checks import refuse
from diffcache.errors import DocumentError

D = TypeVar("D", bound="Document")

Tree = dict[str, Any]
Upgrade = Callable[[Tree], None]  # converts the JSON of an older version to that of the current one, in place

TENSOR = "tensor"  # stands for an array in the JSON, so that a missing array is found


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A frozen dataclass that may contain arrays and is compared by value."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self))


class Document(Record):
    """A record that has a file format. A version of the format is a fixed list of fields; see docs/formats.md.

    Attributes:
        FORMAT: Name of the format.
        VERSION: The current version.
        FILENAME: The default name of a file.
        OLDER: Older version that can be read -> the function that converts its JSON.
        ADVICE: Another format that a file may have -> what to do with such a file, for the error.
    """

    __slots__ = ()
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    FILENAME: ClassVar[str]
    OLDER: ClassVar[Mapping[int, Upgrade]] = MappingProxyType({})  # older version -> its upgrade
    ADVICE: ClassVar[Mapping[str, str]] = MappingProxyType({})  # another format -> a sentence

    def to_bytes(self) -> bytes:
        """Return the content of the file. Equal documents have equal bytes under one version of this library.

        Raises:
            DocumentError: If the document holds a value that is not allowed in a file.
        """
        self.check_file(type(self).__name__)
        return self._pack(library=version_of("diffcache"))

    @classmethod
    def from_bytes(cls: type[D], data: bytes, *, where: str = "bytes") -> D:
        """Return the document in ``data``.

        Args:
            data: The content of a file.
            where: Name of the data in errors.

        Raises:
            DocumentError: If ``data`` is not a valid document.
        """
        document = cls._unpack(data, where)
        document.check_file(where)
        return document

    @classmethod
    def _unpack(cls: type[D], data: bytes, where: str) -> D:
        tree, arrays = container.unpack(where, data)
        format_, version = tree.pop("format", None), tree.pop("version", None)
        if format_ != cls.FORMAT:
            advice = cls.ADVICE.get(format_, "") if isinstance(format_, str) else ""
            refuse(where, "format", f"found {format_!r:.80}", f"{cls.FORMAT!r}, which {cls.__name__} reads", advice)
        if type(version) is not int or version not in (cls.VERSION, *cls.OLDER):
            allowed = ", ".join(map(str, [*cls.OLDER, cls.VERSION]))
            refuse(where, "version", f"found {version!r:.80}", allowed, "A newer one needs a newer diffcache.")
        if not isinstance(tree.pop("library", None), str):
            refuse(where, "library", "missing or not text", "the version of the library that wrote the file")
        if version in cls.OLDER:
            try:
                cls.OLDER[version](tree)
            except DocumentError as error:
                raise DocumentError(where, error.field, error.problem) from None
        document: D = _Reader(where, arrays).record(cls, tree, "")
        for name in sorted(arrays):
            refuse(where, name, "found a tensor that the document does not mention", "the tensors it mentions")
        return document

    def check_file(self, where: str) -> None:
        """Raise DocumentError if the document holds a value that is valid in code but not in a file.

        Args:
            where: Name of the document in errors.
        """

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all, and return its path.

        Raises:
            DocumentError: If the document is not allowed in a file, or ``path`` cannot be a file.
            NotWritten: If the file cannot be written.
        """
        return files.write(Path(path), self.to_bytes())

    @classmethod
    def load(cls: type[D], path: str | Path) -> D:
        """Return the document in a file. No code from the file is run.

        Raises:
            DocumentError: If the file is not a complete, valid document.
        """
        return cls.from_bytes(files.read_bytes(Path(path)), where=str(path))

    def digest(self) -> str:
        """Return the sha256 of the canonical bytes without the version of the library."""
        return hashlib.sha256(self._pack(library="")).hexdigest()

    @classmethod
    def from_pretrained(
        cls: type[D],
        id_or_folder: str | Path,
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> D:
        """Load from a local folder or, if there is none of that name, from a repository on the Hugging Face Hub.

        Args:
            id_or_folder: Folder, or id of a repository.
            filename: Name of the file. The default is FILENAME.
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub.

        Raises:
            HubUnavailable: If the file cannot be downloaded.
            DocumentError: If the file is not a valid document.
        """
        return cls.load(hub.fetch(id_or_folder, filename or cls.FILENAME, revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload to a model repository on the Hugging Face Hub, which is created if it does not exist.

        Args:
            repo_id: Id of the repository.
            filename: Name of the file. The default is FILENAME.
            private: Whether a new repository is private. An existing one is not changed.
            token: Token for the Hub.
            commit_message: Message of the commit.

        Returns:
            The address of the commit.

        Raises:
            HubUnavailable: If the file cannot be uploaded.
        """
        name = filename or self.FILENAME
        message = commit_message or f"Add {name} ({self.FORMAT})"
        return hub.publish(self.to_bytes(), repo_id, name, private=private, token=token, message=message)

    def __reduce__(self) -> tuple[Callable[[bytes, str], Document], tuple[bytes, str]]:
        # Read-only mappings cannot be pickled or copied themselves.
        return type(self)._unpack, (self._pack(library=version_of("diffcache")), "bytes")

    @classmethod
    def _lower(cls, tree: Tree) -> int:
        """Convert JSON to that of the oldest version in which this library writes it, in place.

        A file that needs no field of the newest version keeps its bytes and its digest, and older libraries read it.

        Returns:
            The version. The default is the current one.
        """
        return cls.VERSION

    def _pack(self, *, library: str) -> bytes:
        arrays: dict[str, np.ndarray] = {}
        tree = _tree(self, "", arrays)
        tree |= {"format": self.FORMAT, "version": self._lower(tree), "library": library}
        return container.pack(type(self).__name__, tree, arrays)


def configurations(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that hold a configuration as JSON.

    They are used to name the settings that differ from another configuration.
    """
    return {key: text for key, text in provenance.items() if key.startswith("config/")}


def spoken(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that are meant for readers: all except configurations."""
    return {key: text for key, text in provenance.items() if not key.startswith("config/")}


def _tree(record: Any, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the JSON of a record, and put its arrays into ``arrays``.

    Each array is named by the keys on its path and its field.
    """

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, np.ndarray):
            arrays[name] = value
            return TENSOR
        if isinstance(value, Mapping):
            return {str(key): _tree(v, f"{prefix}{key}/", arrays) if _is_record(v) else v for key, v in value.items()}
        return _tree(value, f"{name}/", arrays) if _is_record(value) else value

    return {f.name: encode(getattr(record, f.name), prefix + f.name) for f in dataclasses.fields(record)}


class _Reader:
    """The inverse of ``_tree``.

    It removes the arrays that it uses from ``arrays``. Its errors name the file and the field.
    """

    def __init__(self, where: str, arrays: dict[str, np.ndarray]) -> None:
        self.where, self.arrays = where, arrays

    def record(self, kind: Any, tree: Any, prefix: str) -> Any:
        """Return the record of class ``kind`` whose JSON is ``tree``. The names of its fields begin with ``prefix``."""
        hints = _hints(kind)
        if not isinstance(tree, dict):
            self.refuse(prefix.rstrip("/"), tree, "an object")
        for name in sorted(hints.keys() ^ tree.keys()):
            found = "is missing" if name in hints else "is unknown"
            refuse(self.where, prefix + name, f"the field {found}", f"exactly {', '.join(sorted(hints))}")
        values = {name: self.value(hint, tree[name], prefix, name) for name, hint in hints.items()}
        try:
            return kind(**values)
        except DocumentError as error:
            raise DocumentError(self.where, f"{prefix + error.field:.200}", error.problem) from None

    def value(self, hint: Any, value: Any, prefix: str, name: str) -> Any:
        """Return the value of one field with the annotation ``hint``."""
        if get_origin(hint) is UnionType:  # the only union in a document is X | None
            if value is None:
                return None
            (hint,) = (h for h in get_args(hint) if h is not NoneType)
        if hint is np.ndarray:
            return self.array(value, prefix + name)
        if get_origin(hint) is Mapping:
            if not isinstance(value, dict):
                self.refuse(prefix + name, value, "an object")
            key, item = get_args(hint)
            keys = {k: self.whole(prefix + name, k) if key is int else k for k in value}
            return {keys[k]: self.record(item, v, f"{prefix}{k}/") if _is_record(item) else v for k, v in value.items()}
        return self.record(hint, value, f"{prefix}{name}/") if _is_record(hint) else value

    def whole(self, name: str, key: str) -> int:
        """Return the whole number that a key of an object is, in its only spelling."""
        if not (key.isascii() and key.isdecimal() and len(key) <= files.MAX_DIGITS and str(int(key)) == key):
            refuse(self.where, name, f"found the key {key!r:.80}", "a whole number, without leading zeros")
        return int(key)

    def array(self, value: Any, name: str) -> np.ndarray:
        """Return the array of a field, and remove it from ``arrays``."""
        if value != TENSOR:
            self.refuse(name, value, f"{TENSOR!r}, which stands for the tensor {name!r}")
        if name not in self.arrays:
            refuse(self.where, name, "the tensor is missing", "every tensor that the JSON mentions")
        return self.arrays.pop(name)

    def refuse(self, field: str, found: object, allowed: str) -> NoReturn:
        """Raise DocumentError for a field of the file."""
        refuse(self.where, field, f"found {found!r:.80}", allowed)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
    return bool(a == b)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the resolved annotation of each field."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def version_of(package: str) -> str:
    """Return the installed version of a package, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
