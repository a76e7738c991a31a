"""One pass of a sampling loop: which step it is in, and which branch a forward serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    stepped    the noise scheduler has stepped since the progress bar moved
    branches   what a guider calls the branches of this step, in the order of their forwards
    numbers    by name, in the order in which the run met them
    again      called when the loop goes back: a pipeline may run it several times over, chunk by chunk
    """

    scheduler: Any
    timesteps: Tensor
    start: int
    index: int
    calls: dict[tuple[int, str], int] = field(default_factory=dict)
    stepped: bool = False
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
        here, step = position(timestep, self.timesteps), self.index
        if here is not None and here + 1 < step:
            self._go_back(here)
            step = here
        elif here is not None and here + 1 == step and (here, denoiser) in self.calls:
            step = here
        ordinal = self.calls.get((step, denoiser), 0)
        self.calls[step, denoiser] = ordinal + 1
        name = self.branches[ordinal] if ordinal < len(self.branches) else str(ordinal)
        return step, self.numbers.setdefault(name, len(self.numbers))

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
        """The progress bar has: a step is over even where the pipeline steps noise schedulers of its own making."""
        if not self.stepped and any(step == self.index for step, _ in self.calls):
            self.step_done()
        self.stepped = False

    def begin_anew(self, timesteps: Tensor, start: int) -> None:
        """The noise scheduler was given another grid."""
        self.timesteps, self.start, self.index, self.stepped = timesteps, start, start, False
        self.calls.clear()
        self.branches.clear()

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
