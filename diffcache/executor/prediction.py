"""Predict whole outputs by equation (1): every tensor of a module's output, branch by branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.executor import notices
from diffcache.executor.equation import predict
from diffcache.executor.notices import Reason
from diffcache.executor.pairing import Pairing, alone
from diffcache.executor.program import Terms
from diffcache.executor.store import Anchor, Kept, batch_first, channel_dim, signature
from diffcache.host.channels import Place, counterpart
from diffcache.kernels import Packed, from_kept, unpack
from diffcache.kernels.library import Backend


def why_not(
    anchors: Sequence[Anchor],
    terms: Terms,
    x: Sequence[Tensor],
    branch: int | None,
    pairing: Pairing | None = None,
    batch: int = 1,
) -> Reason | None:
    """Return why no prediction can be made, or None if one can.

    Args:
        anchors: See ``predict_output``.
        terms: See ``predict_output``.
        x: See ``predict_output``.
        branch: See ``predict_output``.
        pairing: See ``predict_output``.
        batch: The number of samples of the forward.
    """
    here = signature(x)
    if any(a.signature != here for a in anchors):
        return notices.OTHER_INPUT
    outputs = anchors[0].kept
    if len({signature(a.kept) for a in anchors}) > 1:
        return notices.OTHER_OUTPUT
    pairing = pairing or alone(x, outputs)
    if terms.needs_x and pairing.unclear:
        return notices.UNCLEAR_INPUT
    if terms.needs_x and not any(i is not None for i in pairing.own):
        return notices.UNLIKE_INPUT
    if terms.needs_x and not pairing.carried(x, outputs):
        return notices.NO_SAMPLE
    if terms.needs_x and any(a.difference for a in anchors) and pairing.cut(x, outputs):
        return notices.NO_SAMPLE
    rows = 1 if branch is not None else len(terms.weights)
    parts = [len(outputs)] if pairing.listed else [len(t) for t in outputs if t.ndim]
    if any(count % rows for count in parts):
        return notices.UNEVEN_BATCH
    if rows > 1 and not pairing.listed and not all(batch_first(t, batch) for t in outputs if t.ndim):
        return notices.UNCLEAR_BATCH
    channels = {v.size for v in (*terms.scale, *terms.bias) if isinstance(v, np.ndarray)}
    if any(like.is_floating_point() and _channel_dim(like, n) is None for n in channels for like in outputs):
        return notices.other_channels(max(channels))
    return None


def predict_output(
    anchors: Sequence[Anchor],
    terms: Terms,
    x: Sequence[Tensor],
    branch: int | None,
    pairing: Pairing | None = None,
    backend: Backend = "auto",
) -> object:
    """Return the predicted output.

    Args:
        anchors: The kept tensors of the anchors, newest first.
        terms: The coefficients of equation (1).
        x: The tensors of the site's input.
        branch: The branch whose coefficients are used. None means that the batch holds all branches in equal parts.
        pairing: Which tensor of ``x`` belongs to which output. None means that ``x`` is the main input.
        backend: What runs operations on tensors kept in fewer bytes.
    """
    newest = anchors[0]
    pairing = pairing or alone(x, newest.kept)
    rows = range(len(terms.weights)) if branch is None else [min(branch, len(terms.weights) - 1)]
    members = len(newest.kept) if pairing.listed else 0
    tensors = []
    for j, like in enumerate(newest.kept):
        if isinstance(like, Tensor) and not like.is_floating_point():  # indices, masks: nothing to interpolate
            tensors.append(like.clone())
            continue
        own = pairing.own[j] if terms.needs_x else None
        here = [rows[j * len(rows) // members]] if members else list(rows)
        kept = [a.kept[j] for a in anchors]
        now: Tensor | None = None
        then: list[Kept | None] = [None] * len(anchors)
        if own is not None:
            sample_slot = pairing.of(own)
            now = counterpart(x[own], like.shape, sample_slot)
            then = [_counterpart(a.x[own], like, sample_slot) if a.x else None for a in anchors]
        parts = _from_packed(kept, terms, here, now, then, backend) or _from_plain(kept, terms, here, now, then)
        tensors.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    return newest.form.rebuild(tensors)


def _from_plain(
    kept: Sequence[Kept], terms: Terms, rows: Sequence[int], now: Tensor | None, then: Sequence[Kept | None]
) -> list[Tensor]:
    """Predict one tensor of the output with plain torch.

    Args:
        kept: The tensor at each anchor.
        terms: The coefficients of equation (1).
        rows: The rows of the coefficients.
        now: x of equation (1), or None if it is not needed.
        then: x at each anchor. None means that it is not needed, or was subtracted from what is kept.

    Returns:
        The tensor in as many equal parts as there are ``rows``.
    """
    anchors = [_plain(k) for k in kept]
    like = anchors[0]

    def split(tensor: Tensor) -> Sequence[Tensor]:
        return tensor.chunk(len(rows)) if len(rows) > 1 else (tensor,)

    inputs = [None if k is None else _plain(k) for k in then]
    drift = None
    if now is not None:
        before = torch.zeros_like(like) if inputs[0] is None else inputs[0]
        drift = [*zip(split(now), split(before), strict=True)]
    given = [(n, split(x)) for n, x in enumerate(inputs) if x is not None and any(terms.inputs[row][n] for row in rows)]
    return [
        predict(
            [split(a)[part] for a in anchors] + [x[part] for _, x in given],
            terms.weights[row] + tuple(terms.inputs[row][n] for n, _ in given),
            drift=None if drift is None else drift[part],
            kappa=terms.kappa[row],
            scale=_broadcast(terms.scale[row], like),
            bias=_broadcast(terms.bias[row], like),
        )
        for part, row in enumerate(rows)
    ]


def _from_packed(
    kept: Sequence[Kept],
    terms: Terms,
    rows: Sequence[int],
    now: Tensor | None,
    inputs: Sequence[Kept | None],
    backend: Backend,
) -> list[Tensor] | None:
    """Predict one tensor of the output from codes and scales, without unpacking them.

    Args:
        kept: The tensor at each anchor.
        terms: The coefficients of equation (1).
        rows: The rows of the coefficients.
        now: x of equation (1), or None if it is not needed.
        inputs: x at each anchor. None means that it is not needed, or was subtracted from what is kept.
        backend: What runs the operation.

    Returns:
        The tensor in as many equal parts as there are ``rows``. None means that the operation does not apply: a tensor
        is not packed, an input has another shape or format than the output, inputs have weights, or coefficients lie
        along another dimension than the usual one.
    """
    then: Kept | None = inputs[0]
    if any(map(any, terms.inputs)):
        return None
    anchors = [k for k in kept if isinstance(k, Packed)]
    if not anchors or len(anchors) < len(kept):
        return None
    like = anchors[0]
    if now is not None and now.shape != like.shape:
        return None
    if isinstance(then, Tensor) or (then is not None and (then.shape != like.shape or then.format != like.format)):
        return None
    arrays = [v for row in rows for v in (terms.scale[row], terms.bias[row]) if isinstance(v, np.ndarray)]
    if any(_channel_dim(like, v.size) != channel_dim(like) for v in arrays):
        return None
    parts = [None] * len(rows) if now is None else now.chunk(len(rows))
    anchors += [] if then is None else [then]
    found = []
    for part, row in enumerate(rows):
        weights = terms.weights[row] + (() if then is None else (-terms.kappa[row],))
        factor, offset = terms.scale[row], terms.bias[row]
        found.append(
            from_kept(
                [a.chunk(len(rows))[part] for a in anchors],
                weights,
                x=parts[part],
                kappa=terms.kappa[row],
                scale=_per_row(factor, like),
                bias=_per_row(offset, like),
                backend=backend,
            )
        )
    return found


def _plain(kept: Kept) -> Tensor:
    """Return a kept tensor in its own dtype."""
    return unpack(kept) if isinstance(kept, Packed) else kept


def _per_row(value: float | np.ndarray, like: Packed) -> float | Tensor:
    """Return a coefficient in the shape that ``from_kept`` takes: one number per channel of tokens or of pictures."""
    if isinstance(value, float):
        return value
    shape = (-1, 1) if like.ndim >= 4 else (1, -1)
    return torch.tensor(value, dtype=torch.float32, device=like.device).view(shape)


def repeats(x: Sequence[Tensor], times: int) -> bool:
    """Return whether the batch of ``x`` is ``times`` equal parts, as batched guidance builds it.

    Only the first channel is compared. Channels that a pipeline puts after those of the sample may differ from branch
    to branch.
    """
    samples = list(x) if len(x) > 1 else list(x[0].narrow(channel_dim(x[0]), 0, 1)) if x else []
    if not samples or len(samples) % times:
        return False
    apart = len(samples) // times
    return all(torch.equal(one, other) for one, other in zip(samples, samples[apart:], strict=False))


def repetition(x: Sequence[Tensor], times: int) -> bool | None:
    """Return whether the batch of the denoiser's input is ``times`` equal parts, as batched guidance builds it.

    The device is read once.

    Returns:
        None if the parts are equal in some slices only. Guidance leads to that if conditions differ from branch to
        branch. Samples that share a condition lead to it without guidance.
    """
    if len(x) != 1:
        return repeats(x, times)
    if not len(x[0]) or len(x[0]) % times:
        return False
    first, *others = x[0].chunk(times)
    same = torch.stack([first == other for other in others]).all(0)
    slices = [same.movedim(d, 0).flatten(1).all(1).any() for d in range(1, same.ndim)]
    whole, *partly = torch.stack([same.all(), *slices]).tolist()
    return True if whole else None if any(partly) else False


def _counterpart(kept: Kept, like: Kept, sample_slot: Place | None) -> Kept:
    """Return ``counterpart`` of a kept input. A packed input of the output's shape remains packed."""
    if isinstance(kept, Packed) and kept.shape == like.shape and not sample_slot:
        return kept
    return counterpart(_plain(kept), like.shape, sample_slot)


def _broadcast(value: float | np.ndarray, like: Tensor) -> float | Tensor:
    """Return a coefficient in a shape that broadcasts against ``like``."""
    if isinstance(value, float):
        return value
    shape = [1] * like.ndim
    shape[_channel_dim(like, value.size) or 0] = -1
    return torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device).view(shape)


def _channel_dim(like: Kept, channels: int) -> int | None:
    """Return the dimension with that many channels: the usual one if it fits, else the first that fits, else None."""
    usual = channel_dim(like)
    return next((d for d in (usual, *range(1, like.ndim), 0) if like.shape[d] == channels), None)
