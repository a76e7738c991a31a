"""Arguments of ``residual_modulate`` for the contract tests and the benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from diffcache.kernels.examples import SAMPLES, Arguments, Compiled, EmptyTensors, Tensors, TimedTensors, Variant

CLOSE = 2**-7, 1e-3  # how near the compiled form and the kernel come to the plain form: relative, absolute
# Sums are in another order, then rounded to bfloat16.
RETURNED = ("out", "y")


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (
        (t.x, t.codes, t.scales, t.format),
        {"gate": t.gate, "shift": t.gate, "scale": t.gate, "affine": t.pair, "eps": 1e-5},
    )


def _modulated(t: TimedTensors, format: str) -> Arguments:
    modulation = (t.normal(name, SAMPLES) for name in ("gate", "shift", "scale"))
    return (t.normal("x"), *t.packed(format), format, *modulation), {}


def _add_and_normalise(t: TimedTensors) -> Any:
    f, gate = t.by_sample(t.kept(0), "gate")
    out = t.normal("x").view_as(f) + gate * f
    _, shift = t.by_sample(out, "shift")
    _, scale = t.by_sample(out, "scale")
    return out, F.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift


TIMED = (Variant("gate, shift, scale", 3, 1, _modulated, _add_and_normalise, quick=True),)


def _all(t: EmptyTensors) -> Arguments:
    gate = t.vectors(SAMPLES)
    options = {"gate": gate, "shift": gate, "scale": gate, "affine": t.vectors(2, dtype=torch.float32)}
    return (t.rows(), *t.kept(), t.format), options


COMPILED = (
    Compiled("all", _all, registers=64),
    Compiled("all", _all, 3072, ("int8",), registers=64),
    Compiled("all", _all, 5120, ("int8",), registers=64),
)
