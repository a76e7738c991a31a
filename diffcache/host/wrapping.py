"""How the denoisers of a pipeline were built and wrapped when it was accelerated, and whether that has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from diffcache.errors import ScheduleMismatch
from diffcache.host.forwards import calls_on, compiled_with_layers, outermost, own
from diffcache.host.guard import parts
from diffcache.patch import weak

Sites = Mapping[str, Mapping[str, tuple[nn.Module, ...]]]  # denoiser -> site -> modules
Edge = tuple[Callable[[], Any], str, Callable[[], Any]]  # module, name of a child, child
AGAIN = "Call diffcache.restore(pipe), then accelerate it as it is: compile first, accelerate last."


class Wrapping:
    """What the sites of a pipeline's denoisers are, and what stands around their forwards.

    It holds the classes of modules and weak references to the modules.

    On a transformer of FLUX.1's structure (57 blocks, 1,275 modules) ``demand_unchanged`` takes about 0.1 ms on one CPU
    core.
    """

    def __init__(self, pipe: Any, sites: Sites) -> None:
        self._roots = {name: weak(modules["model"][0]) for name, modules in sites.items()}
        self._edges: dict[str, list[Edge]] = {}
        self._parts: dict[str, list[Callable[[], Any]]] = {}
        self._known: list[Callable[[], Any]] = []
        self._kinds: dict[type[nn.Module], Any] = {}
        for name, found in sites.items():
            of_sites = {id(m): m for modules in found.values() for m in modules if isinstance(m, nn.Module)}
            root = found["model"][0]
            if isinstance(root, nn.Module):
                self._edges[name] = list(_edges(root, set(of_sites)))
            self._parts[name] = [weakref.ref(module) for module in of_sites.values()]
            for module in of_sites.values():
                self._kinds[type(module)] = type(module).forward
                self._demand_not_compiled(pipe, name, module)
                self._accept(outermost(module))

    @property
    def denoisers(self) -> dict[str, Any]:
        """The denoisers as they were accelerated, as long as they exist."""
        return {name: part for name, root in self._roots.items() if (part := root()) is not None}

    def demand_unchanged(self, pipe: Any) -> None:
        """Raise ScheduleMismatch if a denoiser, a block or a forward was replaced since ``accelerate``.

        Wrappers that call what they found are accepted: hooks for offloading and casting, a user's own. So are
        adapters, which replace layers inside the blocks.
        """
        for name, root in self._roots.items():
            here = getattr(pipe, name, None)
            if here is not None and here is not root():
                raise ScheduleMismatch(
                    f"{name!r} of this {type(pipe).__name__} is another object than when it was accelerated (now: "
                    f"{type(here).__name__}); it would run without the cache. {AGAIN}"
                )
        for name, edges in self._edges.items():
            for owner, key, child in edges:
                module = owner()
                if module is not None and module._modules.get(key) is not child():
                    raise ScheduleMismatch(
                        f"part {key!r} of a {type(module).__name__} in {name!r} of this {type(pipe).__name__} is "
                        f"another object than when it was accelerated. {AGAIN}"
                    )
        for kind, forward in self._kinds.items():
            if kind.forward is not forward:
                raise ScheduleMismatch(
                    f"the forward of class {kind.__name__} was replaced since this {type(pipe).__name__} was "
                    f"accelerated, as forks of TeaCache do. {AGAIN}"
                )
        for name, references in self._parts.items():
            for reference in references:
                self._demand_forward(pipe, name, reference())

    def _demand_forward(self, pipe: Any, name: str, module: nn.Module | None) -> None:
        if module is None or "forward" not in module.__dict__:
            return
        top = outermost(module)
        if top is None or own(module, top) or any(known() is top for known in self._known):
            return
        self._demand_not_compiled(pipe, name, module)
        if not calls_on(module):
            raise ScheduleMismatch(
                f"the forward of a {type(module).__name__} in {name!r} of this {type(pipe).__name__} was replaced "
                f"since it was accelerated (now: {_name(top)}). {AGAIN}"
            )
        self._accept(top)

    def _demand_not_compiled(self, pipe: Any, name: str, module: nn.Module) -> None:
        if compiled_with_layers(module):
            raise ScheduleMismatch(
                f"the forward of a {type(module).__name__} in {name!r} of this {type(pipe).__name__} was compiled "
                "while it was accelerated: the compiled graph holds the cache. Call diffcache.restore(pipe), put the "
                "plain forward back, then compile first, accelerate last."
            )

    def _accept(self, function: Any) -> None:
        if function is not None:
            try:
                self._known.append(weakref.ref(function))
            except TypeError:  # an object without weak references is looked at again at every run
                return


def _edges(root: nn.Module, wanted: set[int]) -> Iterator[Edge]:
    """Yield where the ``wanted`` modules hang, and the lists that they hang in."""
    for owner in parts(root):
        for key, child in owner._modules.items():
            listed = isinstance(child, nn.ModuleList) and any(id(m) in wanted for m in child._modules.values())
            if child is not None and (id(child) in wanted or listed):
                yield weakref.ref(owner), key, weakref.ref(child)


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
