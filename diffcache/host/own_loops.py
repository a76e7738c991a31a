"""Sampling loops that are not a diffusers pipeline: the loop of a policy, or one written by the user.

A :class:`Loop` has the parts of a pipeline that the rest of the package uses: it has components and a noise scheduler,
and it can be called. ``begin`` and ``end`` are called around the loop. A ``LoopWatcher`` layers them, as it layers the
progress bar of a pipeline.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diffcache.errors import BadOption, ScheduleMismatch, UnsupportedModel, Unusable
from diffcache.patch import BoundMethod, weak

Part = nn.Module | BoundMethod
MARK = "_diffcache"  # attribute of an accelerated pipeline, or loop


class Clock:
    """Takes the place of a noise scheduler in a loop that steps none, so that forwards of the network are counted.

    Attributes:
        timesteps: The names of the steps, [T].
        branches: The number of forwards in each step.
        config: The settings that a schedule is compared with, like the configuration of a noise scheduler.
        moves: float64 [T, 2], the update of each step as a recording measured it: x becomes a · x + b · F. None without
            a recording.
    """

    def __init__(
        self,
        timesteps: Tensor | None = None,
        branches: int = 1,
        *,
        moves: Tensor | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.timesteps = torch.zeros(0) if timesteps is None else timesteps
        self.branches, self.moves = branches, moves
        self.config = dict(config or {})

    counts_forwards = True  # no noise scheduler ends the steps of the loop

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the state after step number ``timestep``, by the recorded ``moves``. Loops never call it."""
        if self.moves is None:
            raise RuntimeError("this loop has not been recorded")
        a, b = self.moves[timestep].tolist()
        return (a * sample + b * model_output,)


