"""List and load the modules of a folder by their file names, which are the names that users type, and read options."""

from __future__ import annotations

import importlib
import operator
import pkgutil
import re
from types import ModuleType
from typing import Any

from diffcache.errors import BadOption, UnknownName

ARGUMENTS = ("store", "backend", "mismatch")  # arguments of ``accelerate`` that users may take for options of a rule


def names(package: str) -> tuple[str, ...]:
    """Return the names of the modules of a folder, sorted. Names that begin with an underscore are private to it."""
    folder = importlib.import_module(package)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")))


def modules(package: str) -> dict[str, ModuleType]:
    """Return the modules of a folder by name, sorted."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}


def load(package: str, name: str, *, kind: str = "") -> ModuleType:
    """Return the module called ``name`` of a folder, or the object at ``"package.module:attribute"``.

    The object (a module, a class or a namespace) of another package takes the place of a module. The attribute may be a
    file of the package: it is imported. This imports the code of that package: check a name that comes out of a file
    against ``names`` first.

    Args:
        package: The folder.
        name: A name of ``names(package)``, or an address.
        kind: The word for such a module in errors. The default is the name of the folder without its s.

    Raises:
        UnknownName: If there is no such module, or nothing at the address.
    """
    if ":" in name:
        return _foreign(package, name, kind)
    if name not in names(package):
        raise _unknown(package, name, kind, "Your own is reached as 'package.module:attribute'.")
    return importlib.import_module(f"{package}.{name}")


def _foreign(package: str, address: str, kind: str) -> ModuleType:
    module, _, attribute = address.partition(":")
    if not all(map(str.isidentifier, (*module.split("."), *attribute.split(".")))):
        raise _unknown(package, address, kind, "It is not of the form 'package.module:attribute'.")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module was found, but a module that it imports was not
        raise _unknown(package, address, kind, f"There is no module {module!r}.") from error
    file = f"{module}.{attribute.partition('.')[0]}"
    try:
        if hasattr(home, "__path__") and not hasattr(home, attribute.partition(".")[0]):
            importlib.import_module(file)
        found: ModuleType = operator.attrgetter(attribute)(home)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != file:
            raise  # the file was found, but a module that it imports was not
        raise _unknown(package, address, kind, f"Module {module!r} has no {attribute!r}.") from error
    return found


def _unknown(package: str, name: str, kind: str, next_step: str) -> UnknownName:
    title = kind or package.rpartition(".")[2].removesuffix("s")
    return UnknownName(title, name, names(package), next_step=next_step)


def options(spec: str, rest: str) -> dict[str, Any]:
    """Return the options of ``"key=value,key=value"``. Values that look like numbers are numbers."""
    found: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise BadOption(key, value, f"key=value, in the spec {spec!r}")
        if key in found:
            raise BadOption(key, value, f"one value, in the spec {spec!r}")
        found[key] = _value(value)
    return found


def naming(package: str, method: str) -> tuple[str, ...]:
    """Return the names of the modules of a folder that have the name of a method in ``SOURCE``.

    Case, spaces and signs do not count: ``"fastdllm"`` is in "Wu et al. 2025, Fast-dLLM". Each word is compared whole,
    and also with the words after it.

    Args:
        package: The folder.
        method: The name of a method, as a user writes it.
    """
    wanted = re.sub(r"[^a-z0-9]", "", method.lower())
    found = []
    for name, module in modules(package).items():
        words = [re.sub(r"[^a-z0-9]", "", word) for word in getattr(module, "SOURCE", "").lower().split()]
        ways = ["".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 4, len(words)) + 1)]
        if wanted and wanted in ways:
            found.append(name)
    return tuple(found)


def argument_advice(spec: str, key: str) -> str:
    """Return a next step if ``key``, an unknown option of ``spec``, is an argument of ``accelerate``, else ""."""
    if key not in ARGUMENTS:
        return ""
    name, _, rest = spec.partition(":")
    value = options(spec, rest)[key]
    others = [item for item in rest.split(",") if item.partition("=")[0].strip() != key]
    kept = f"{name}:{','.join(others)}" if others else name
    return f'{key} is an argument of accelerate: accelerate(pipe, "{kept}", {key}="{value}").'


def _value(text: str) -> float | int | str:
    """Return a text as an int or a float if it reads as one, else as it is."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
