"""Triton's interpreter, made to round as GPUs do.

It cuts floats off where hardware rounds to nearest even: half of all casts to bfloat16 are one unit off, and a carry is
lost in casts to e4m3 (triton-lang/triton#8322). ``conftest.py`` sets ``TRITON_INTERPRET=1`` where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def rounding() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float
    rounded = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    }

    def convert(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source != tl.float32 or target not in rounded:
            return cut_off(x, source, target, mode)
        dtype, bits = rounded[target]
        found = torch.from_numpy(np.ascontiguousarray(x).view(np.float32).copy()).to(dtype)
        return found.view(bits).numpy().reshape(x.shape)

    quiet = np.errstate(invalid="ignore", over="ignore")  # GPUs have no warnings
    with mock.patch.object(interpreter, "_convert_float", convert), quiet:
        yield
