"""Who keeps which tensor: the anchors of each site and branch, for one run, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Output:
    """A module's output taken apart: its tensors, and how to put tensors like them together again."""

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]  # one per leaf; tensors are marked by _TENSOR
    spec: Any

    @classmethod
    def of(cls, value: Any) -> Output:
        leaves, spec = pytree.tree_flatten(value)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def kept(self) -> Output:
        """The same with tensors of its own: hosts may write into what a module returned."""
        return Output(tuple(t.detach().clone() for t in self.tensors), self.others, self.spec)

    def blank(self) -> Output:
        """The same with zeros that take no memory: ``copied`` makes of it what has the form and not the values."""
        zeros = (torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) for t in self.tensors)
        return Output(tuple(zeros), self.others, self.spec)

    def copied(self) -> Any:
        """The module's output again, of new tensors."""
        return self.rebuild(self.kept().tensors)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        fresh = iter(tensors)
        return pytree.tree_unflatten([next(fresh) if o is _TENSOR else o for o in self.others], self.spec)


class _Tensor:
    pass


_TENSOR = _Tensor()


@dataclass(frozen=True, slots=True)
class Anchor:
    """What one computed step left behind. ``x``: the site's input, empty unless a later prediction needs it."""

    output: Output
    x: tuple[Tensor, ...]
    signature: tuple[Any, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.output.tensors + self.x


class Store:
    """Anchors by (site, branch) and step, dropped as soon as no later step refers to them."""

    def __init__(self) -> None:
        self._anchors: dict[Hashable, dict[int, Anchor]] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def put(self, key: Hashable, step: int, anchor: Anchor) -> None:
        self.drop(key, step)
        self._anchors.setdefault(key, {})[step] = anchor
        self._bytes += _bytes(anchor)
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def get(self, key: Hashable, step: int) -> Anchor | None:
        return self._anchors.get(key, {}).get(step)

    def drop(self, key: Hashable, step: int) -> None:
        anchor = self._anchors.get(key, {}).pop(step, None)
        if anchor is not None:
            self._bytes -= _bytes(anchor)

    def clear(self) -> None:
        self._anchors.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes


def signature(x: Sequence[Tensor]) -> tuple[Any, ...]:
    """What of a site's input must not change between an anchor and a prediction from it."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in x)


def all_finite(tensors: Sequence[Tensor]) -> Tensor | None:
    """Whether all are finite, as one tensor on their device (reading it is the caller's choice); None without any."""
    flags = [torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    return torch.stack(flags).all() if flags else None


def batch_first(tensor: Tensor, batch: int) -> bool:
    """Whether the first dimension is the batch, or holds it times something else (the frames of a video). No where a
    later one is as long as the batch instead: some networks work on [tokens, batch, channels] inside."""
    if tensor.ndim == 0 or len(tensor) % batch:
        return False
    return len(tensor) == batch or batch == 1 or batch not in tensor.shape[1:-1]


def channel_dim(tensor: Tensor) -> int:
    """Where channels usually lie: pictures and videos carry them at 1, token sequences at the end."""
    return 1 if tensor.ndim >= 4 else tensor.ndim - 1


def _bytes(anchor: Anchor) -> int:
    return sum(t.numel() * t.element_size() for t in anchor.tensors)
