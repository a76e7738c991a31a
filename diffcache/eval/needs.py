"""What measuring needs from outside: packages of the extra, weights that do not come with any package."""

from __future__ import annotations

import importlib
from typing import Any

from diffcache.errors import DiffCacheError


class MissingPackageError(DiffCacheError, ImportError):
    """An optional package is not installed."""

    def __init__(self, purpose: str, module: str, install: str) -> None:
        super().__init__(f"{purpose} needs the package {module!r}, which is not installed: pip install {install}")
        self.module = module


class WeightsError(DiffCacheError):
    """Weights of a network that measures are not there, or are not what they were asked for as."""


def package(module: str, *, purpose: str, install: str) -> Any:
    """The module. Raises MissingPackageError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingPackageError(purpose, module.partition(".")[0], install) from None
