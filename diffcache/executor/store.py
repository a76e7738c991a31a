"""Who keeps which tensor: the anchors of each site and branch, for one run, in which format, and how many bytes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffcache.kernels import Format, Packed, pack, packed_bytes
from diffcache.kernels.library import Backend

Kept = Tensor | Packed


@dataclass(frozen=True, slots=True)
class Output:
    """A module's output taken apart: its tensors, and how to put tensors like them together again."""

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]  # one per leaf; tensors are marked by _TENSOR
    spec: Any

    @classmethod
    def of(cls, value: Any) -> Output:
        if isinstance(value, Tensor):  # of most modules, at every forward
            return cls((value,), (_TENSOR,), _LEAF)
        leaves, spec = pytree.tree_flatten(value)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def form(self) -> Output:
        """Without the tensors."""
        return Output((), self.others, self.spec)

    def placeholder(self) -> Output:
        """The same with zeros that take no memory: ``copied`` makes of it what has the form and not the values."""
        zeros = (torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) for t in self.tensors)
        return Output(tuple(zeros), self.others, self.spec)

    def copied(self) -> Any:
        """The module's output again, of new tensors: hosts may write into what they are given."""
        return self.rebuild([t.detach().clone() for t in self.tensors])

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        fresh = iter(tensors)
        return pytree.tree_unflatten([next(fresh) if o is _TENSOR else o for o in self.others], self.spec)


class _Tensor:
    pass


_TENSOR = _Tensor()
_LEAF = pytree.tree_structure(_TENSOR)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a site's tensors are kept.

    how       None: as they are
    prescale  float32 [2, C] for tensors whose last dimension are these channels; None: their own
    """

    how: Format | None = None
    prescale: Tensor | None = None
    backend: Backend = "auto"

    def keep(self, x: Tensor, *, mine: bool = False) -> Kept:
        """A copy; where the format saves nothing and ``x`` is nobody else's, ``x``."""
        channels = None if self.prescale is None else self.prescale.shape[1]
        if self.how is None or not fewer_bytes(x, self.how):
            return x if mine else x.detach().clone()
        prescale = self.prescale if scaled(x, self.how, channels) else None
        return pack(x, self.how, prescale=prescale, backend=self.backend)

    def keep_difference(self, f: Tensor, x: Tensor) -> Kept:
        """F − x, in one pass, for tensors that ``fewer_bytes`` is true of."""
        if self.how is None:
            raise ValueError("keep_difference packs its result, and this Keeping has no format (how=None)")
        return pack(f, self.how, minus=x, backend=self.backend)


AS_IT_IS = Keeping()


@dataclass(frozen=True, slots=True)
class Anchor:
    """What one computed step left behind.

    form        of the site's output, without its tensors
    kept        the output's tensors, or what was taken off them
    x           the site's input, empty unless a later prediction needs it
    difference  ``kept`` is output less input
    """

    form: Output
    kept: tuple[Kept, ...]
    x: tuple[Kept, ...]
    signature: tuple[Any, ...]
    difference: bool = False

    @classmethod
    def of(cls, output: Output, x: tuple[Tensor, ...], signature: tuple[Any, ...]) -> Anchor:
        """Copies of the output's tensors, as they are: hosts may write into what a module returned."""
        return cls(output.form(), tuple(AS_IT_IS.keep(t) for t in output.tensors), x, signature)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.kept + self.x)


class Store:
    """Anchors by (site, branch) and step, dropped as soon as no later step refers to them."""

    def __init__(self) -> None:
        self._anchors: dict[Hashable, dict[int, Anchor]] = {}
        self._bytes = 0
        self.peak_bytes = 0
        self.most: dict[Hashable, int] = {}  # bytes of one key at one time

    def put(self, key: Hashable, step: int, anchor: Anchor) -> None:
        self.drop(key, step)
        mine = self._anchors.setdefault(key, {})
        mine[step] = anchor
        self._bytes += anchor.nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.most[key] = max(self.most.get(key, 0), sum(a.nbytes for a in mine.values()))

    def get(self, key: Hashable, step: int) -> Anchor | None:
        return self._anchors.get(key, {}).get(step)

    def drop(self, key: Hashable, step: int) -> None:
        anchor = self._anchors.get(key, {}).pop(step, None)
        if anchor is not None:
            self._bytes -= anchor.nbytes

    def discard(self, denoiser: str, branch: int) -> list[tuple[Hashable, int]]:
        """Drop all anchors of one branch, and the signal that it is decided by; return their keys and steps."""
        found: list[tuple[Hashable, int]] = []
        for key, anchors in self._anchors.items():
            if isinstance(key, tuple) and key[0] == denoiser and key[2] == branch:
                found += [(key, step) for step in anchors]
        for key, step in found:
            self.drop(key, step)
        return found

    def clear(self) -> None:
        self._anchors.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes


def fewer_bytes(x: Tensor, how: Format | None) -> bool:
    """Whether this format keeps the tensor, of which the values do not matter, in fewer bytes than it has."""
    return how is not None and x.is_floating_point() and x.ndim > 1 and packed_bytes(x.shape, how) < x.nbytes


def scaled(x: Tensor, how: Format, channels: int | None) -> bool:
    """Whether a prescale of so many channels is for ``x``."""
    return channels is not None and bool(how.group) and x.ndim < 4 and x.shape[-1] == channels


def kept_bytes(tensors: Sequence[Tensor], how: Format | None, channels: int | None = None) -> int:
    """That ``Keeping`` makes of them; their values do not matter. ``channels``: of its prescale, where it has one."""
    return sum(
        packed_bytes(t.shape, how, scaled=scaled(t, how, channels)) if how and fewer_bytes(t, how) else t.nbytes
        for t in tensors
    )


def signature(x: Sequence[Kept]) -> tuple[Any, ...]:
    """What of a site's input must not change between an anchor and a prediction from it."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in x)


def all_finite(tensors: Sequence[Tensor]) -> Tensor | None:
    """Whether all are finite, as one tensor on their device (reading it is the caller's choice); None without any.

    Largest and smallest element tell, and pass NaN on: each tensor is read twice and nothing of its size is written,
    a tenth of ``isfinite``'s time on a CPU.
    """
    found = ends(tensors)
    return torch.isfinite(torch.stack(found)).all() if found else None


def ends(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest and the smallest element of each floating-point tensor. Both are finite if, and only if, all
    elements are."""
    return [end for t in tensors if t.is_floating_point() and t.numel() for end in (t.amax(), t.amin())]


def batch_first(tensor: Kept, batch: int) -> bool:
    """Whether the first dimension is the batch, or holds it times something else (the frames of a video). No where a
    later one is as long as the batch instead: some networks work on [tokens, batch, channels] inside."""
    if tensor.ndim == 0 or len(tensor) % batch:
        return False
    return len(tensor) == batch or batch == 1 or batch not in tensor.shape[1:-1]


def channel_dim(tensor: Kept) -> int:
    """Where channels usually lie: pictures and videos carry them at 1, token sequences at the end."""
    return 1 if tensor.ndim >= 4 else tensor.ndim - 1
