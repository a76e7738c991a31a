"""Arguments of ``dequantize`` for the contract tests and the benchmarks."""

from __future__ import annotations

import torch

from diffcache.kernels.examples import Arguments, Compiled, EmptyTensors, Tensors, TimedTensors, Variant

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute
RETURNED = ("out",)


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.codes, t.scales, t.format, t.x.shape[1], torch.bfloat16), {"affine": t.pair, "add": t.x}


def _load(t: TimedTensors, format: str) -> Arguments:
    return (*t.packed(format), format, t.shape[1], torch.bfloat16), {}


def _affine_and_add(t: TimedTensors, format: str) -> Arguments:
    affine = t.normal("affine", 2, torch.float32)
    return _load(t, format)[0], {"affine": affine, "add": t.normal("y")}


TIMED = (
    Variant("load", 1, 1, _load, lambda t: t.kept(0).clone()),
    Variant("affine, add", 2, 1, _affine_and_add, lambda t: t.normal("y") + t.kept(0), quick=True),
)


def _compiled(t: EmptyTensors) -> Arguments:
    affine = t.vectors(2, dtype=torch.float32)
    return (*t.kept(), t.format, t.length, torch.bfloat16), {"affine": affine, "add": t.rows()}


COMPILED = (Compiled("affine, add", _compiled, registers=56),)
