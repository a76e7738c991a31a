"""Check the fields of a document. Checks return the value in its canonical, read-only form, or raise DocumentError."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from diffcache.documents import sites
from diffcache.errors import BadOption, DocumentError

V = TypeVar("V")

_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME = 256
_EXACT = 2**53  # float64 holds every whole number up to it
# Predictions are sums in float32, which has 24 bits. With a larger coefficient, the rounding error of an anchor is
# as large as the anchor. Finite differences of order 4 stay below 10.
MOST = 2.0**24


def refuse(where: str, field: str, found: str, allowed: str, next_step: str = "") -> NoReturn:
    """Raise DocumentError.

    Args:
        where: The file or the class.
        field: The field.
        found: The value that the field has.
        allowed: The values that it may have.
        next_step: Advice for the user.
    """
    raise DocumentError(where, f"{field:.200}", f"{found}. Allowed: {allowed}. {next_step}".rstrip())


def count(where: str, field: str, value: object, least: int) -> int:
    """Return ``value`` as an int, if it is a whole number from ``least`` to 2**63 - 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) < 2**63:
        refuse(where, field, f"found {value!r:.80}", f"a whole number, at least {least} and below 2**63")
    return int(value)


def real(where: str, field: str, value: object, least: float = -math.inf) -> float:
    """Return ``value`` as a float, if it is a finite number, ``least`` or more."""
    bound = "" if least == -math.inf else f", at least {least:g}"
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        refuse(where, field, f"found {value!r:.80}", f"a finite number{bound}")
    return float(value) + 0.0  # -0.0 becomes 0.0, so that equal values have equal bytes


def text(where: str, field: str, value: object) -> str:
    """Return ``value``, if it is non-empty Unicode text."""
    if not isinstance(value, str) or not value or not is_unicode(value):
        refuse(where, field, f"found {value!r:.80}", "Unicode text, not empty")
    return value


def plugin(where: str, field: str, value: object) -> str:
    """Return the name of a plug-in, if it is an identifier or ``"package.module:attribute"``."""
    text(where, field, value)
    module, colon, attribute = str(value).partition(":")
    parts = [module] if not colon else [*module.split("."), *attribute.split(".")]
    if len(str(value)) > _LONGEST_NAME or not all(part.isidentifier() and part.isascii() for part in parts):
        allowed = f"a name of letters, digits and '_', or 'package.module:attribute'; up to {_LONGEST_NAME} characters"
        refuse(where, field, f"found {value!r:.80}", allowed)
    return str(value)


