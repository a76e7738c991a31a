"""What a peer is.

A peer is one setting of one cache of one package. ``peer.on(pipe, steps)`` switches it on with the package's own calls.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

Switch = Callable[[Any, int, bool], Callable[[], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One setting of somebody else's cache.

    name     the cache, as its package calls it
    package  the distribution that brings it
    setting  what a user of the package would set, in its own words
    models   the families of demo models it is measured on
    switch   (pipeline, steps, separate_cfg) -> off: switches on with the package's own calls, returns what switches
             off again
    note     what a reader has to know to judge the row
    """

    name: str
    package: str
    setting: str
    models: tuple[str, ...]
    switch: Switch
    note: str = ""

    @property
    def version(self) -> str:
        """The installed version; "" if the package is missing."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    @contextmanager
    def on(self, pipe: Any, steps: int, *, separate_cfg: bool = False) -> Iterator[None]:
        """Switch this cache on, and restore ``pipe`` afterwards.

        Args:
            pipe: The pipeline.
            steps: Steps of the runs.
            separate_cfg: Whether a step computes the branches of guidance in separate forwards.
        """
        with untouched(pipe), ExitStack() as undo:
            undo.callback(self.switch(pipe, steps, separate_cfg))
            yield


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Puts back every attribute of the pipeline, its class, its transformer and the modules in it.

    The packages' own off switches leave things behind. cache-dit: a forward of its own on the transformer, and on DiT a
    second entry of the embedder among the modules. diffusers: empty registries and forwards bound to the object.
    """
    modules = list(pipe.transformer.modules())
    attributes = [(owner, dict(vars(owner))) for owner in (pipe, *modules)]
    children = [(module, dict(module._modules)) for module in modules]
    kind = type(pipe)
    of_class = dict(vars(kind))
    try:
        yield
    finally:
        for owner, kept in attributes:
            vars(owner).clear()
            vars(owner).update(kept)
        for module, named in children:
            module._modules.clear()
            module._modules.update(named)
        for name in vars(kind).keys() - of_class.keys():
            delattr(kind, name)
        for name, value in of_class.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)
