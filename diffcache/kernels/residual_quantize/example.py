"""Arguments of ``residual_quantize`` for the contract tests and the benchmarks."""

from __future__ import annotations

from typing import Any

from diffcache.kernels.examples import SAMPLES, Arguments, Compiled, EmptyTensors, Tensors, TimedTensors, Variant

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute
RETURNED = ("out", "codes", "scales")


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.x, t.f, t.format), {"gate": t.gate, "prescale": t.pair}


def _gated(t: TimedTensors, format: str) -> Arguments:
    return (t.normal("x"), t.normal("y"), format, t.normal("gate", SAMPLES)), {}


def _add_and_keep(t: TimedTensors) -> Any:
    f, gate = t.by_sample(t.normal("y"), "gate")
    return t.normal("x").view_as(f) + gate * f, f.clone()


TIMED = (Variant("gate", 3, 1, _gated, _add_and_keep, quick=True),)


def _gate_and_prescale(t: EmptyTensors) -> Arguments:
    return (t.rows(), t.rows(), t.format), {"gate": t.vectors(SAMPLES), "prescale": t.vectors(SAMPLES)}


COMPILED = (Compiled("gate, prescale", _gate_and_prescale, registers=84),)
