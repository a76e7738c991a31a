"""Which modules get our layers, and how these stay on top of strangers'."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from diffcache.executor.checks import entry_point
from diffcache.patch import Around, Undo, layer, on_top
from diffcache.schedule import CacheSchedule


@dataclass(slots=True)
class Patch:
    """One of our layers. ``module`` is weak: a denoiser must not be kept alive by what is layered on it."""

    module: weakref.ref[nn.Module]
    around: Around
    off: Undo = lambda: None

    def put(self) -> None:
        """On top of whatever a call of the module runs, unless it is there. Strangers who give a module the forward
        back that they found (model offloading does, after every run) take ours off with it."""
        module = self.module()
        if module is not None and not on_top(module, entry_point(module), self.around):
            self.off()
            self.off = layer(module, entry_point(module), self.around)


def patched(schedule: CacheSchedule, denoiser: str) -> tuple[str, ...]:
    """The sites of ``denoiser`` that get a layer. The root always does: it says when a forward begins."""
    plan = schedule.denoisers.get(denoiser)
    return ("model", *(site for site in plan.sites if site != "model")) if plan else ("model",)
