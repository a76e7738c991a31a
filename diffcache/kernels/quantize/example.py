"""Arguments of ``quantize`` for the contract tests and the benchmark."""

from __future__ import annotations

from typing import Any

from diffcache.kernels.examples import SAMPLES, Arguments, Tensors, TimedTensors, Variant

CLOSE = 1e-6, 1e-6  # how near the compiled form and the kernel come to the plain form: relative, absolute
RETURNED = ("codes", "scales", "sums")


def arguments(t: Tensors) -> Arguments:
    """Return the required arguments, and all others by name."""
    return (t.x, t.format), {
        "minus": t.f,
        "prescale": t.pair,
        "previous_codes": t.codes,
        "previous_scales": t.scales,
        "samples": 2,
    }


def _difference_and_sums(t: TimedTensors, format: str) -> Arguments:
    codes, scales = t.packed(format)
    previous = {"previous_codes": codes, "previous_scales": scales, "samples": SAMPLES}
    return (t.normal("x"), format, t.normal("y")), previous


def _uncompressed_sums(t: TimedTensors) -> Any:
    """A bfloat16 cache that looks at drift the usual way: the relative change by means of magnitudes."""
    d = t.normal("x") - t.normal("y")
    return d, (d - t.kept(0)).abs().mean() / t.kept(0).abs().mean()


TIMED = (
    Variant("x", 1, 1, lambda t, format: ((t.normal("x"), format), {}), lambda t: t.normal("x").clone(), quick=True),
    Variant(
        "difference",
        2,
        1,
        lambda t, format: ((t.normal("x"), format, t.normal("y")), {}),
        lambda t: t.normal("x") - t.normal("y"),
    ),
    Variant("difference, drift sums", 2, 2, _difference_and_sums, _uncompressed_sums),
)
