"""Record how the denoisers of a pipeline are built and wrapped at ``accelerate``, and check that it has not changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from diffcache.errors import ScheduleMismatch
from diffcache.host.forwards import calls_on, compiled_with_layers, outermost, own
from diffcache.host.guard import parts
from diffcache.host.inspection import host_name
from diffcache.patch import weak

Sites = Mapping[str, Mapping[str, tuple[nn.Module, ...]]]  # denoiser -> site -> modules
Edge = tuple[Callable[[], Any], str, Callable[[], Any]]  # module, name of a child, child
AGAIN = "Call diffcache.restore(pipe), then accelerate it as it is: compile first, accelerate last."


class Wrapping:
    """The sites of a pipeline's denoisers, and the wrappers around their forwards, at the time of ``accelerate``.

    It holds the classes of modules and weak references to the modules.

    On a transformer of FLUX.1's structure (57 blocks, 1,275 modules) ``demand_unchanged`` takes about 0.1 ms on one CPU
    core.

    Args:
        pipe: The pipeline.
        sites: Denoiser -> site -> the modules of the site.

    Raises:
        ScheduleMismatch: ``torch.compile`` compiled the forward of a site while diffcache's layers were on it.
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
        """Return the denoisers that were accelerated and still exist, by name."""
        return {name: part for name, root in self._roots.items() if (part := root()) is not None}

    def demand_unchanged(self, pipe: Any) -> None:
        """Raise ScheduleMismatch if a denoiser, a block or a forward was replaced since ``accelerate``.

        Wrappers that call the forward that they replace are accepted: hooks for offloading and casting, and wrappers of
        the user. Adapters, which replace layers inside the blocks, are accepted too.
        """
        for name, root in self._roots.items():
            here = getattr(pipe, name, None)
            if here is not None and here is not root():
                raise ScheduleMismatch(
                    f"{name!r} of this {host_name(pipe)} is another object than when it was accelerated (now: "
                    f"{type(here).__name__}); it would run without the cache. {AGAIN}"
                )
        for name, edges in self._edges.items():
            for owner, key, child in edges:
                module = owner()
                if module is not None and module._modules.get(key) is not child():
                    raise ScheduleMismatch(
                        f"part {key!r} of a {type(module).__name__} in {name!r} of this {host_name(pipe)} is "
                        f"another object than when it was accelerated. {AGAIN}"
                    )
        for kind, forward in self._kinds.items():
            if kind.forward is not forward:
                raise ScheduleMismatch(
                    f"the forward of class {kind.__name__} was replaced since this {host_name(pipe)} was "
                    f"accelerated, as forks of TeaCache do. {AGAIN}"
                )
        for name, references in self._parts.items():
            for reference in references:
                self._demand_forward(pipe, name, reference())

    def _demand_forward(self, pipe: Any, name: str, module: nn.Module | None) -> None:
        """Raise ScheduleMismatch if the forward of one module was replaced by a function that does not call it."""
        if module is None or "forward" not in module.__dict__:
            return
        top = outermost(module)
        if top is None or own(module, top) or any(known() is top for known in self._known):
            return
        self._demand_not_compiled(pipe, name, module)
        if not calls_on(module):
            raise ScheduleMismatch(
                f"the forward of a {type(module).__name__} in {name!r} of this {host_name(pipe)} was replaced "
                f"since it was accelerated (now: {_name(top)}). {AGAIN}"
            )
        self._accept(top)

    def _demand_not_compiled(self, pipe: Any, name: str, module: nn.Module) -> None:
        """Raise ScheduleMismatch if ``torch.compile`` compiled a module's forward with diffcache's layers on it."""
        if compiled_with_layers(module):
            raise ScheduleMismatch(
                f"the forward of a {type(module).__name__} in {name!r} of this {host_name(pipe)} was compiled "
                "while it was accelerated: the compiled graph holds the cache. Call diffcache.restore(pipe), put the "
                "plain forward back, then compile first, accelerate last."
            )

    def _accept(self, function: Any) -> None:
        """Remember a function that may stand in a module's ``forward``."""
        if function is not None:
            try:
                self._known.append(weakref.ref(function))
            except TypeError:  # an object without weak references is checked again at every run
                return


def _edges(root: nn.Module, wanted: set[int]) -> Iterator[Edge]:
    """Yield the edges (module, name of a child, child) to wanted modules and to the lists that hold them.

    Args:
        root: The denoiser.
        wanted: The ids of the modules of its sites.
    """
    for owner in parts(root):
        for key, child in owner._modules.items():
            listed = isinstance(child, nn.ModuleList) and any(id(m) in wanted for m in child._modules.values())
            if child is not None and (id(child) in wanted or listed):
                yield weakref.ref(owner), key, weakref.ref(child)


def _name(function: Any) -> str:
    """Return the qualified name of a function, or of the class of a callable object."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
