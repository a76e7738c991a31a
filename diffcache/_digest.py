"""Equal values, equal digests, in every process and on every machine: how work that was done is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Unknown = Callable[[object], object]  # a value of another type -> one to take for it; or it raises


def digest_of(value: object, unknown: Unknown = repr) -> str:
    """SHA-256 of tensors, arrays, pictures, generators (by their state), plain values, and lists and dictionaries of
    them. ``unknown`` says what to take for anything else: by default its ``repr``, which may never be the same again.
    """
    digest = hashlib.sha256()
    feed(digest, value, unknown)
    return digest.hexdigest()


def feed(digest: Any, value: object, unknown: Unknown = repr) -> None:
    if isinstance(value, Tensor):
        feed(digest, (str(value.dtype), tuple(value.shape)))
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        feed(digest, (str(value.dtype), value.shape))
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, torch.Generator):
        feed(digest, (value.device.type, value.get_state()))
    elif isinstance(value, Mapping):
        feed(digest, sorted(((str(key), item) for key, item in value.items()), key=lambda pair: pair[0]), unknown)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            feed(digest, item, unknown)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path, torch.dtype, torch.device)):
        digest.update(f"{type(value).__name__}={value!r};".encode())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture of PIL's
        feed(digest, (value.mode, value.size, value.tobytes()))  # type: ignore[attr-defined]
    elif callable(value) and hasattr(value, "__qualname__"):
        digest.update(f"{value.__module__}.{value.__qualname__};".encode())
    else:
        feed(digest, unknown(value), unknown)