class Loop:
    """The loop that calls ``network`` at every step.

    The loop has to show where it begins and ends: ``with diffcache.trajectory(network, timesteps)``.

    Args:
        network: The denoiser, which ``diffcache.accelerate`` layers.
        sample: Runs the loop. Calibration and evaluation call it as ``loop(seed=…, **arguments)``. None if the loop is
            only to be accelerated.
        scheduler: The diffusers noise scheduler that the loop steps. None: forwards are counted.

    Raises:
        BadOption: ``network`` is not an ``nn.Module``, or ``sample`` is not callable.

    Example:
        >>> def sample(prompt, steps=28):
        ...     x, timesteps = torch.randn(1, 16, 64, 64), torch.linspace(1, 1 / steps, steps)
        ...     with diffcache.trajectory(network, timesteps):
        ...         for t in timesteps:
        ...             x = x - network(x, t, prompt) / steps
        ...     return x
        >>> loop = diffcache.Loop(network, sample)
        >>> schedule = diffcache.optimize(loop, [{"seed": seed, "prompt": p} for seed, p in enumerate(prompts)], 10)
    """

    name = "network"
    _shared_clock: Clock
    _thread_state: threading.local

    def __init__(self, network: Part, sample: Callable[..., Any] | None = None, *, scheduler: Any = None) -> None:
        if sample is not None and not callable(sample):
            raise BadOption("sample", type(sample).__name__, "a function that runs the loop, or None")
        if not isinstance(network, (nn.Module, BoundMethod)):
            raise BadOption("network", type(network).__name__, "an nn.Module that the loop calls at every step")
        self._network: Callable[[], Any] = lambda: network
        self._sample, self._scheduler = sample, scheduler
        registered = registered_loop(network)
        self._shared_clock, self._thread_state = registered._shared_clock, registered._thread_state
        if scheduler is not None:
            registered._scheduler = scheduler

    @property
    def network(self) -> Any:
        """Return the denoiser."""
        return self._network()

    @property
    def scheduler(self) -> Any:
        """Return the noise scheduler that the loop steps, or a ``Clock`` if forwards are counted."""
        return self._shared_clock if self._scheduler is None else self._scheduler

    @property
    def sampler(self) -> Callable[..., Any] | None:
        """Return the function that runs the loop, or None if there is none."""
        return self._sample

    @property
    def registered(self) -> Loop:
        """Return the loop that is registered for the network. ``trajectory`` calls its ``begin`` and ``end``.

        Several ``Loop`` objects may be made for one network; one loop is registered for all of them.
        """
        return registered_loop(self.network)

    @property
    def components(self) -> dict[str, Any]:
        """Return the network and the noise scheduler by name, like the components of a pipeline."""
        return {self.name: self.network, "scheduler": self.scheduler}

    @property
    def shown(self) -> Any:
        """Return the object that messages name: the loop."""
        return self

    @property
    def inside(self) -> bool:
        """Return whether this thread is between ``begin`` and ``end``."""
        return getattr(self._thread_state, "inside", False)

    def begin(self, timesteps: Tensor | None = None, branches: int = 1) -> None:
        """Begin the loop.

        The noise scheduler may get its timesteps after this call, but before the first forward.

        Args:
            timesteps: The names of the steps, [T], if forwards are counted.
            branches: The number of forwards in each step.
        """
        self._thread_state.inside = True

    def end(self, result: Any = None, broken: bool = False) -> None:
        """End the loop.

        Args:
            result: The last state, if it is known.
            broken: Whether an exception ended the loop.
        """
        self._thread_state.inside = False

    def __call__(self, *, seed: int | None = None, **arguments: Any) -> Any:
        """Run the loop.

        Args:
            seed: Seeds torch's global generators for this call. Their states are restored afterwards.
            arguments: Arguments of ``sample``.
        """
        if seed is None:
            return self.sample(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.sample(**arguments)

    def sample(self, **arguments: Any) -> Any:
        """Run the loop with the function that it was made with.

        Raises:
            BadOption: The loop was made without that function.
        """
        if self._sample is None:
            raise BadOption("sample", None, "a function that runs the loop: diffcache.Loop(network, sample)")
        return self._sample(**arguments)

    def __getattr__(self, name: str) -> Any:
        """Return the network under its component name."""
        if name == self.name:
            return self.network
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class RegisteredLoop(Loop):
    """The one loop that is registered for a network. It does not keep the network alive."""

    def __init__(self, network: Part) -> None:
        self._network = weak(network)
        self._sample = self._scheduler = None
        self._shared_clock, self._thread_state = Clock(), threading.local()

    @property
    def shown(self) -> Any:
        """Return the network: users pass it, or a :class:`Loop` around it."""
        return self.network


# A network or a policy -> its registered loop. The entry disappears with the network.
LOOPS: weakref.WeakKeyDictionary[Any, Loop] = weakref.WeakKeyDictionary()


def registered_loop(network: Part) -> Loop:
    """Return the loop that is registered for a network. Register one if there is none."""
    if network not in LOOPS:
        LOOPS[network] = RegisteredLoop(network)
    return LOOPS[network]


@contextlib.contextmanager
def trajectory(network: nn.Module, timesteps: Sequence[float] | Tensor, *, branches: int = 1) -> Iterator[None]:
    """Mark one run of a sampling loop of your own: forwards of ``network`` within the block are counted.

    Without ``accelerate`` it changes nothing.

    Args:
        network: The denoiser, an ``nn.Module``.
        timesteps: [T], one for every evaluation of the model, in order. A two-stage solver has two for each of its
            steps.
        branches: The number of forwards without a name for each of them: 2 if guidance runs the network with the prompt
            and without, one after the other. It is 1 with both in one batch, or with names (:func:`branch`).

    Raises:
        BadOption: An argument is out of range.
        ScheduleMismatch: The schedule was made for another loop, or the network was accelerated before it was compiled.
        UnsupportedModel: The network is called more often than ``timesteps`` and ``branches`` allow, forwards without a
            name may have been taken for those of another branch, or another trajectory of the network is in progress.

    Example:
        >>> network = diffcache.accelerate(network, "taylorseer:every=3,order=1")
        >>> with diffcache.trajectory(network, timesteps):
        ...     for t in timesteps:
        ...         x = step(x, network(x, t), t)
    """
    if not isinstance(network, nn.Module):
        raise BadOption("network", type(network).__name__, "an nn.Module that the loop calls at every step")
    try:
        grid = torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError):
        raise BadOption("timesteps", f"{timesteps!r:.80}", "one number for every evaluation, [T]") from None
    if grid.ndim != 1 or not len(grid):
        raise Unusable(
            "timesteps",
            f"it is a tensor of shape {list(grid.shape)}",
            "Pass one number for each evaluation, shape [T]",
        )
    if grid.device.type == "cpu" and not bool(grid.isfinite().all()):  # reading another device would wait for it
        raise BadOption("timesteps", f"{timesteps!r:.80}", "finite numbers")
    if not isinstance(branches, Integral) or isinstance(branches, bool) or branches < 1:
        raise BadOption("branches", branches, "a whole number, 1 or more")
    loop = registered_loop(network)
    compiled = LOOPS.get(network._orig_mod) if hasattr(network, "_orig_mod") else None
    if compiled is not None and MARK in compiled.__dict__ and MARK not in loop.__dict__:
        raise ScheduleMismatch(
            f"this {type(network._orig_mod).__name__} was accelerated, and trajectory was given its compiled "
            "form, in which no step would be skipped. Compile first, accelerate last: accelerate what torch.compile "
            "returned."
        )
    if loop.inside:
        raise UnsupportedModel(
            f"a trajectory of this {type(network).__name__} was begun within another. Allowed: one after the other; "
            "two solvers at a time need a network each."
        )
    broken = True
    try:
        loop.begin(grid, branches)
        yield
        broken = False
    finally:
        loop.end(None, broken)
