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


@contextmanager
def masked_lanes_full_of_garbage() -> Iterator[None]:
    """Set all bits in the masked lanes of every load, regardless of ``other``: NaN as a float, 15 as four bits.

    A result that depends on masked lanes changes. Results must not rely on ``other``, because what compilers make of it
    differs between devices and versions (``tiles.load_codes``).
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def poisoned(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        found = load(self, ptrs, mask, *args)
        masked = ~np.broadcast_to(mask.data, found.data.shape).astype(bool)
        found.data = found.data.copy()
        found.data.view(f"u{found.data.itemsize}")[masked] = np.iinfo(f"u{found.data.itemsize}").max
        return found

    with mock.patch.object(InterpreterBuilder, "create_masked_load", poisoned):
        yield


@contextmanager
def recorded_writes() -> Iterator[list[int]]:
    """Yield a list of the addresses of the bytes that kernels write in this context, one entry for each write."""
    from triton.runtime.interpreter import InterpreterBuilder

    store = InterpreterBuilder.create_masked_store
    found: list[int] = []

    def recorded(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses, active = np.broadcast_arrays(ptrs.data, mask.data.astype(bool))
        found.extend((addresses[active].astype(np.int64)[:, None] + np.arange(size)).ravel().tolist())
        return store(self, ptrs, value, mask, *args)

    with mock.patch.object(InterpreterBuilder, "create_masked_store", recorded):
        yield found