def sha256(where: str, field: str, value: object) -> str:
    """Return ``value``, if it is a sha256 digest in hexadecimal digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        refuse(where, field, f"found {value!r:.80}", "a sha256 digest: 64 of the characters 0-9a-f")
    return value


def component(where: str, field: str, name: str) -> None:
    """Check the name of a denoiser: an attribute of the pipeline, or a dotted path of attributes."""
    if len(name) > _LONGEST_NAME or not _PATH.fullmatch(name):
        allowed = f"up to {_LONGEST_NAME} letters, digits, '_' and '-', in parts joined by '.'"
        refuse(where, field, f"found the name {name!r:.80}", allowed)


def site(where: str, field: str, name: str) -> None:
    """Check the name of a site."""
    try:
        path = sites.parse(name).path
    except BadOption as error:
        refuse(where, field, f"found the site name {name!r:.80}", error.allowed)
    if path:
        component(where, field, path)


def instance(where: str, field: str, value: object, kind: type[V] | tuple[type[V], ...]) -> V:
    """Return ``value``, if it is an instance of ``kind``."""
    if not isinstance(value, kind):
        names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
        refuse(where, field, f"found {type(value).__name__}", " or ".join(names))
    return value


def mapping(where: str, field: str, value: object, kind: type[V] | tuple[type[V], ...]) -> Mapping[str, V]:
    """Return a read-only copy sorted by key, if keys are non-empty text and values are instances of ``kind``."""
    if not isinstance(value, Mapping):
        refuse(where, field, f"found {type(value).__name__}", "a mapping")
    for key, item in value.items():
        text(where, field, key)
        instance(where, f"{field}/{key}", item, kind)
    return MappingProxyType({key: value[key] for key in sorted(value)})


def notes(where: str, field: str, value: object) -> Mapping[str, str]:
    """Return a ``mapping`` to text. Its values may be empty."""
    entries = mapping(where, field, value, str)
    for key, item in entries.items():
        if not is_unicode(item):
            refuse(where, f"{field}/{key}", f"found {item!r:.80}", "Unicode text")
    return entries


def options(where: str, field: str, value: object) -> Mapping[str, float | int | str]:
    """Return a ``mapping`` from identifiers to numbers or text.

    Whole numbers are ints, so that equal values have equal bytes.
    """
    found: dict[str, float | int | str] = {}
    for key, item in mapping(where, field, value, object).items():
        if not (key.isidentifier() and key.isascii()) or len(key) > _LONGEST_NAME:
            allowed = f"letters, digits and '_', not beginning with a digit; up to {_LONGEST_NAME} characters"
            refuse(where, field, f"found the name {key!r:.80}", allowed)
        name = f"{field}/{key}"
        if isinstance(item, str):
            found[key] = text(where, name, item)
        elif isinstance(item, Real) and not isinstance(item, bool):
            if isinstance(item, Integral) and abs(int(item)) > _EXACT:
                refuse(where, name, f"found {item!r:.80}", "a whole number from -2**53 to 2**53")
            number = real(where, name, item)
            found[key] = int(number) if number.is_integer() and abs(number) <= _EXACT else number
        else:
            refuse(where, name, f"found {item!r:.80}", "a number or text")
    return MappingProxyType(found)


def named(
    where: str, field: str, value: object, kind: type[V], check_name: Callable[[str, str, str], None]
) -> Mapping[str, V]:
    """Return a ``mapping`` with at least one entry and keys that ``check_name`` accepts."""
    entries = mapping(where, field, value, kind)
    if not entries:
        refuse(where, field, "found none", "at least one")
    for name in entries:
        check_name(where, field, name)
    return entries


def array(where: str, field: str, value: object, dtype: DTypeLike, **axes: int | None) -> np.ndarray:
    """Return a read-only copy of a finite array in C order.

    Args:
        where: The file or the class, for errors.
        field: The field, for errors.
        value: The array.
        dtype: The required dtype.
        **axes: Name of each axis -> its length. None: any length from 1.
    """
    kind = np.dtype(dtype)
    if not isinstance(value, np.ndarray) or value.dtype != kind:
        found = f"a {value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        refuse(where, field, f"found {found}", f"a numpy array of {kind}")
    lengths = zip(value.shape, axes.values(), strict=False)
    if value.ndim != len(axes) or not all(n >= 1 if want is None else n == want for n, want in lengths):
        wanted = ", ".join(f"{name} {'any' if want is None else want}" for name, want in axes.items())
        refuse(where, field, f"found shape {list(value.shape)}", f"[{wanted}]")
    copy = np.array(value, order="C")
    if kind.kind == "f":
        copy += 0.0  # as in real()
        if index := first(~np.isfinite(copy)):
            refuse(where, field, f"{index_text(axes, index)} is {copy[index]}", "finite numbers")
    copy.setflags(write=False)
    return copy


def coefficients(where: str, field: str, value: object, **axes: int | None) -> np.ndarray:
    """Return an ``array`` of float64 whose absolute values are at most MOST, as for coefficients of a prediction."""
    values = array(where, field, value, np.float64, **axes)
    if index := first(np.abs(values) > MOST):
        found = f"{index_text(axes, index)} is {values[index]:g}"
        refuse(where, field, found, f"-{MOST:g} to {MOST:g} (2**24): beyond, float32 has no precision")
    return values


def first(wrong: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first True; () if there is none."""
    return tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape)) if wrong.any() else ()


def index_text(axes: Iterable[str], index: Iterable[int]) -> str:
    """Return an index as text: ``("branch", "step"), (0, 7)`` gives ``branch 0, step 7``."""
    return ", ".join(f"{name} {i}" for name, i in zip(axes, index, strict=True))


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which are not characters and cannot be printed."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def put(record: object, **values: Any) -> None:
    """Set fields of a frozen dataclass in its ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
