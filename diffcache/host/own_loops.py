"""Sampling loops that are no diffusers pipeline's: a policy's, or anybody's own.

A :class:`Loop` is such a loop in a pipeline's clothes: it has components, a noise scheduler and can be called. What
a pipeline's progress bar says, ``begin`` and ``end`` do: they are called around the loop, and whoever watches it layers
them.
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

from diffcache.errors import BadOption, ScheduleMismatch, UnsupportedModel
from diffcache.patch import BoundMethod, weak

Part = nn.Module | BoundMethod
MARK = "_diffcache"  # attribute of an accelerated pipeline, or loop


class Clock:
    """Stands where a noise scheduler would in a loop that steps by itself: forwards of the network are counted.

    timesteps  [T], names of the steps
    branches   forwards in each of them
    config     what a schedule is compared by, as of a noise scheduler
    moves      [T, 2], what the loop does at each of them as far as a recording told: x becomes a · x + b · F
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
        """The state after step number ``timestep``, as the recorded loop would have made it. Loops never call it."""
        if self.moves is None:
            raise RuntimeError("this loop has not been recorded")
        a, b = self.moves[timestep].tolist()
        return (a * sample + b * model_output,)


class Loop:
    """The loop that calls ``network`` at every step.

    network    the denoiser: ``diffcache.accelerate`` layers it
    sample     runs the loop: what calibration and evaluation call, ``loop(seed=…, **arguments)``; None: it is only
               accelerated
    scheduler  the diffusers noise scheduler that the loop steps; None: forwards are counted

    The loop itself has to say where it begins and ends: ``with diffcache.trajectory(network, timesteps)``.
    """

    name = "network"
    _clock: Clock
    _thread: threading.local

    def __init__(self, network: Part, sample: Callable[..., Any] | None = None, *, scheduler: Any = None) -> None:
        if sample is not None and not callable(sample):
            raise BadOption("sample", type(sample).__name__, "a function that runs the loop, or None")
        if not isinstance(network, (nn.Module, BoundMethod)):
            raise BadOption("network", type(network).__name__, "an nn.Module that the loop calls at every step")
        self._network: Callable[[], Any] = lambda: network
        self._sample, self._scheduler = sample, scheduler
        standing = loop_of(network)
        self._clock, self._thread = standing._clock, standing._thread
        if scheduler is not None:
            standing._scheduler = scheduler

    @property
    def network(self) -> Any:
        return self._network()

    @property
    def scheduler(self) -> Any:
        return self._clock if self._scheduler is None else self._scheduler

    @property
    def sampler(self) -> Callable[..., Any] | None:
        """The function that runs the loop, None if there is none."""
        return self._sample

    @property
    def registered(self) -> Loop:
        """Where begin and end are told: several loops may be written around a network, ``trajectory`` knows one."""
        return loop_of(self.network)

    @property
    def components(self) -> dict[str, Any]:
        return {self.name: self.network, "scheduler": self.scheduler}

    @property
    def inside(self) -> bool:
        """Whether this thread is between begin and end."""
        return getattr(self._thread, "inside", False)

    def begin(self, timesteps: Tensor | None = None, branches: int = 1) -> None:
        """The loop begins. Its noise scheduler may get its timesteps after this, but before the first forward."""
        self._thread.inside = True

    def end(self, result: Any = None, broken: bool = False) -> None:
        """The loop is over. ``result``: the last state, where it is known; ``broken``: an exception ended it."""
        self._thread.inside = False

    def __call__(self, *, seed: int | None = None, **arguments: Any) -> Any:
        """Run the loop. ``seed``: of torch's own generators, which then stand where they stood before."""
        if seed is None:
            return self.sample(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.sample(**arguments)

    def sample(self, **arguments: Any) -> Any:
        if self._sample is None:
            raise BadOption("sample", None, "a function that runs the loop: diffcache.Loop(network, sample)")
        return self._sample(**arguments)

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            return self.network
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class Standing(Loop):
    """The loop that stands for all around a network, which it does not keep alive."""

    def __init__(self, network: Part) -> None:
        self._network = weak(network)
        self._sample = self._scheduler = None
        self._clock, self._thread = Clock(), threading.local()


# A network, or a policy -> the loop that stands for all around it. It goes with the network.
LOOPS: weakref.WeakKeyDictionary[Any, Loop] = weakref.WeakKeyDictionary()


def loop_of(network: Part) -> Loop:
    """The loop that stands for all around this network."""
    if network not in LOOPS:
        LOOPS[network] = Standing(network)
    return LOOPS[network]


@contextlib.contextmanager
def trajectory(network: nn.Module, timesteps: Sequence[float] | Tensor, *, branches: int = 1) -> Iterator[None]:
    """One run of a sampling loop of one's own: within it, forwards of ``network`` are counted.

        diffcache.accelerate(network, "taylorseer:every=3,order=1")
        with diffcache.trajectory(network, timesteps):
            for t in timesteps:
                x = step(x, network(x, t), t)

    timesteps  [T], one for every evaluation of the model, in order: a two-stage solver has two for each of its steps
    branches   forwards without a name for each of them: 2 where guidance runs the network with the prompt and without,
               one after the other. With both in one batch, or with names (:func:`branch`), it is 1

    Without ``accelerate`` it changes nothing. Raises BadOption; what the schedule raises for another loop than its own;
    UnsupportedModel where the network is called more often than was said, or where forwards without a name may have
    been taken for those of another branch.
    """
    if not isinstance(network, nn.Module):
        raise BadOption("network", type(network).__name__, "an nn.Module that the loop calls at every step")
    try:
        grid = torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError):
        raise BadOption("timesteps", f"{timesteps!r:.80}", "one number for every evaluation, [T]") from None
    if grid.ndim != 1 or not len(grid):
        raise BadOption("timesteps", f"a tensor of shape {list(grid.shape)}", "one number for every evaluation, [T]")
    if grid.device.type == "cpu" and not bool(grid.isfinite().all()):  # reading another device would wait for it
        raise BadOption("timesteps", f"{timesteps!r:.80}", "finite numbers")
    if not isinstance(branches, Integral) or isinstance(branches, bool) or branches < 1:
        raise BadOption("branches", branches, "a whole number, 1 or more")
    loop = loop_of(network)
    compiled = LOOPS.get(network._orig_mod) if hasattr(network, "_orig_mod") else None
    if compiled is not None and MARK in compiled.__dict__ and MARK not in loop.__dict__:
        raise ScheduleMismatch(
            f"this {type(network._orig_mod).__name__} was accelerated, and trajectory was given what torch.compile "
            "made of it: nothing would be skipped. Compile first, accelerate last: accelerate what torch.compile "
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
