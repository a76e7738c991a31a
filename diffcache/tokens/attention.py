"""Measure how far attention has drifted: compare the rows of tracked tokens with those of their kept queries and keys.

The attention module calls the function that transformers' ``AttentionInterface`` holds under the name in its
configuration. While a model is observed, its attention modules have a copy of the configuration with another name. The
function under that name calls the original one, which never has to return attention weights.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.errors import Unusable
from diffcache.patch import Undo

SUPPORTED = ("sdpa", "eager")
PREFIX = "diffcache_"
IMPLEMENTATION = "_attn_implementation"  # the attribute of a configuration that names its attention function
_USERS: Counter[str] = Counter()  # registered names -> models that use them
_LOCK = threading.Lock()
_OBSERVERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class Drift:
    """The drift of one canvas.

    Attributes:
        queries: The newest query of every position, [B, heads, N, head_dim], by number of the layer.
        tracked: int64 [B], the position that each layer tracks, by number of the layer.
        window: bool [B, N], the masked positions that the step may decode.
        decoded: bool [B, N], the positions that hold no mask.
        gamma: The cosine below which a refresh begins.
    """

    queries: dict[int, Tensor] = field(default_factory=dict)
    tracked: dict[int, np.ndarray] = field(default_factory=dict)
    window: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    decoded: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    gamma: float = 0.0

    def positions(self) -> np.ndarray:
        """Return bool [B, N], the positions that any layer tracks."""
        found = np.zeros_like(self.decoded)
        for tracked in self.tracked.values():
            found[np.arange(len(tracked)), tracked] = True
        return found


# (number of the layer, queries, all keys, mask, scaling) of an attention that is about to run
Observe = Callable[[int, Tensor, Tensor, Any, float], None]


class AttentionStack:
    """The attention modules of one model, and their observer.

    Args:
        layers: The decoder layers.
        observe: Is called before each attention.

    Raises:
        Unusable: The attention is not one that can be observed.
    """

    def __init__(self, layers: list[nn.Module], observe: Observe) -> None:
        import transformers

        self._observe = observe
        self.modules = [m for one in layers for m in one.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
        names = {getattr(m.config, IMPLEMENTATION, None) for m in self.modules}
        if not hasattr(transformers, "AttentionInterface") or not self.modules or not names <= set(SUPPORTED):
            found = ", ".join(sorted(map(str, names))) or "none of transformers"
            raise Unusable(
                "this model",
                f"the rule compares attention rows, and its attention is: {found}",
                f"Load it with attn_implementation={SUPPORTED[0]!r}, or use a rule without drift: dkv, dual",
            )

    def attach(self) -> Iterator[Undo]:
        """Observe every attention module. Yield the function that undoes it."""
        for name in {str(getattr(module.config, IMPLEMENTATION)) for module in self.modules}:
            yield _registered(name)
        for module in self.modules:
            yield self._observed(module)

    def _observed(self, module: Any) -> Undo:
        config = module.config
        other = copy.copy(config)
        other._attn_implementation_internal = PREFIX + config._attn_implementation
        _OBSERVERS[module] = self._observe
        module.config = other

        def undo() -> None:
            _OBSERVERS.pop(module, None)
            if module.config is other:
                module.config = config

        return undo


def _registered(name: str) -> Undo:
    """Register the function that observes and then calls ``name``. Return what removes it after its last use."""
    import transformers

    full = PREFIX + name
    with _LOCK:
        _USERS[full] += 1
        transformers.AttentionInterface.register(full, _function(name))
    left = [full]

    def undo() -> None:
        with _LOCK:
            while left:
                _USERS[left.pop()] -= 1
            if not _USERS[full]:
                del _USERS[full]
                transformers.AttentionInterface._global_mapping.pop(full, None)

    return undo


def _function(name: str) -> Callable[..., Any]:
    """Return the attention function that observes, and then calls the one called ``name``."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        observe = _OBSERVERS.get(module)
        if observe is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            observe(int(module.layer_idx), query, key, attention_mask, float(scaling))  # type: ignore[arg-type]
        return _original(name, module)(module, query, key, value, attention_mask, **kwargs)

    return attention


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    if name == "eager":
        found: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return found
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return known


def attention_rows(query: Tensor, keys: Tensor, mask: Any, scaling: float) -> Tensor:
    """Return the attention weights, [B, heads, n, N], of some queries.

    Args:
        query: [B, heads, n, head_dim].
        keys: [B, key heads, N, head_dim].
        mask: None, or the mask of these queries: bool (True attends) or added, [B, 1 or heads, n, N].
        scaling: The factor of the scores.
    """
    repeats = query.shape[1] // keys.shape[1]
    scores = query.float() @ keys.float().repeat_interleave(repeats, 1).transpose(2, 3) * scaling
    if isinstance(mask, Tensor):
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)
