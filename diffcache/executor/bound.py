"""The object that a caller accelerates, measures or corrects, with its networks, their sites and its executor."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from diffcache import host
from diffcache.errors import AcceleratedObjectCopied
from diffcache.executor.checks import Sites
from diffcache.executor.engine import Executor
from diffcache.host.structure import find_sites
from diffcache.patch import refusal
from diffcache.presets import NetworkFacts


class Acceleration(Protocol):
    """Accelerates one pipeline: an ``Executor``, or a ``TokenCache`` for a language model."""

    def attach(self) -> None:
        """Put the layers on the pipeline."""

    def detach(self) -> None:
        """Remove the layers from the pipeline, and drop every kept tensor."""


class Mark:
    """The attribute of an accelerated pipeline that holds its executor.

    A copy of the pipeline would share its layers. Therefore a deep copy and a pickle of the mark are refused.

    Args:
        executor: The executor. Its layers are on the pipeline.
        loop: The pipeline. When it is freed, the layers are removed, because another pipeline may use its denoiser.
    """

    def __init__(self, executor: Acceleration, loop: Any) -> None:
        self.executor = executor
        self.class_name = type(loop).__name__
        self.detach = weakref.finalize(loop, executor.detach)  # detaches once, when called or when the loop is freed
        self.detach.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        raise AcceleratedObjectCopied(refusal(self.class_name, "deep copy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AcceleratedObjectCopied(refusal(self.class_name, "pickle"))


@dataclass(frozen=True)
class Bound:
    """An object that was given as a pipeline, and the facts about it that the entry points share.

    Its networks and sites are looked up when they are first used, and the executor at every use.

    Attributes:
        pipe: The object to treat as a pipeline: a diffusers pipeline, the loop of a policy, or a ``Loop``.
        loop: The object that holds the executor. It is ``pipe``, except for policies and networks: all loops of one of
            these share one object, which keeps neither alive.
    """

    pipe: Any
    loop: Any

    @classmethod
    def of(cls, pipe: Any, *, bare: bool = False) -> Bound:
        """Return the bound pipeline of the object that a caller passed.

        Args:
            pipe: Any object. One that cannot be accelerated raises an error when its networks are looked up.
            bare: Whether ``loop`` is to be treated as the pipeline. It cannot be called, but a network has one, and a
                policy is not kept alive.
        """
        loop = host.adopted(pipe, bare=True)
        return cls(loop if bare else host.adopted(pipe), loop)

    @cached_property
    def denoisers(self) -> dict[str, nn.Module]:
        """Return the networks that the pipeline calls at every step, by component name.

        Raises:
            UnsupportedModel: The object cannot be accelerated.
        """
        return host.denoisers(self.pipe)

    @cached_property
    def sites(self) -> Sites:
        """Return the modules of every site of every network.

        Raises:
            UnsupportedModel: The object cannot be accelerated.
        """
        return {name: find_sites(module) for name, module in self.denoisers.items()}

    @property
    def site_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the sites of every network."""
        return {name: tuple(found) for name, found in self.sites.items()}

    @cached_property
    def networks(self) -> dict[str, NetworkFacts]:
        """Return the facts about the networks, by component name."""
        return host.network_facts(self.pipe, {name: found["model"][0] for name, found in self.sites.items()})

    @property
    def acceleration(self) -> Acceleration | None:
        """Return what accelerates the pipeline, or None if it is not accelerated."""
        mark = getattr(self.loop, "__dict__", {}).get(host.MARK)
        return None if mark is None else mark.executor

    @property
    def executor(self) -> Executor | None:
        """Return the executor that accelerates the pipeline, or None if there is none."""
        found = self.acceleration
        return found if isinstance(found, Executor) else None

    def attach(self, executor: Acceleration) -> None:
        """Accelerate the pipeline with ``executor``."""
        executor.attach()
        self.loop.__dict__[host.MARK] = Mark(executor, self.loop)

    def detach(self) -> bool:
        """Stop accelerating the pipeline. Return whether it was accelerated."""
        mark = getattr(self.loop, "__dict__", {}).pop(host.MARK, None)
        if mark is None:
            return False
        mark.detach()
        return True
