"""Tensors from which each kernel's ``example.py`` makes the arguments of its contract tests and of its benchmark.

An ``example.py`` defines:

* ``CLOSE``: (relative, absolute), how near the compiled form and the kernel come to the plain form.
* ``arguments(tensors)``: the arguments of the contract tests.
* ``RETURNED``: a name for each result. The benchmark has separate bounds for "codes", "scales", "sums" and "y"; every
  other result is compared as an output.
* ``TIMED``: the variants that the benchmark, ``benchmarks/kernels/operations.py``, times.
* ``COMPILED``: the calls that ``benchmarks/kernels/ahead_of_time.py`` compiles, and the registers that each may need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcache.kernels.formats import FORMATS
from diffcache.kernels.quantize import quantize

ROWS, LENGTH = 4, 261  # two groups of unequal length

SAMPLES = 2  # in a batch that is timed or compiled: gates and sums are of each
COMPILED_ROWS = 4096

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # as few as the operation takes, and all others by name


@dataclass(frozen=True, slots=True)
class Tensors:
    """Random tensors of ROWS rows of LENGTH columns, and a kept one.

    Attributes:
        format: A name of FORMATS.
        x: bfloat16 [ROWS, LENGTH].
        f: float32 [ROWS, LENGTH].
        gate: float32 [2, LENGTH], a factor for each half of the rows.
        pair: float32 [2, LENGTH], an offset and a positive factor of every column.
        codes: The codes of ``f`` in ``format``.
        scales: The scales of ``f`` in ``format``.
    """

    format: str
    x: Tensor
    f: Tensor
    gate: Tensor
    pair: Tensor
    codes: Tensor
    scales: Tensor

    @classmethod
    def drawn(cls, format: str, device: str = "cpu") -> Tensors:
        """Draw the tensors from torch's global generators."""
        x = torch.randn(ROWS, LENGTH, dtype=torch.bfloat16, device=device)
        f, gate = torch.randn(ROWS, LENGTH, device=device), torch.randn(2, LENGTH, device=device)
        pair = torch.stack([torch.randn(LENGTH), torch.rand(LENGTH) + 0.5]).to(device)
        codes, scales, _ = quantize(f, format, backend="torch")
        return cls(format, x, f, gate, pair, codes, scales)


class TimedTensors:
    """Random tensors of one size. Each is made when it is first asked for, and kept.

    Args:
        shape: Rows and length.
        device: Where the tensors are.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._made: dict[str, Tensor] = {}
        self._packed: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def normal(self, name: str, rows: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the tensor [rows, length] of this name. Columns differ in spread, as channels do.

        Its values depend on the name, not on what was made before.
        """
        if name not in self._made:
            generator = torch.Generator(self.device).manual_seed(sum(map(ord, name)))
            count, length = rows or self.shape[0], self.shape[1]
            spread = torch.linspace(0.5, 2.0, length, device=self.device)
            values = torch.randn((count, length), generator=generator, device=self.device) * spread
            self._made[name] = values.to(dtype)
        return self._made[name]

    def kept(self, index: int) -> Tensor:
        """Return an earlier value of the tensor "x", uncompressed."""
        name = f"kept {index}"
        if name not in self._made:
            self._made[name] = (self.normal("x") + 0.3 * self.normal(f"change {index}")).to(torch.bfloat16)
            del self._made[f"change {index}"]
        return self._made[name]

    def packed(self, format: str, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return codes and scales of an earlier value, by the plain form."""
        if (format, index) not in self._packed:
            self._packed = {key: found for key, found in self._packed.items() if key[0] == format}  # of one format
            codes, scales, _ = quantize.plain(self.kept(index), format)
            self._packed[format, index] = codes, scales
        return self._packed[format, index]

    def by_sample(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return ``x`` as [samples, rows of a sample, length], and the vector ``name`` of each sample."""
        return x.view(SAMPLES, -1, self.shape[1]), self.normal(name, SAMPLES).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to call an operation, for the benchmark.

    Attributes:
        name: The arguments that make it different, in a few words.
        streams: The number of bfloat16 tensors [rows, length] that it reads or writes.
        kept: The number of tensors in the format that it reads or writes.
        arguments: (tensors, format) -> positional and keyword arguments.
        uncompressed: What a cache that keeps bfloat16 does instead, in eager torch.
        quick: Whether ``--quick`` times it. One variant of each operation is enough.
    """

    name: str
    streams: int
    kept: int
    arguments: Callable[[TimedTensors, str], Arguments]
    uncompressed: Callable[[TimedTensors], Any]
    quick: bool = False

    def moved(self, shape: tuple[int, int], format: str) -> int:
        """Return the bytes that cannot be avoided."""
        return self.streams * 2 * math.prod(shape) + self.kept * FORMATS[format].nbytes(shape)

    @property
    def formula(self) -> str:
        """The bytes of a value, with k for those of a kept value."""
        return f"{2 * self.streams} + {'' if self.kept == 1 else self.kept} k".replace("  ", " ")


@dataclass(frozen=True, slots=True)
class EmptyTensors:
    """Tensors of a model's size, without values, for a call that is compiled and never runs.

    Attributes:
        format: A name of FORMATS.
        length: The number of columns.
    """

    format: str
    length: int

    def rows(self) -> Tensor:
        """Return a bfloat16 tensor [COMPILED_ROWS, length]."""
        return torch.empty(COMPILED_ROWS, self.length, dtype=torch.bfloat16)

    def vectors(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return a tensor [*shape, length]."""
        return torch.empty(*shape, self.length, dtype=dtype)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return codes and scales of COMPILED_ROWS rows."""
        how = FORMATS[self.format]
        codes = torch.empty(COMPILED_ROWS, how.codes(self.length), dtype=how.dtype)
        return codes, torch.empty(COMPILED_ROWS, how.groups(self.length))


@dataclass(frozen=True, slots=True)
class Compiled:
    """One way to call an operation, for the figures of what its kernel compiles to.

    Attributes:
        options: The arguments that make it different, in a few words.
        arguments: (tensors) -> positional and keyword arguments.
        length: The number of columns.
        formats: The formats of the kept tensors.
        registers: The registers that a thread on an NVIDIA GPU may need. With 102, five programs fit on a
            multiprocessor. With 168, three programs fit.
        amd_registers: The same for AMD GPUs, of 512. With 168, three waves fit. With 256, two waves fit.
    """

    options: str
    arguments: Callable[[EmptyTensors], Arguments]
    length: int = 1152
    formats: tuple[str, ...] = tuple(FORMATS)
    registers: int = 102
    amd_registers: int = 168
