"""Check the arrays of metrics, and score videos frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffcache.errors import DiffCacheError

Fits = Callable[[tuple[int, ...]], bool]

ROUNDING = 1e-6  # tolerance beyond 0..1, for rounding in resizing and filters
AT_ONCE = 1 << 21  # numbers of one array that are scored together; this bounds memory to 16 MiB in float64


class SamplesError(DiffCacheError, ValueError):
    """Arrays that a metric cannot compare, or values that are not one finite number per sample."""

    def __init__(self, what: str, found: str, allowed: str, next_step: str = "") -> None:
        super().__init__(f"{what}: {found}. Allowed: {allowed}. {next_step}".rstrip())
        self.what, self.found, self.allowed = what, found, allowed


def demand_pair(
    metric: str, found: np.ndarray, reference: np.ndarray, axes: str, fits: Fits = lambda shape: True
) -> None:
    """Raise SamplesError unless ``found`` and ``reference`` are finite, non-empty float arrays of one shape.

    Args:
        metric: Name of the metric, for errors.
        found: The samples of a method.
        reference: The samples of the full run.
        axes: Description of the allowed shapes, for errors.
        fits: Returns whether a shape is allowed.
    """
    for name, array in (("found", found), ("reference", reference)):
        what = f"{metric}: {name}"
        if not isinstance(array, np.ndarray):
            raise SamplesError(
                what, type(array).__name__, "a numpy array", "A tensor becomes one by .float().cpu().numpy()."
            )
        if array.dtype.kind != "f":
            raise SamplesError(what, f"dtype {array.dtype}", "float", "8-bit pictures are divided by 255 first.")
        if array.ndim < 1 or array.size == 0 or not fits(array.shape):
            raise SamplesError(what, f"shape {list(array.shape)}", f"{axes}, nothing empty")
        if not np.isfinite(array).all():
            sample = int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            raise SamplesError(
                what, f"sample {sample} holds NaN or Inf", "finite numbers", "Look at the run that made it."
            )
    if found.shape != reference.shape:
        raise SamplesError(
            f"{metric}: found and reference",
            f"shapes {list(found.shape)} and {list(reference.shape)}",
            "one shape",
            "Sample i of one is compared with sample i of the other.",
        )


def frame_by_frame(
    metric: str,
    found: np.ndarray,
    reference: np.ndarray,
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray],
    least: int = 1,
    at_once: int | None = None,
) -> np.ndarray:
    """Return the scores of pictures, or the mean scores over the frames of videos, as float64 [N].

    Args:
        metric: Name of the metric, for errors.
        found: Pictures [N, H, W, 3] or videos [N, F, H, W, 3] of a method, in 0..1.
        reference: The pictures or videos of the full run, of the same shape.
        scores: Maps two arrays [M, H, W, 3] to scores [M].
        least: Least height and width in pixels.
        at_once: Largest number of frames in one call of ``scores``. None: as many as AT_ONCE allows.

    Raises:
        SamplesError: If the arrays are not valid pictures or videos.
    """
    axes = f"[N, H, W, 3] or [N, F, H, W, 3], sides of {least} pixels or more"
    demand_pair(metric, found, reference, axes, lambda s: len(s) in (4, 5) and s[-1] == 3 and min(s[-3:-1]) >= least)
    for name, array in (("found", found), ("reference", reference)):
        if array.min() < -ROUNDING or array.max() > 1 + ROUNDING:
            span = f"values from {array.min():g} to {array.max():g}"
            raise SamplesError(f"{metric}: {name}", span, "0..1", "Pictures in -1..1 are halved and moved up by 0.5.")
    a, b = (array.reshape(-1, *array.shape[-3:]) for array in (found, reference))
    stride = at_once or max(1, AT_ONCE // a[0].size)
    parts = [scores(a[i : i + stride], b[i : i + stride]) for i in range(0, len(a), stride)]
    return np.asarray(np.concatenate(parts).astype(np.float64).reshape(len(found), -1).mean(axis=1))


def numbers(values: Any) -> np.ndarray:
    """Return a list, an array or a tensor as a numpy array.

    A tensor may be on any device, have a graph, and have any dtype. It becomes float64.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values)


def one_per_sample(what: str, values: Any, count: int) -> np.ndarray:
    """Return ``values`` as float64 [count].

    Args:
        what: The source of the values, for errors.
        values: A list, an array or a tensor.
        count: Number of samples.

    Raises:
        SamplesError: If there is not one finite number per sample.
    """
    array = numbers(values)
    if array.dtype.kind not in "fiub" or array.shape != (count,):
        raise SamplesError(
            what, f"it returned {array.dtype} of shape {list(array.shape)}", f"numbers, one per sample: [{count}]"
        )
    if not np.isfinite(array).all():
        sample = int(np.argmax(~np.isfinite(array)))
        raise SamplesError(what, f"it returned {array[sample]} for sample {sample}", "finite numbers")
    return array.astype(np.float64)
