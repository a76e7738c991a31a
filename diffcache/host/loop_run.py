"""One pass of a sampling loop: which step it is in, and which branch a forward serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcache.errors import UnsupportedModel
from diffcache.host.branches import Branches, Conditions, Forward
from diffcache.patch import Undo


@dataclass
class LoopRun:
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
    by_bar     whether the progress bar shows where a step ends; None: not asked yet
    branches   what a guider calls the branches of this step, in the order of their forwards
    assigned   assigns forwards to branches
    opened     where forwards are counted: the step that the time of this step's first forward is the time of, and that
               time as a number; None where it is not known
    named      some forward had the name of its branch
    cut        steps that had fewer forwards than were said, as the time given to the network shows
    lost       forwards of one step were given times of which none is the next step's: their steps are not known
    waiting    called once with the sample that the noise scheduler is about to step
    unread     times on a device, with the step and the place in it of their forwards: read when the run is over
    result     the last state, where the loop told it
    short      forwards are counted, and the loop ended before there were enough
    went_back  called when the loop goes back: a pipeline may run it several times over, chunk by chunk
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
    assigned: Branches = field(default_factory=Branches)
    opened: tuple[int | None, float | None] = (None, None)
    named: bool = False
    cut: int = 0
    lost: bool = False
    waiting: list[Callable[[Tensor], None]] = field(default_factory=list)
    unread: list[tuple[int, int, Tensor]] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)
    state: Any = None  # set by the observer
    undo: Undo = lambda: None
    went_back: Callable[[LoopRun], None] = lambda run: None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def forward(
        self,
        denoiser: str,
        timestep: Any = None,
        name: str = "",
        given: Callable[[], Conditions] = dict,
    ) -> Forward:
        """Return the step and the branch that the forward of ``denoiser`` that is beginning serves.

        Args:
            denoiser: name of the component.
            timestep: what the denoiser is given as time. Where it is a view of the noise scheduler's timesteps, it
                shows that a step is not over though the noise scheduler has stepped (parts of a large picture, one
                after another), or that the loop has gone back.
            name: of the branch, or "".
            given: returns the conditioning of the forward, by which a branch without a name is recognised.

        Raises:
            UnsupportedModel: forwards are counted, and there are more of them than were said.
        """
        if not self.calls and self.index == self.start:
            self.first = timestep
        self.named |= bool(name)
        if self.forwards:
            self._count(denoiser, timestep, name)
        here, step = None if self.forwards else position(timestep, self.timesteps), self.index
        if here is not None and here + 1 < step:
            self._go_back(here)
            step = here
        elif here is not None and here + 1 == step and (here, denoiser) in self.calls:
            step = here
        ordinal = self.calls.get((step, denoiser), 0)
        self.calls[step, denoiser] = ordinal + 1
        if not name and ordinal < len(self.branches):
            name = self.branches[ordinal]
        forward = self.assigned.forward(denoiser, step, name, given)
        # Another branch came first in a step that was said to have several, and no time shows where the step ends.
        self.lost |= forward.moved and self.forwards > 1 and self.opened[0] is None
        return forward

    def _count(self, denoiser: str, timestep: Any, name: str) -> None:
        """Forwards are counted: go on to the next step where this one is over."""
        made = self.calls.get((self.index, denoiser), 0)
        if self.forwards == 1 and not name:  # nothing but one forward a step: the time need not be looked at
            if made:
                self._go_on()
            return
        value = number(timestep)
        shown = self._step_of(timestep, value)
        if not name and isinstance(timestep, Tensor) and value is None and timestep.numel():
            self.unread.append((self.index, made % self.forwards, timestep.detach().flatten()[:1].clone()))
        if made:
            follows = self.opened[0] == self.index and shown == self.index + 1
            if name:
                over = follows or self.assigned.count(denoiser, self.index, name) > 0
            elif self.assigned.count(denoiser, self.index) < self.forwards:
                over = follows
                self.cut += follows
                differs = None not in (value, self.opened[1]) and value != self.opened[1]
                self.lost |= differs and not follows and shown != self.index
            else:
                over = True
                if self.opened[0] == shown == self.index and self._moves_on():
                    self._too_many()
            if not over:
                return
            self._go_on()
            shown = self._step_of(timestep, value)
        self.opened = shown, value

    def _step_of(self, timestep: Any, value: float | None) -> int | None:
        """Return the step whose time this is, by address; or by value, of the step in progress and its neighbours. None
        where neither shows it."""
        here = position(timestep, self.timesteps)
        if here is not None or value is None:
            return here
        self._values = self._values or [float(t) for t in self.timesteps.tolist()]
        apart = {k: abs(value - self._values[k]) for k in _around(self.index, self.steps)}
        nearest = min(apart, key=lambda k: (apart[k], k != self.index))
        gaps = [abs(self._values[k] - self._values[nearest]) for k in apart]
        return nearest if 4 * apart[nearest] < min([gap for gap in gaps if gap], default=0.0) else None

    def _moves_on(self) -> bool:
        """Whether the next step has another time than this one."""
        values = self._values or [float(t) for t in self.timesteps.tolist()]
        return self.index + 1 < self.steps and values[self.index] != values[self.index + 1]

    def _go_on(self) -> None:
        """Forwards are counted, and this step is over."""
        self.step_done()
        if self.index >= self.steps:
            self._too_many()

    def _too_many(self) -> None:
        raise UnsupportedModel(
            f"the loop was said to call its network {self.forwards} time(s) at each of {self.steps} timesteps, and "
            "calls it once more: steps were taken for others. Give trajectory one timestep for every evaluation, "
            "and branches=2 where guidance runs the network twice; or name the branches, "
            'with diffcache.branch("cond") around each call of the network.'
        )

    def step_done(self, timestep: Any = None) -> None:
        """The noise scheduler has stepped from ``timestep``."""
        # Iterating a tensor yields views, so the address of ``timestep`` is its index without reading the device.
        here = position(timestep, self.timesteps)
        if here is not None and here + 1 < self.index:
            self._go_back(here)
        elif here is not None and here + 1 == self.index and any(step == self.index for step, _ in self.calls):
            raise UnsupportedModel(
                f"the pipeline takes step {here} in several parts and gives its denoiser no time that shows it: a "
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

    def times_disagree(self) -> bool:
        """Return whether times on a device show that forwards were counted in other steps. Reads the device."""
        if not self.unread:
            return False
        values = torch.cat([time.double() for *_, time in self.unread]).tolist()
        self.index, first = self.steps, None
        for (step, place, _), value in zip(self.unread, values, strict=True):
            self.index = step
            shown = self._step_of(None, value)
            if place == 0:
                if first == step - 1 == shown:  # the step before went on
                    return True
                first = shown
            elif first == step and shown == step + 1:
                return True
        return False

    @property
    def whole(self) -> bool:
        """Where forwards are counted: there were as many as were said."""
        here = [times for (step, _), times in self.calls.items() if step == self.index == self.steps - 1]
        return not self.forwards or (bool(here) and (self.named or here == [self.forwards] or self.cut > 0))

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
        self.assigned = Branches()

    def _began_at_the_start(self) -> bool:
        """Reads the device: once in a run, and in such loops alone."""
        if not isinstance(self.first, (Tensor, int, float)) or self.start >= self.steps:
            return False
        here, wanted = float(torch.as_tensor(self.first).max()), float(self.timesteps[self.start])
        return abs(here - wanted) <= 1e-4 * abs(wanted)

    def _go_back(self, here: int) -> None:
        self.went_back(self)
        self.calls.clear()
        self.index = here


def _around(index: int, steps: int) -> range:
    return range(max(index - 1, 0), min(index + 2, steps))


def number(time: Any) -> float | None:
    """Return a time as a number, of a tensor on the CPU its first element; None for anything else."""
    if isinstance(time, Tensor):
        return float(time.flatten()[0]) if time.device.type == "cpu" and time.numel() else None
    return float(time) if isinstance(time, (int, float)) else None


def position(timestep: Any, timesteps: Tensor) -> int | None:
    """Index of a view in the tensor it was taken from, by address; None for anything else."""
    if not isinstance(timestep, Tensor) or (timestep.dtype, timestep.device) != (timesteps.dtype, timesteps.device):
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return int(offset) if rest == 0 and 0 <= offset < len(timesteps) else None


def start_of(scheduler: Any, total: int | None) -> int:
    """Return the first iteration of a loop: what the pipeline told the noise scheduler, else what its bar leaves out.

    Args:
        scheduler: The noise scheduler.
        total: The length of the progress bar, if it has one.
    """
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    steps = getattr(scheduler, "num_inference_steps", None)
    if total is None or steps is None or total >= steps:
        return 0
    return min((int(steps) - total) * int(getattr(scheduler, "order", 1)), len(scheduler.timesteps) - 1)
