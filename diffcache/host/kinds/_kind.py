"""Define the interface of a kind of host, and of the watch on its loops."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from diffcache.errors import BadOption, UnsupportedModel
from diffcache.host.arguments import Parameters
from diffcache.host.own_loops import Clock
from diffcache.host.traits import Traits
from diffcache.patch import Undo

if TYPE_CHECKING:
    from diffcache.host.loop_run import LoopRun
    from diffcache.host.watcher import LoopWatcher


class LoopWatch(ABC):
    """Finds out where the sampling loop of one host begins and ends, and reports it to a ``LoopWatcher``.

    A watch calls ``watcher.open(scheduler, start)`` when a loop begins and ``watcher.close()`` when it ends. Between
    the two, ``watcher.step`` is a wrapper for the method that ends each step. If the loop steps no noise scheduler,
    pass a ``Clock`` with one timestep for each forward; set ``watcher.run.result`` to the last state unless the call of
    the host returns it. All state of a run belongs to the thread
    that runs the loop: keep yours in ``self.local``.

    Args:
        watcher: The watcher that it reports to.
    """

    def __init__(self, watcher: LoopWatcher) -> None:
        self.watcher = watcher
        self.local = threading.local()

    @property
    def host(self) -> Any:
        """Return the host, which is held weakly."""
        return self.watcher.pipe

    @abstractmethod
    def attach(self) -> Iterator[Undo]:
        """Wrap the methods that show where the loop begins and ends. Yield the function that undoes each wrapper."""

    def opened(self, run: LoopRun) -> Iterator[Undo]:
        """Wrap the methods that show the steps of ``run``, which has just begun.

        Yield the function that undoes each wrapper.
        """
        yield from ()

    def enter(self) -> None:  # noqa: B027 - most kinds open the loop before its first forward
        """Open the loop whose first forward is beginning, if the watch waits for one."""

    def outside(self) -> None:  # noqa: B027 - not a fault in every kind
        """Report a forward of a denoiser outside of every loop, if it is a mistake of the user."""

    def detach(self) -> None:  # noqa: B027 - most kinds add no wrappers beyond those of ``attach``
        """Undo the wrappers of runs in progress."""


class Kind(ABC):
    """A kind of host: a diffusers pipeline, a diffusion policy, a loop written by the user, ….

    A kind has no state. One instance serves every host of its kind, and each method takes the host. A host is an object
    that runs its loop when it is called with keyword arguments, ``host(**call)``, and that can be weakly referenced.

    Attributes:
        traits: The facts about the kind that evaluation and recording use.
        allowed: The description of the kind in the error for an unsupported object.
        example: Code that makes ``calls``, for errors.
        fallback: Whether the kind takes objects that other kinds may recognise, and is tried last.
    """

    traits: ClassVar[Traits]
    allowed: ClassVar[str]
    example: ClassVar[str]
    fallback: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, value: Any) -> bool:
        """Return whether ``value`` is a host of this kind, or an object that ``adopt`` makes one of."""

    def adopt(self, value: Any, *, bare: bool = False) -> Any:
        """Return the host for an object that the user passed.

        Args:
            value: An object that this kind recognises.
            bare: Return the one host that is registered for the object and does not keep it alive.
        """
        return value

    @abstractmethod
    def denoisers(self, host: Any) -> dict[str, nn.Module]:
        """Return the networks that the loop calls at every step, by component name.

        Raises:
            UnsupportedModel: If the host has none, or none that can be skipped.
        """

    @abstractmethod
    def watch(self, watcher: LoopWatcher) -> LoopWatch:
        """Return the watch that shows ``watcher`` the loop of its host."""

    @abstractmethod
    def arguments(self, host: Any) -> Parameters | None:
        """Return the arguments that a call of the host may have, by name; None if it takes any."""

    def check_callable(self, host: Any) -> None:
        """Raise BadOption if the host cannot be called as ``host(**call)``, as measuring and evaluating it do."""
        if not callable(host):
            raise BadOption(
                "pipe", type(host).__name__, "an object that runs its loop as pipe(**call): define __call__"
            )

    def check_values(self, call: Mapping[str, Any], where: str) -> None:  # noqa: B027 - by default all are allowed
        """Raise BadOption for a value in ``call`` that the host cannot use.

        Args:
            call: Arguments of the host by name. The host has arguments of these names.
            where: The name of the dictionary in errors.
        """

    def noise_of(self, host: Any, seed: int) -> Mapping[str, Any]:
        """Return the arguments that make a call begin with the noise of ``seed``; by default there are none."""
        return {}

    def repeats(self, call: Mapping[str, Any]) -> bool:
        """Return whether two runs with these arguments begin with the same noise."""
        return True

    def steps_asked(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return the number of steps that a call asks for, or None if only a run shows it."""
        return None

    def iterations(self, host: Any, call: Mapping[str, Any]) -> int | None:
        """Return the iterations that a call takes, or None if only a run shows it."""
        return None

    def guidance(self, host: Any) -> dict[str, float | None]:
        """Return the guidance settings of the run in progress, by the name of the argument or attribute."""
        return {}

    def noise_scheduler(self, host: Any) -> Any:
        """Return the noise scheduler that the loop steps, or a ``Clock`` if each forward is a step."""
        return Clock()

    @abstractmethod
    def parts(self, host: Any) -> Mapping[str, Any]:
        """Return the parts whose digests identify the host, by name."""

    def settings(self, host: Any) -> Mapping[str, Any] | None:
        """Return the settings that results depend on, next to the parts; None for all public attributes."""
        return None


def unsupported(value: Any) -> UnsupportedModel:
    """Return the error for an object that no kind can accelerate."""
    from diffcache.host.kinds import kinds  # the folder imports this file

    *others, last = dict.fromkeys(kind.allowed for kind in kinds())
    return UnsupportedModel(
        f"accelerate was asked for a {type(value).__name__}. Allowed: {', '.join(others)}, or {last}."
    )
