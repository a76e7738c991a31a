"""Read and compare the token ids that decoding loops return."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from diffcache.errors import Unusable


def token_ids(result: Any) -> Tensor:
    """Return the token ids of a result: a tensor, or the field ``sequences`` of an output."""
    found = getattr(result, "sequences", result)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point() or not len(found):
        raise Unusable(
            "the loop",
            f"a call returned {type(result).__name__}, which holds no token ids of shape [batch, positions]",
            "Return the ids of the loop as a tensor from the function that runs it",
        )
    return found.cpu()


def same_tokens(ids: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return bool [B, N], where two results have the same token. A shorter result differs where it ends."""
    size = max(ids.shape[1], other.shape[1])
    wide = [
        np.pad(one, ((0, 0), (0, size - one.shape[1])), constant_values=-1 - i) for i, one in enumerate((ids, other))
    ]
    same: np.ndarray = wide[0] == wide[1]
    return same
