"""Find the optional packages, the weights and the device that an evaluation needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffcache.errors import BadOption, DiffCacheError

if TYPE_CHECKING:
    import torch


class MissingPackageError(DiffCacheError, ImportError):
    """An optional package is not installed."""

    def __init__(self, purpose: str, module: str, install: str) -> None:
        super().__init__(f"{purpose} needs the package {module!r}, which is not installed: pip install {install}")
        self.module = module


class WeightsError(DiffCacheError):
    """The weights of a network are missing, or belong to another network."""


def package(module: str, *, purpose: str, install: str) -> Any:
    """Return the module called ``module``.

    Args:
        module: Name of the module.
        purpose: The feature that needs the module, for errors.
        install: Arguments of ``pip install``, for errors.

    Raises:
        MissingPackageError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingPackageError(purpose, module.partition(".")[0], install) from None


def device_named(name: Any) -> torch.device:
    """Return the device called ``name``.

    Raises:
        BadOption: If torch has no such device, this machine has none, or it holds no numbers (``meta``).
    """
    import torch

    try:
        device: torch.device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadOption("device", name, f"{', '.join(there)} on this machine ({reason:.120})") from None
    if device.type == "meta":
        raise BadOption("device", name, "a device that holds numbers, such as cpu")
    return device
