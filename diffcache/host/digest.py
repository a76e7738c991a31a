"""Compute digests of values, equal in every process for values that give equal results. They identify earlier work.

A digest covers the behaviour of a value as well as its name: the elements of a tensor; the code of a function, its
defaults, the variables that it captures and the globals that it reads; the attributes of an object, and the code of its
class. The code of an installed package is represented by the version of that package. A value that cannot be read in
this way has no digest, and :class:`NoDigestError` states where it was found.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import os
import site
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.errors import DiffCacheError
from diffcache.host.tensor_hash import tensor_hash

Parts = Callable[[Any], "Mapping[str, Any] | None"]

PLAIN = (bool, int, float, complex, str, bytes, np.generic, Path, range, torch.dtype, torch.device, type(...))
DESCRIPTORS = (staticmethod, classmethod, property, functools.cached_property)
TO_DIGEST = "a text attribute `digest` that changes whenever the object's behaviour changes"


class NoDigestError(DiffCacheError, TypeError):
    """A value has no digest.

    Attributes:
        where: The path from the value to the part that has no digest. It is empty for the value itself.
        what: A description of that part.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{what}{' at ' if where else ''}{where} cannot be recognised in a later run")
        self.where, self.what = where, what


def digest_of(value: object, parts: Parts = lambda value: None, *, plain: bool = False) -> str:
    """Return the SHA-256 of a value.

    An object that has a text attribute ``digest`` is represented by its class and that text.

    Args:
        value: Tensors, arrays, pictures, generators (by their state), functions, classes and other objects, and
            containers of them.
        parts: Maps an object to the attributes that its results depend on, or to None for all of its state.
        plain: Accept only values that are usual as arguments of a call. Closures, lambdas, partial functions, bound
            methods, and objects of classes in the user's code then have no digest unless they declare one.

    Returns:
        The digest in hexadecimal.

    Raises:
        NoDigestError: A part of the value cannot be read.
    """
    walk = _Walk(parts, plain)
    try:
        walk.feed(value, "")
    except RecursionError:
        raise NoDigestError("", f"a {type(value).__name__} that is nested too deeply") from None
    return walk.hash.hexdigest()


