"""Arguments of ``predict`` for the contract tests and the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffcache.kernels.examples import SAMPLES, Arguments, Compiled, EmptyTensors, Tensors, TimedTensors, Variant

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute
RETURNED = ("out",)


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (
        ([t.codes, t.codes.clone()], [t.scales, t.scales.clone()], [1.5, -0.5], t.format, t.x.shape[1], torch.float32),
        {
            "prescale": torch.stack([t.pair, t.pair]),
            "x": t.x,
            "kappa": 0.3,
            "scale": t.gate[:1],
            "bias": t.f[:2, :1],
        },
    )


def _weights(count: int) -> list[float]:
    """Return the weights of the polynomial through ``count`` equally spaced anchors, one step on."""
    return [float((-1) ** k * math.comb(count, k + 1)) for k in range(count)]


def _predicted(count: int) -> Callable[[TimedTensors, str], Arguments]:
    def arguments(t: TimedTensors, format: str) -> Arguments:
        codes, scales = zip(*(t.packed(format, k) for k in range(count)), strict=True)
        return (list(codes), list(scales), _weights(count), format, t.shape[1], torch.bfloat16), {}

    return arguments


def _weighted(count: int) -> Callable[[TimedTensors], Tensor]:
    def work(t: TimedTensors) -> Tensor:
        first, *rest = _weights(count)
        out = t.kept(0) * first
        for k, weight in enumerate(rest, 1):
            out = torch.add(out, t.kept(k), alpha=weight)
        return out

    return work


TIMED = tuple(Variant(f"K={k}", 1, k, _predicted(k), _weighted(k), quick=k == 2) for k in (1, 2, 3, 6))


def _compiled(count: int) -> Callable[[EmptyTensors], Arguments]:
    def arguments(t: EmptyTensors) -> Arguments:
        codes, scales = t.kept()
        anchors = ([codes] * count, [scales] * count, [0.5] * count)
        return (*anchors, t.format, t.length, torch.bfloat16), {
            "x": t.rows(),
            "prescale": t.vectors(count, SAMPLES),
            "kappa": 0.5,
            "scale": t.vectors(1, dtype=torch.float32),
            "bias": t.vectors(1, dtype=torch.float32),
        }

    return arguments


_OPTIONS = "anchors, prescale, x, scale, bias"
COMPILED = (
    Compiled(f"3 {_OPTIONS}", _compiled(3)),
    Compiled(f"8 {_OPTIONS}", _compiled(8), formats=("int8",), registers=168, amd_registers=256),
)
