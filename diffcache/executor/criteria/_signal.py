"""Hold the tensors that a criterion compares, and those that it keeps between the calls of one branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.executor.store import AS_IT_IS, Anchor, Kept, Output, Packer, Store, signature
from diffcache.kernels import Packed, pack_again, unpack


class Signal:
    """The tensors of this call and those of the reference call. Both have the same shapes, dtypes and devices.

    Args:
        step: The step of the sampling loop.
        now: The tensors of this call.
        kept: The tensors of the reference call, as the store keeps them.
        packer: How the store keeps them.
        since: The step of the reference call. None: ``step``.
        levels: float64 [T], the share of noise in the state at every step: b / (a + b) of a · clean + b · noise. None
            if it is not known, or if the criterion does not declare ``About.levels``.
    """

    __slots__ = ("_compared", "_kept", "_packer", "levels", "now", "since", "step")

    def __init__(
        self,
        step: int,
        now: Sequence[Tensor],
        kept: Sequence[Kept],
        packer: Packer,
        *,
        since: int | None = None,
        levels: np.ndarray | None = None,
    ) -> None:
        self.step = step
        self.since = step if since is None else since
        self.levels = levels
        self.now = now
        self._kept = kept
        self._packer = packer
        self._compared: tuple[Tensor, Tensor, Sequence[Kept] | None] | None = None

    @property
    def then(self) -> list[Tensor]:
        """Return the tensors of the reference call, unpacked if they are kept in fewer bytes."""
        return [unpack(t) if isinstance(t, Packed) else t for t in self._kept]

    @property
    def moved(self) -> Tensor:
        """Return the mean absolute difference of ``now`` and ``then`` over all elements: float32 or float64, 0-d."""
        return self._compare()[0]

    @property
    def level(self) -> Tensor:
        """Return the mean absolute value of ``then`` over all elements: float32 or float64, 0-d."""
        return self._compare()[1]

    @property
    def packed(self) -> Sequence[Kept] | None:
        """Return ``now`` in the format of the store if the comparison has made it, else None."""
        return None if self._compared is None else self._compared[2]

    def _compare(self) -> tuple[Tensor, Tensor, Sequence[Kept] | None]:
        """Return the values of ``moved``, ``level`` and ``packed``. They are computed once."""
        if self._compared is None:
            self._compared = self._in_one_pass()
        return self._compared

    def _in_one_pass(self) -> tuple[Tensor, Tensor, Sequence[Kept] | None]:
        """Compare ``now`` with ``then``. If all of ``then`` is packed, the same pass packs ``now``."""
        if any(isinstance(t, Tensor) for t in self._kept):
            then = self.then
            return distance(self.now, then), size(then), None
        found = [
            (*pack_again(n, t, self._packer.backend),)
            for n, t in zip(self.now, self._kept, strict=True)
            if isinstance(t, Packed)
        ]
        moved, level = (_mean([sums[k] for _, sums in found], self.now) for k in range(2))
        return moved, level, [packed for packed, _ in found]


class Memory:
    """The tensors that a criterion keeps between the calls of one branch. A new run begins with an empty memory.

    Tensors passed to ``keep`` are held by the store of the run and count as its memory. ``numbers`` holds tensors of
    one element, which do not count.

    Args:
        store: The store of the run.
        denoiser: The name of the denoiser.
        branch: The branch of guidance.
    """

    def __init__(self, store: Store, denoiser: str, branch: int) -> None:
        self.numbers: dict[str, Tensor] = {}
        self._store, self._denoiser, self._branch = store, denoiser, branch

    def keep(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep copies of ``tensors`` under ``name`` in place of those kept before."""
        self.put(name, tensors, [AS_IT_IS.keep(t) for t in tensors])

    def kept(self, name: str, like: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the tensors under ``name``; None if they have not the shapes, dtypes and devices of ``like``."""
        anchor = self.anchor(name)
        if anchor is None or anchor.signature != signature(like):
            return None
        return [t for t in anchor.kept if isinstance(t, Tensor)]

    def anchor(self, name: str) -> Anchor | None:
        """Return the anchor under ``name``, in the form of the store; None if there is none."""
        return self._store.get(self._key(name), 0)

    def put(self, name: str, tensors: Sequence[Tensor], kept: Sequence[Kept]) -> None:
        """Keep ``tensors`` under ``name``.

        Args:
            name: The name.
            tensors: The tensors, which give the form and the signature.
            kept: The same tensors in the form of the store.
        """
        anchor = Anchor(Output.of(tuple(tensors)).form(), tuple(kept), (), signature(tensors))
        self._store.put(self._key(name), 0, anchor)

    def _key(self, name: str) -> tuple[str, str, int]:
        """Return the key of ``name`` in the store."""
        return self._denoiser, f"online: {name}", self._branch


def distance(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference over all elements: float32, or float64 if an input is float64; 0-d."""
    pairs = [(_exact(a), _exact(b)) for a, b in zip(now, then, strict=True)]
    return _mean([(a - b).abs().sum() for a, b in pairs], now)


def size(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute value over all elements: float32, or float64 if an input is float64; 0-d."""
    return _mean([_exact(t).abs().sum() for t in tensors], tensors)


def _mean(sums: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``sums`` divided by the number of elements of ``of``, 0-d."""
    return torch.stack(list(sums)).sum() / sum(t.numel() for t in of)


def _exact(t: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
