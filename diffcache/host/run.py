"""One pass of a sampling loop: which step it is in, and which branch a forward serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcache.errors import UnsupportedModel
from diffcache.patch import Undo


@dataclass
class Run:
    """One pass of the sampling loop.

    steps      iterations the noise scheduler planned (length of its timesteps)
    start      first iteration this run enters: above 0 for image-to-image and its kin
    index      the iteration now
    timesteps  the noise scheduler's own tensor [steps]
    calls      (iteration, denoiser) -> forwards so far
    saved      an equal tensor that the noise scheduler holds instead, put there by a pipeline that keeps its state
    first      what the first forward was given as time
    stepped    the noise scheduler has stepped since the progress bar moved
    forwards   in each step, where forwards are counted, for nobody steps a noise scheduler; else 0
    by_bar     whether the progress bar tells where a step ends; None: not asked yet
    branches   what a guider calls the branches of this step, in the order of their forwards
    numbers    by name, in the order in which the run met them
    result     the last state, where the loop told it
    short      forwards are counted, and the loop ended before there were enough
    again      called when the loop goes back: a pipeline may run it several times over, chunk by chunk
    """

    scheduler: Any
    timesteps: Tensor
    start: int
    index: int
    calls: dict[tuple[int, str], int] = field(default_factory=dict)
    saved: Tensor | None = None
    first: Any = None
    stepped: bool = False
    forwards: int = 0
    result: Any = None
    short: bool = False
    by_bar: bool | None = None
    branches: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    state: Any = None  # whatever ``begin`` wants to find again
    undo: Undo = lambda: None
    again: Callable[[], None] = lambda: None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def forward(self, denoiser: str, timestep: Any = None) -> tuple[int, int]:
        """The step and the branch, 0, 1, …, that the forward of ``denoiser`` that is beginning serves.

        Where no guider gives branches their names, they come in a fixed order within a step. ``timestep``: what the
        denoiser was given as time. Where it is a view of the noise scheduler's timesteps it tells that a step is not
        over though the noise scheduler has stepped (parts of a large picture, one after another), or that the loop has
        gone back.
        """
        if not self.calls and self.index == self.start:
            self.first = timestep
        if self.forwards and self.calls.get((self.index, denoiser), 0) == self.forwards:
            self._go_on()
        here, step = None if self.forwards else position(timestep, self.timesteps), self.index
        if here is not None and here + 1 < step:
            self._go_back(here)
            step = here
        elif here is not None and here + 1 == step and (here, denoiser) in self.calls:
            step = here
        ordinal = self.calls.get((step, denoiser), 0)
        self.calls[step, denoiser] = ordinal + 1
        name = self.branches[ordinal] if ordinal < len(self.branches) else str(ordinal)
        return step, self.numbers.setdefault(name, len(self.numbers))

    def _go_on(self) -> None:
        """Forwards are counted, and there were enough of them in this step."""
        self.step_done()
        if self.index >= self.steps:
            raise UnsupportedModel(
                f"the loop was said to call its network {self.forwards} time(s) at each of {self.steps} timesteps, and "
                "calls it once more: steps were taken for others. Give trajectory one timestep for every evaluation, "
                "and branches=2 where guidance runs the network twice."
            )

    def step_done(self, timestep: Any = None) -> None:
        """The noise scheduler has stepped from ``timestep``."""
        # Iterating a tensor yields views, so the address of ``timestep`` tells its index without reading the device.
        here = position(timestep, self.timesteps)
        if here is not None and here + 1 < self.index:
            self._go_back(here)
        elif here is not None and here + 1 == self.index and any(step == self.index for step, _ in self.calls):
            raise UnsupportedModel(
                f"the pipeline takes step {here} in several parts and gives its denoiser no time that tells so: a "
                "forward of it was taken for one of the next step. Call diffcache.restore(pipe): this pipeline cannot "
                "be accelerated."
            )
        here = self.index if here is None else here
        self.index = here + 1
        self.calls = {key: times for key, times in self.calls.items() if key[0] >= here}
        self.branches.clear()
        self.stepped = True

    def bar_moved(self) -> None:
        """An iteration is over: a step too, though the pipeline steps noise schedulers of its own making, if the loop
        began where this one does. An inversion begins elsewhere."""
        if not self.stepped and any(step == self.index for step, _ in self.calls):
            if self.by_bar is None:
                self.by_bar = self._began_at_the_start()
            if self.by_bar:
                self.step_done()
        self.stepped = False

    @property
    def whole(self) -> bool:
        """Where forwards are counted: there were as many as were said."""
        here = [times for (step, _), times in self.calls.items() if step == self.index == self.steps - 1]
        return not self.forwards or here == [self.forwards]

    @property
    def idle(self) -> bool:
        """Iterations went by, and none of them was a step of the noise scheduler."""
        return self.by_bar is False and self.index == self.start

    def begin_anew(self, timesteps: Tensor, start: int) -> None:
        """The noise scheduler was given another grid."""
        self.timesteps, self.start, self.index, self.stepped = timesteps, start, start, False
        self.saved = self.by_bar = None
        self.calls.clear()
        self.branches.clear()

    def _began_at_the_start(self) -> bool:
        """Reads the device: once in a run, and in such loops alone."""
        if not isinstance(self.first, (Tensor, int, float)) or self.start >= self.steps:
            return False
        here, wanted = float(torch.as_tensor(self.first).max()), float(self.timesteps[self.start])
        return abs(here - wanted) <= 1e-4 * abs(wanted)

    def _go_back(self, here: int) -> None:
        self.again()
        self.calls.clear()
        self.index = here


def position(timestep: Any, timesteps: Tensor) -> int | None:
    """Index of a view in the tensor it was taken from, by address; None for anything else."""
    if not isinstance(timestep, Tensor) or (timestep.dtype, timestep.device) != (timesteps.dtype, timesteps.device):
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return int(offset) if rest == 0 and 0 <= offset < len(timesteps) else None
