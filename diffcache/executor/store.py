"""Keep the tensors of one run: the anchors of each site and branch, their formats, and their bytes."""

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
    """The output of a module as a list of tensors and a form.

    Attributes:
        tensors: The tensors.
        others: The leaves of the structure. ``_TENSOR`` stands for a tensor.
        spec: The structure.
    """

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, value: Any) -> Output:
        """Take the output ``value`` of a module apart."""
        if isinstance(value, Tensor):  # most modules return a tensor at every forward
            return cls((value,), (_TENSOR,), _LEAF)
        leaves, spec = pytree.tree_flatten(value)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def form(self) -> Output:
        """Return the output without its tensors."""
        return Output((), self.others, self.spec)

    def placeholder(self) -> Output:
        """Return the output with zeros that take no memory, in place of its tensors."""
        zeros = (torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) for t in self.tensors)
        return Output(tuple(zeros), self.others, self.spec)

    def copied(self) -> Any:
        """Return the module's output with copies of the tensors. The network may write into them."""
        return self.rebuild([t.detach().clone() for t in self.tensors])

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Return an output of the same form with ``tensors`` in it."""
        fresh = iter(tensors)
        return pytree.tree_unflatten([next(fresh) if o is _TENSOR else o for o in self.others], self.spec)


class _Tensor:
    pass


_TENSOR = _Tensor()
_LEAF = pytree.tree_structure(_TENSOR)


@dataclass(frozen=True, slots=True)
class Packer:
    """How the tensors of a site are kept.

    Attributes:
        how: The format. None keeps tensors as they are.
        prescale: float32 [2, C], for tensors with C channels in the last dimension. None measures it on each tensor.
        backend: What packs the tensors.
    """

    how: Format | None = None
    prescale: Tensor | None = None
    backend: Backend = "auto"

    def keep(self, x: Tensor, *, mine: bool = False) -> Kept:
        """Return ``x`` as it is kept: packed, or as a copy if the format saves no bytes.

        Args:
            x: The tensor.
            mine: Whether no other code uses ``x``. Then it needs no copy.
        """
        channels = None if self.prescale is None else self.prescale.shape[1]
        if self.how is None or not fewer_bytes(x, self.how):
            return x if mine else x.detach().clone()
        prescale = self.prescale if scaled(x, self.how, channels) else None
        return pack(x, self.how, prescale=prescale, backend=self.backend)

    def keep_difference(self, f: Tensor, x: Tensor) -> Kept:
        """Return F − x packed in one pass, for tensors for which ``fewer_bytes`` is true.

        Raises:
            ValueError: There is no format.
        """
        if self.how is None:
            raise ValueError("keep_difference packs its result, and this Packer has no format (how=None)")
        return pack(f, self.how, minus=x, backend=self.backend)


AS_IT_IS = Packer()


@dataclass(frozen=True, slots=True)
class Anchor:
    """The kept output of one computed step.

    Attributes:
        form: The form of the site's output, without its tensors.
        kept: The tensors of the output, or their differences from the input.
        x: The tensors of the site's input. It is empty if no later prediction needs them.
        signature: What of the input must not change. See ``signature``.
        difference: Whether ``kept`` holds differences.
    """

    form: Output
    kept: tuple[Kept, ...]
    x: tuple[Kept, ...]
    signature: tuple[Any, ...]
    difference: bool = False

    @classmethod
    def of(cls, output: Output, x: tuple[Tensor, ...], signature: tuple[Any, ...]) -> Anchor:
        """Return an anchor with copies of the output's tensors. The network may write into the originals."""
        return cls(output.form(), tuple(AS_IT_IS.keep(t) for t in output.tensors), x, signature)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.nbytes for t in self.kept + self.x)


