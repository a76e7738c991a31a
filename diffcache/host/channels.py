"""Find the noise scheduler's sample in the denoiser's input, and the part of the input that belongs to the output.

Pipelines put conditions around the sample: a picture before it (Marigold), masks and pictures behind it (inpainting,
image to video). They lie along the channels, at dimension 1, 2 or last. The place is found from shapes and one
comparison with the sample, without assumptions about the order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_PLACES = 512  # the most places that are tried
EXPLAINED = 1e-3  # root of the share of a part's energy that may remain when the scaled sample is subtracted


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` entries along the dimension ``dim``, beginning at ``start``."""

    dim: int
    start: int
    length: int


Place = tuple[Span, ...]  # place of a sample in an input: a span for each dimension in which the sample is shorter


def apart(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the only dimension in which two shapes differ. The batch (dimension 0) must be equal.

    Returns:
        The dimension; 0 if the shapes are equal; None if they differ in another way.
    """
    if len(one) != len(other) or not len(one) or one[0] != other[0]:
        return None
    found = [d for d in range(1, len(one)) if one[d] != other[d]]
    return found[0] if len(found) == 1 else None if found else 0


def find_sample(x: Tensor, sample: Tensor) -> Place | None:
    """Return the place where a multiple of ``sample`` lies in the denoiser's input ``x``.

    If the shapes differ, this reads the device once. If they are equal, nothing is compared.

    Args:
        x: [B, …], or [nB, …] if guidance repeats the batch.
        sample: [B, …], shorter than ``x`` in some of the other dimensions.

    Returns:
        The place, empty for equal shapes. None if the sample is in no place, or in several.
    """
    if x.ndim != sample.ndim or x.ndim < 2 or not len(sample) or len(x) % len(sample):
        return None
    free = [n - m for n, m in zip(x.shape[1:], sample.shape[1:], strict=True)]
    if min(free) < 0 or math.prod(n + 1 for n in free) > MOST_PLACES:
        return None
    places = [
        tuple(Span(d, start, sample.shape[d]) for d, start in enumerate(starts, 1) if free[d - 1])
        for starts in itertools.product(*(range(n + 1) for n in free))
    ]
    if len(places) == 1:
        return ()
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, target = x[: len(sample)].detach().to(wide), sample.detach().to(x.device, wide)
    size, missed = target.square().sum(), []
    for place in places:
        part = within(rows, place)
        factor = (part * target).sum() / size
        missed.append((part - factor * target).square().sum() / part.square().sum())
    limit = max(EXPLAINED, 4 * max(torch.finfo(t.dtype).eps for t in (x, sample) if t.is_floating_point()))
    shares = torch.stack(missed).tolist()
    found = [place for place, share in zip(places, shares, strict=True) if share < limit**2]
    return found[0] if len(found) == 1 else None


def put(sample: Tensor, x: Tensor, place: Place) -> Tensor:
    """Return a copy of ``x`` with ``sample`` at this place."""
    changed = x.clone()
    within(changed, place).copy_(sample)
    return changed


def within(x: Tensor, place: Place) -> Tensor:
    """Return the part of ``x`` at this place, as a view."""
    for span in place:
        x = x.narrow(span.dim, span.start, span.length)
    return x


def channel_dim(shape: Sequence[int]) -> int:
    """Return the dimension that usually holds the channels: 1 for pictures and videos, the last for token sequences."""
    return 1 if len(shape) >= 4 else len(shape) - 1


def carries(x: Sequence[int], output: Sequence[int], place: Place | None) -> bool:
    """Return whether ``counterpart`` can turn an input of shape ``x`` into the shape of the output."""
    own = list(x)
    for span in _cuts(x, output, place):
        own[span.dim] = span.length
    d = apart(own, output)
    return d == 0 or (d is not None and own[d] < output[d] and _may_be_filled(own, output, d))


def counterpart(x: Tensor, output: Sequence[int], place: Place | None) -> Tensor:
    """Return the part of the input that corresponds to the output, in the output's shape.

    Conditions are cut off. Channels that only the output has (a learned variance) are zeros.
    """
    x = within(x, _cuts(x.shape, output, place))
    d = apart(x.shape, output)
    return F.pad(x, [0, 0] * (x.ndim - 1 - d) + [0, output[d] - x.shape[d]]) if d else x


def is_cut(x: Sequence[int], output: Sequence[int], place: Place | None) -> bool:
    """Return whether ``counterpart`` leaves a part of the input out."""
    return bool(_cuts(x, output, place))


def _cuts(x: Sequence[int], output: Sequence[int], place: Place | None) -> Place:
    """Return the spans at which ``counterpart`` cuts conditions off.

    Tokens and frames that are not the sample's are kept if the output has as many, because each belongs to one of the
    output. Channels of pictures are always cut.
    """
    if len(x) != len(output):
        return ()
    return tuple(span for span in place or () if x[span.dim] != output[span.dim] or (len(x) == 4 and span.dim == 1))


def _may_be_filled(x: Sequence[int], output: Sequence[int], d: int) -> bool:
    """Return whether additional entries of the output along this dimension may be channels that the input lacks."""
    return d == channel_dim(output) or (len(output) > 3 and output[d] == 2 * x[d])
