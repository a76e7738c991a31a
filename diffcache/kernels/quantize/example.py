"""Arguments of ``quantize`` for the contract tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffcache.kernels.examples import SAMPLES, Arguments, Compiled, EmptyTensors, Tensors, TimedTensors, Variant

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


def _compiled(*, prescale_and_sums: bool = False, minus: bool = False) -> Callable[[EmptyTensors], Arguments]:
    def arguments(t: EmptyTensors) -> Arguments:
        options: dict[str, Any] = {"samples": SAMPLES}
        if minus:
            options["minus"] = t.rows()
        if prescale_and_sums:
            options["prescale"] = t.vectors(SAMPLES)
            options["previous_codes"], options["previous_scales"] = t.kept()
        return (t.rows(), t.format), options

    return arguments


_ALL = "minus, prescale, sums", _compiled(minus=True, prescale_and_sums=True)
COMPILED = (
    Compiled("", _compiled()),
    Compiled(*_ALL),
    # In rows that groups do not fill, every column has a mask, and every few values have an address.
    Compiled("minus", _compiled(minus=True), 130, ("int8",), registers=168),
    Compiled(*_ALL, 261, registers=168),
)