class Store:
    """The anchors of one run, by key and step.

    Attributes:
        peak_bytes: The most bytes at one time.
        most: The most bytes of one key at one time, by key.
    """

    def __init__(self) -> None:
        self._anchors: dict[Hashable, dict[int, Anchor]] = {}
        self._bytes = 0
        self.peak_bytes = 0
        self.most: dict[Hashable, int] = {}

    def put(self, key: Hashable, step: int, anchor: Anchor) -> None:
        """Keep ``anchor``, in place of another one of the same key and step."""
        self.drop(key, step)
        mine = self._anchors.setdefault(key, {})
        mine[step] = anchor
        self._bytes += anchor.nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.most[key] = max(self.most.get(key, 0), sum(a.nbytes for a in mine.values()))

    def get(self, key: Hashable, step: int) -> Anchor | None:
        """Return an anchor, or None if there is none."""
        return self._anchors.get(key, {}).get(step)

    def drop(self, key: Hashable, step: int) -> None:
        """Drop an anchor, if there is one."""
        anchor = self._anchors.get(key, {}).pop(step, None)
        if anchor is not None:
            self._bytes -= anchor.nbytes

    def discard(self, denoiser: str, branch: int) -> list[tuple[Hashable, int]]:
        """Drop all anchors of one branch, and the signals of its criterion. Return their keys and steps."""
        found: list[tuple[Hashable, int]] = []
        for key, anchors in self._anchors.items():
            if isinstance(key, tuple) and key[0] == denoiser and key[2] == branch:
                found += [(key, step) for step in anchors]
        for key, step in found:
            self.drop(key, step)
        return found

    def clear(self) -> None:
        """Drop all anchors."""
        self._anchors.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Return the bytes of all anchors."""
        return self._bytes


def fewer_bytes(x: Tensor, how: Format | None) -> bool:
    """Return whether a format keeps the tensor in fewer bytes than it has. Its values do not matter."""
    return how is not None and x.is_floating_point() and x.ndim > 1 and packed_bytes(x.shape, how) < x.nbytes


def scaled(x: Tensor, how: Format, channels: int | None) -> bool:
    """Return whether a prescale of so many channels applies to ``x``."""
    return channels is not None and bool(how.group) and x.ndim < 4 and x.shape[-1] == channels


def kept_bytes(tensors: Sequence[Tensor], how: Format | None, channels: int | None = None) -> int:
    """Return the bytes of ``tensors`` as ``Packer`` keeps them. Their values do not matter.

    Args:
        tensors: The tensors.
        how: The format. None keeps tensors as they are.
        channels: The number of channels of the prescale, or None if there is none.
    """
    return sum(
        packed_bytes(t.shape, how, scaled=scaled(t, how, channels)) if how and fewer_bytes(t, how) else t.nbytes
        for t in tensors
    )


def signature(x: Sequence[Kept]) -> tuple[Any, ...]:
    """Return what of a site's input must not change between an anchor and a prediction from it."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in x)


def all_finite(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return whether all tensors are finite, as a tensor of one element on their device; None if there are none.

    Only the largest and the smallest elements are checked, which are NaN if any element is. Each tensor is read twice,
    and nothing of its size is written. On a CPU this takes a tenth of the time of ``isfinite``.
    """
    found = ends(tensors)
    return torch.isfinite(torch.stack(found)).all() if found else None


def ends(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest and the smallest element of each floating-point tensor.

    Both are finite if and only if all elements are.
    """
    return [end for t in tensors if t.is_floating_point() and t.numel() for end in (t.amax(), t.amin())]


def batch_first(tensor: Kept, batch: int) -> bool:
    """Return whether the first dimension is the batch, or the batch times another number, such as frames of a video.

    It is False if a later dimension has the length of the batch instead. Some networks use [tokens, batch, channels].
    """
    if tensor.ndim == 0 or len(tensor) % batch:
        return False
    return len(tensor) == batch or batch == 1 or batch not in tensor.shape[1:-1]


def channel_dim(tensor: Kept) -> int:
    """Return the usual dimension of channels: 1 for pictures and videos, the last for tokens."""
    return 1 if tensor.ndim >= 4 else tensor.ndim - 1
