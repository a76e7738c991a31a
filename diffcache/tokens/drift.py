"""Test at every layer whether attention has drifted, and choose the position that the layer tracks next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.tokens.attention import Drift, attention_rows
from diffcache.tokens.layers import Depths
from diffcache.tokens.rows import indices, picked
from diffcache.tokens.store import PlacedCache


def observe(
    drift: Drift,
    depths: Depths,
    cache: PlacedCache,
    number: int,
    query: Tensor,
    keys: Tensor,
    mask: Any,
    scaling: float,
) -> None:
    """Compare the tracked token's attention row with its kept one, and choose the token that is tracked next.

    Each row of the batch decides alone.

    Args:
        drift: The drift of the canvas.
        depths: The refreshes of the canvas. ``start`` becomes the next layer in rows that have drifted.
        cache: The kept keys, before and after this forward.
        number: The number of the layer.
        query: [B, heads, n, head_dim], of the positions that the layer computes.
        keys: [B, key heads, N, head_dim].
        mask: The attention mask of these queries.
        scaling: The factor of the scores.
    """
    query, keys = query.detach(), keys.detach()
    size = keys.shape[2]
    whole = depths.index is None
    index = np.broadcast_to(np.arange(size), (len(query), size)) if depths.index is None else depths.index
    if whole:
        drift.queries[number] = query
    else:
        old = drift.queries[number]
        if drift.gamma > 0 and (depths.start > number).any():
            tracked = drift.tracked[number]
            place = torch.from_numpy(tracked[:, None]).to(query.device)
            slots = torch.from_numpy((index == tracked[:, None]).argmax(1)[:, None]).to(query.device)
            rows = _rows_of(mask, slots)
            now = attention_rows(picked(query, slots), keys, rows, scaling)
            then = attention_rows(picked(old, place), cache.before[number], rows, scaling)
            cosine = torch.nn.functional.cosine_similarity(now, then, dim=-1).mean((1, 2)).cpu().numpy()
            depths.start = np.where((cosine < drift.gamma) & (depths.start > number), number + 1, depths.start)
        where = torch.from_numpy(index).to(query.device)[:, None, :, None].expand_as(query)
        drift.queries[number] = old.scatter(2, where, query)
    drift.tracked[number] = _most_attended(drift, index, query, keys, mask, scaling)


def _most_attended(
    drift: Drift, index: np.ndarray, query: Tensor, keys: Tensor, mask: Any, scaling: float
) -> np.ndarray:
    """Return int64 [B], the decoded position that receives most attention from the window, over all heads."""
    first = np.ones_like(index, bool)
    first[:, 1:] = index[:, 1:] != index[:, :-1]  # rows repeat their last position
    asking = np.take_along_axis(drift.window, index, 1) & first
    chosen = indices(asking)
    slots = torch.from_numpy(chosen).to(query.device)
    real = np.arange(chosen.shape[1])[None] < asking.sum(1, keepdims=True)
    rows = attention_rows(picked(query, slots), keys, _rows_of(mask, slots), scaling)
    received = (rows * torch.from_numpy(real).to(rows)[:, None, :, None]).sum((1, 2))
    return received.masked_fill(torch.from_numpy(~drift.decoded).to(rows.device), -1).argmax(1).cpu().numpy()


def _rows_of(mask: Any, slots: Tensor) -> Any:
    return picked(mask.expand(len(slots), *mask.shape[1:]), slots) if isinstance(mask, Tensor) else None