class _Walk:
    """One pass over a value. An object that is referenced again is represented by the path at which it was first found.

    Args:
        parts: See ``digest_of``.
        plain: See ``digest_of``.
    """

    def __init__(self, parts: Parts, plain: bool) -> None:
        self.hash = hashlib.sha256()
        self._parts, self._plain = parts, plain
        self._met: dict[int, tuple[str, object]] = {}  # holds the objects, so that no id is given to a second one

    def feed(self, value: Any, path: str) -> None:
        """Add a value, found at this path, to the digest."""
        if isinstance(value, enum.Enum):
            self._put(f"{type(value).__qualname__}.{value.name}")
        elif value is None or isinstance(value, PLAIN):
            self._put(f"{type(value).__name__}={value!r}")
        elif isinstance(value, (list, tuple, deque)):
            self._put(f"{len(value)} items")
            for index, item in enumerate(value):
                self.feed(item, f"{path}[{index}]")
        elif isinstance(value, (set, frozenset)):
            self.feed(sorted(digest_of(item, self._parts, plain=self._plain) for item in value), path)
        elif isinstance(value, Mapping):
            self._mapping(value, path)
        elif isinstance(value, np.ndarray):
            self._array(value, path)
        elif isinstance(value, torch.Generator):
            self.feed((value.device.type, value.get_state()), path)
        elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture of PIL
            self.feed((value.mode, value.size, value.tobytes(), value.getpalette()), path)
        elif isinstance(value, ModuleType):
            self._put(f"module {value.__name__} {_version(value.__name__)}")
        elif isinstance(value, (weakref.ref, weakref.ProxyType)):
            self.feed(value() if isinstance(value, weakref.ref) else None, path)
        elif not self._again(value, path):
            self._referenced(value, path)

    def _referenced(self, value: Any, path: str) -> None:
        """Add a value of a type that several references may share."""
        declared = None if isinstance(value, type) else getattr(value, "digest", None)
        if isinstance(declared, str):
            self._put(f"{type(value).__module__}.{type(value).__qualname__} declares {declared!r}")
        elif isinstance(value, Tensor):
            self._tensor(value, path)
        elif isinstance(value, type):
            self._class(value, path)
        elif isinstance(value, FunctionType):
            self._function(value, path)
        elif isinstance(value, (MethodType, functools.partial)):
            self._bound(value, path)
        elif isinstance(value, BuiltinFunctionType) or (not hasattr(value, "__dict__") and callable(value)):
            self._builtin(value, path)
        elif isinstance(value, DESCRIPTORS):
            inner = ("__func__", "fget", "fset", "func")
            self.feed([getattr(value, name) for name in inner if hasattr(value, name)], path)
        elif hasattr(value, "cache_info") and hasattr(value, "__wrapped__"):  # a function under functools.cache
            self.feed(value.__wrapped__, path)
        else:
            self._object(value, path)

    def _put(self, text: str) -> None:
        """Add a text, preceded by its length."""
        self.hash.update(f"{len(text)}:{text};".encode(errors="surrogatepass"))

    def _again(self, value: object, path: str) -> bool:
        """Return whether the value was met before. If so, add its first path."""
        known = self._met.get(id(value))
        if known is None:
            self._met[id(value)] = path, value
            return False
        self._put(f"as at {known[0]}")
        return True

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Accept every function within the ``with`` block.

        The limits of ``plain`` apply to the value itself, not to its parts.
        """
        was, self._plain = self._plain, False
        try:
            yield
        finally:
            self._plain = was

    def _mapping(self, value: Mapping[Any, Any], path: str) -> None:
        """Add the entries of a mapping, sorted by key."""
        self._put(f"{len(value)} entries")
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            self.feed(key if isinstance(key, PLAIN) else str(key), path)
            self.feed(value[key], f"{path}.{key}" if path else str(key))

    def _array(self, value: np.ndarray, path: str) -> None:
        """Add dtype, shape and all elements of an array."""
        if value.dtype.hasobject:
            self.feed((value.shape, value.ravel().tolist()), path)
        else:
            self._put(f"array {value.dtype.str} {value.dtype.descr} {value.shape}")
            self.hash.update(np.ascontiguousarray(value).tobytes())

    def _tensor(self, value: Tensor, path: str) -> None:
        """Add dtype, shape and all elements, and the attributes of a quantised tensor.

        The device is not part of the digest.
        """
        self._put(f"tensor {value.dtype} {tuple(value.shape)}")
        self.feed({name: held for name, held in vars(value).items() if not name.startswith("_")}, path)
        if hasattr(value, "__tensor_flatten__"):  # a tensor subclass that consists of other tensors
            names, context = value.__tensor_flatten__()
            self._class(type(value), path)
            self.feed((context, {name: getattr(value, name) for name in names}), path)
            return
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            kind = "that holds no elements (device meta)" if value.is_meta else f"of layout {value.layout}"
            raise NoDigestError(path, f"a tensor {kind}")
        self.hash.update(tensor_hash(value.as_subclass(Tensor)))

    def _class(self, value: type, path: str) -> None:
        """Add the name and version of a class.

        For a class in the user's code, also add its bases, its methods and its public attributes.
        """
        package = value.__module__.partition(".")[0]
        # The module of a class of this package does not count, because it may move.
        module = package if package == "diffcache" else value.__module__
        self._put(f"class {module}.{value.__qualname__} {_version(value.__module__)}")
        if not _own_code(value.__module__):
            return
        for base in value.__bases__:
            self.feed(base, f"{path} ({base.__qualname__})")
        for name, item in sorted(vars(value).items()):
            code = isinstance(item, (FunctionType, *DESCRIPTORS))
            if code or not (name.startswith("_") or hasattr(item, "__get__")):
                self.feed(item, f"{path}.{name}")

    def _function(self, value: FunctionType, path: str) -> None:
        """Add a function. Raise NoDigestError for lambdas and nested functions if the walk is ``plain``."""
        if self._plain and ("<" in value.__qualname__ or value.__closure__):
            kind = "a lambda" if value.__name__ == "<lambda>" else "a function that is defined inside of another"
            raise NoDigestError(path, f"{kind} ({value.__qualname__})")
        self._put(f"def {value.__module__}.{value.__qualname__} {_version(value.__module__)}")
        with self._inside():
            self._function_parts(value, path)

    def _function_parts(self, value: FunctionType, path: str) -> None:
        """Add the defaults and the captured variables of a function.

        For a function in the user's code, also add the code and the globals that it reads.
        """
        self.feed((value.__defaults__, value.__kwdefaults__), path)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self.feed(held, f"{path}, captured {name!r}")
        if not _own_code(value.__module__):
            return
        self._code(value.__code__)
        names = {name for code in _nested(value.__code__) for name in code.co_names}
        for name in sorted(set(_globals_read(value.__code__)) & value.__globals__.keys()):
            held, where = value.__globals__[name], f"{path}, global {name!r}"
            self.feed(held, where)
            if isinstance(held, ModuleType) and _own_code(held.__name__):  # helpers.function, of the user's module
                for attribute in sorted(names & vars(held).keys()):
                    self.feed(vars(held)[attribute], f"{where}.{attribute}")

    def _code(self, code: CodeType) -> None:
        """Add a code object and the constants and code objects in it."""
        self._put(f"code {code.co_argcount} {code.co_kwonlyargcount} {code.co_flags} {code.co_names}")
        self.hash.update(code.co_code)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self.feed(constant, "")

    def _bound(self, value: Any, path: str) -> None:
        """Add a bound method or a ``functools.partial``. Raise NoDigestError if the walk is ``plain``."""
        if self._plain:
            kind = "a bound method" if isinstance(value, MethodType) else "a functools.partial"
            raise NoDigestError(path, f"{kind} ({getattr(value, '__qualname__', type(value).__name__)})")
        if isinstance(value, MethodType):
            self.feed((value.__func__, value.__self__), path)
        else:
            self.feed((value.func, value.args, value.keywords), path)

    def _builtin(self, value: Any, path: str) -> None:
        """Add a builtin function by name, and the object that it is bound to."""
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
        if not name:
            return self._object(value, path)
        self._put(f"builtin {getattr(value, '__module__', '')}.{name}")
        if owner is not None and not isinstance(owner, (ModuleType, type)):
            if self._plain:
                raise NoDigestError(path, f"a bound method ({name})")
            self.feed(owner, path)

    def _object(self, value: Any, path: str) -> None:
        """Add the class and the state of any other object.

        The state comes from ``parts`` or from the pickle protocol.
        """
        if self._plain and (type(value) is object or _own_code(type(value).__module__)):
            raise NoDigestError(path, f"an argument of type {type(value).__qualname__}")
        with self._inside():
            self.feed(type(value), f"{path}, class {type(value).__qualname__}")
            parts = self._parts(value)
            if parts is not None:
                self.feed(parts, path)
            else:
                self._reduced(value, path)

    def _reduced(self, value: Any, path: str) -> None:
        """Add the state that the pickle protocol returns. Raise NoDigestError if the object cannot be pickled."""
        try:
            reduced = value.__reduce_ex__(4)
        except RecursionError:
            raise
        except Exception:  # each class refuses to be pickled in its own way
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise NoDigestError(path, f"an object of type {kind}") from None
        if isinstance(reduced, str):
            self._put(f"global {reduced}")
        else:
            made, arguments, state, items, entries = (*reduced, None, None, None)[:5]
            self.feed((made, arguments, state), path)
            self.feed((list(items or ()), [list(entry) for entry in entries or ()]), path)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and all code objects nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _globals_read(code: CodeType) -> Iterator[str]:
    """Yield the names of the globals that a code object and those nested in it read."""
    for part in _nested(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield str(instruction.argval)


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return the folders of installed packages and of this package, each with a trailing separator."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [site.getusersitepackages(), str(Path(__file__).parents[1])]
    return tuple(f"{Path(path).resolve()}{os.sep}" for path in paths)


@functools.cache
def _folder(file: str) -> str:
    """Return the resolved path of a file."""
    return str(Path(file).resolve())


def _own_code(module: str | None) -> bool:
    """Return whether a module belongs to the user's code, which may change without a new version."""
    if module in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None or not _folder(file).startswith(_installed())


def _version(module: str | None) -> str:
    """Return the version of the top-level package of a module, or "" if it has none."""
    return str(getattr(sys.modules.get((module or "").partition(".")[0]), "__version__", ""))
