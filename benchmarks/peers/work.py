"""How much of a run was really computed, whatever a cache says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffcache.host import find_sites


@dataclass(slots=True)
class Work:
    """What ran inside the denoiser's blocks.

    calls  by linear layer: how often it ran
    madds  by linear layer: its multiply-adds, so that half a batch counts half

    Attention's own products are left out (6 % of a block here): they go with the projections on both sides of them.
    """

    calls: Counter[str] = field(default_factory=Counter)
    madds: Counter[str] = field(default_factory=Counter)

    def computed(self, full: Work, steps: int) -> float:
        """As many full steps of ``steps`` as would have been the same work; ``full`` is a run without cache."""
        return steps * self.madds.total() / full.madds.total()

    def complete(self, full: Work, steps: int) -> float:
        """Steps at which everything ran: those of the layer that ran least."""
        return min(steps * self.calls[name] / calls for name, calls in full.calls.items())


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Work]:
    """Counts while the block lasts.

    Seen are the calls of ``linear`` itself with a weight of a block. Forward hooks would not do: they also fire for a
    module whose forward a cache has replaced.
    """
    work = Work()
    blocks = {site: modules for site, modules in find_sites(denoiser).items() if site.startswith("block:")}
    weights = {
        id(layer.weight): f"{site}.{path}"
        for site, (block,) in blocks.items()
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    with _Watch(weights, work):
        yield work


class _Watch(TorchFunctionMode):
    def __init__(self, weights: dict[int, str], work: Work) -> None:
        super().__init__()
        self._weights, self._work = weights, work

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            name = self._weights.get(id(args[1]))
            if name is not None and isinstance(result, Tensor):
                self._work.calls[name] += 1
                self._work.madds[name] += result.numel() * args[0].shape[-1]
        return result
