"""Equation (1) on whole outputs: every tensor of a module's output, branch by branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffcache.executor.program import Terms
from diffcache.predictors import predict
from diffcache.store import Anchor, signature


def problem(anchors: Sequence[Anchor | None], x: Sequence[Tensor]) -> str | None:
    """Why no prediction can be made from these anchors for input ``x``; None if one can."""
    if any(a is None for a in anchors):
        return "an anchor is missing (late start, another denoiser, or non-finite output)"
    here = signature(x)
    if any(a is not None and a.signature != here for a in anchors):
        return "shape, dtype or device of the input changed"
    return None


def combine(anchors: Sequence[Anchor], terms: Terms, x: Sequence[Tensor], branch: int | None) -> object:
    """The predicted output. ``branch``: whose coefficients; None when all branches lie in the batch, in equal parts."""
    newest = anchors[0].output
    rows = range(len(terms.weights)) if branch is None else [min(branch, len(terms.weights) - 1)]
    tensors = []
    for j, like in enumerate(newest.tensors):
        kept = [a.output.tensors[j].chunk(len(rows)) for a in anchors]
        drift = _drift(x, anchors[0].x, j, like, len(rows)) if terms.needs_x else [None] * len(rows)
        parts = [
            predict(
                [k[part] for k in kept],
                terms.weights[row],
                drift=drift[part],
                kappa=terms.kappa[row],
                scale=_broadcast(terms.scale[row], like),
                bias=_broadcast(terms.bias[row], like),
            )
            for part, row in enumerate(rows)
        ]
        tensors.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    return newest.rebuild(tensors)


def repeats(x: Sequence[Tensor], times: int) -> bool:
    """Whether the batch of ``x`` is ``times`` equal parts, as batched guidance builds it."""
    if not x or len(x[0]) % times:
        return False
    parts = x[0].chunk(times)
    return all(torch.equal(parts[0], part) for part in parts[1:])


def _drift(
    x: Sequence[Tensor], x_0: Sequence[Tensor], j: int, like: Tensor, parts: int
) -> Sequence[tuple[Tensor, Tensor] | None]:
    """The input that belongs to output tensor ``j``, now and at the anchor, in the output's shape, cut into parts."""
    own = [i for i, t in enumerate(x) if t.shape == like.shape]
    i = j if j in own or not own and j < len(x) else own[0] if own else 0
    now, then = _channels_as(x[i], like), _channels_as(x_0[i], like)
    return list(zip(now.chunk(parts), then.chunk(parts), strict=True))


def _channels_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the channels of ``like``: condition channels cut off, channels only the output has (a learned
    variance) filled with zeros, where no drift is added."""
    dim = _channel_dim(like)
    missing = like.shape[dim] - x.shape[dim]
    if missing <= 0:
        return x.narrow(dim, 0, like.shape[dim])
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, missing])


def _broadcast(value: float | np.ndarray, like: Tensor) -> float | Tensor:
    """A per-channel vector in the shape that broadcasts against ``like``."""
    if isinstance(value, float):
        return value
    shape = [1] * like.ndim
    shape[_channel_dim(like)] = -1
    return torch.as_tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device).view(shape)


def _channel_dim(like: Tensor) -> int:
    """Pictures and videos carry channels at 1, token sequences at the end."""
    return 1 if like.ndim >= 4 else like.ndim - 1
