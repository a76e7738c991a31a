"""Count the steps of one pass of a sampling loop, and assign each forward to a step and a branch."""

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

    Forwards are counted in loops of your own, which step no noise scheduler. In other loops the noise scheduler's
    ``step`` ends a step.

    Attributes:
        scheduler: The noise scheduler, or a ``Clock`` if forwards are counted.
        timesteps: The noise scheduler's tensor [T], one entry per iteration that it planned.
        start: The first iteration that this run enters. It is above 0 for image-to-image and similar pipelines.
        index: The current iteration.
        calls: (iteration, denoiser) -> the number of forwards so far.
        saved: An equal tensor that replaced ``timesteps`` in the noise scheduler, put there by a pipeline that saves
            and restores the scheduler's state.
        first: The time that the first forward was given.
        stepped: Whether the noise scheduler has stepped since the progress bar moved.
        forwards: The number of forwards in each step if forwards are counted, else 0.
        result: The last state, if the loop reported it.
        short: Whether forwards are counted and the loop ended before there were enough of them.
        by_bar: Whether the progress bar shows where a step ends. None: not determined yet.
        branches: The names that a guider gave the branches of this step, in the order of their forwards.
        assigned: Assigns forwards to branches.
        opened: If forwards are counted: the step whose time the first forward of this step was given, and that time as
            a number. Each is None if it is not known.
        named: Whether some forward had a branch name.
        cut: The number of steps that had fewer forwards than ``forwards``, as the times given to the network show.
        lost: Whether forwards of one step were given different times, none of them the next step's. The steps of these
            forwards are not known.
        waiting: Functions that are called once, with the sample that the noise scheduler is about to step.
        unread: Times on a device, as (step, place of the forward in the step, time [1]). They are read when the run is
            over.
        state: The observer's data for this run.
        undo: Takes off the wrappers that were put on for this run.
        went_back: Called when the loop goes back to an earlier step. Some pipelines run the loop once for each chunk.
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
    state: Any = None
    undo: Undo = lambda: None
    went_back: Callable[[LoopRun], None] = lambda run: None

    @property
    def steps(self) -> int:
        """Return the number of iterations that the noise scheduler planned."""
        return len(self.timesteps)

    def forward(
        self,
        denoiser: str,
        timestep: Any = None,
        name: str = "",
        given: Callable[[], Conditions] = dict,
    ) -> Forward:
        """Return the step and the branch of the forward of ``denoiser`` that is beginning.

        Args:
            denoiser: The name of the component.
            timestep: The time that the denoiser is given. If it is a view of the noise scheduler's timesteps, its
                address shows that a step is not over although the noise scheduler has stepped (parts of a large
                picture, one after another), or that the loop has gone back.
            name: The name of the branch, or "".
            given: Returns the conditioning of the forward, which identifies a branch without a name.

        Raises:
            UnsupportedModel: Forwards are counted, and there are more of them than ``forwards`` in each step.
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
        # Another branch came first in a step with several forwards, and no time shows where the step ends.
        self.lost |= forward.moved and self.forwards > 1 and self.opened[0] is None
        return forward

    def _count(self, denoiser: str, timestep: Any, name: str) -> None:
        """Go on to the next step if the step in progress is over. Forwards are counted.

        Args:
            denoiser: The name of the component whose forward is beginning.
            timestep: The time that it is given.
            name: The name of its branch, or "".
        """
        made = self.calls.get((self.index, denoiser), 0)
        if self.forwards == 1 and not name:  # each forward is a step, so the time is not needed
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
        """Return the step that has this time, or None if it is not known.

        The address of ``timestep`` shows the step. If it does not, ``value`` is compared with the times of the step in
        progress and its neighbours.
        """
        here = position(timestep, self.timesteps)
        if here is not None or value is None:
            return here
        self._values = self._values or [float(t) for t in self.timesteps.tolist()]
        apart = {k: abs(value - self._values[k]) for k in _around(self.index, self.steps)}
        nearest = min(apart, key=lambda k: (apart[k], k != self.index))
        gaps = [abs(self._values[k] - self._values[nearest]) for k in apart]
        return nearest if 4 * apart[nearest] < min([gap for gap in gaps if gap], default=0.0) else None

    def _moves_on(self) -> bool:
        """Return whether the next step has a different time."""
        values = self._values or [float(t) for t in self.timesteps.tolist()]
        return self.index + 1 < self.steps and values[self.index] != values[self.index + 1]

    def _go_on(self) -> None:
        """Go on to the next step. Forwards are counted.

        Raises:
            UnsupportedModel: The step in progress was the last one.
        """
        self.step_done()
        if self.index >= self.steps:
            self._too_many()

    def _too_many(self) -> None:
        """Raise UnsupportedModel, because there are more forwards than steps times ``forwards``."""
        raise UnsupportedModel(
            f"trajectory was asked to expect {self.forwards} call(s) of the network at each of {self.steps} timesteps, "
            "and the loop calls it once more, so steps were counted wrongly. Pass trajectory one timestep for each "
            "evaluation, and branches=2 if guidance runs the network twice; or name the branches, "
            'with diffcache.branch("cond") around each call of the network.'
        )

    def steps_again(self, timestep: Any) -> bool:
        """Return whether the noise scheduler is about to step from the ``timestep`` of the step before once more.

        Some pipelines step it several times in an iteration: for parts of a large picture, or to convert an output.
        """
        here = position(timestep, self.timesteps)
        return here is not None and here + 1 == self.index

    def step_done(self, timestep: Any = None) -> None:
        """End a step: the noise scheduler has stepped from ``timestep``.

        Raises:
            UnsupportedModel: The step is repeated after a forward was counted in the next one.
        """
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
        """End an iteration of the progress bar.

        If the noise scheduler has not stepped since the bar last moved, the pipeline may step copies of it. The
        iteration is then a step if the loop began at the first time of this run. An inversion begins at another time.
        """
        if not self.stepped and any(step == self.index for step, _ in self.calls):
            if self.by_bar is None:
                self.by_bar = self._began_at_the_start()
            if self.by_bar:
                self.step_done()
        self.stepped = False

    def times_disagree(self) -> bool:
        """Return whether times on a device show that forwards belong to other steps than those they were counted in.

        This reads the device.
        """
        if not self.unread:
            return False
        values = torch.cat([time.double() for *_, time in self.unread]).tolist()
        self.index, first = self.steps, None
        for (step, place, _), value in zip(self.unread, values, strict=True):
            self.index = step
            shown = self._step_of(None, value)
            if place == 0:
                if first == step - 1 == shown:  # the forward belongs to the step before
                    return True
                first = shown
            elif first == step and shown == step + 1:
                return True
        return False

    @property
    def whole(self) -> bool:
        """Return whether the last step had all of its forwards. It is True if forwards are not counted."""
        here = [times for (step, _), times in self.calls.items() if step == self.index == self.steps - 1]
        return not self.forwards or (bool(here) and (self.named or here == [self.forwards] or self.cut > 0))

    @property
    def idle(self) -> bool:
        """Return whether the progress bar moved and no step of the noise scheduler was seen."""
        return self.by_bar is False and self.index == self.start

    def begin_anew(self, timesteps: Tensor, start: int) -> None:
        """Restart on another grid that the noise scheduler was given.

        Args:
            timesteps: The new grid [T].
            start: The first iteration of the new loop.
        """
        self.timesteps, self.start, self.index, self.stepped = timesteps, start, start, False
        self.saved = self.by_bar = None
        self.calls.clear()
        self.branches.clear()
        self.assigned = Branches()

    def _began_at_the_start(self) -> bool:
        """Return whether the first forward was given the time of the first iteration.

        This reads the device, once in a run, in loops whose noise scheduler does not step.
        """
        if not isinstance(self.first, (Tensor, int, float)) or self.start >= self.steps:
            return False
        here, wanted = float(torch.as_tensor(self.first).max()), float(self.timesteps[self.start])
        return abs(here - wanted) <= 1e-4 * abs(wanted)

    def _go_back(self, here: int) -> None:
        """Return to iteration ``here``."""
        self.went_back(self)
        self.calls.clear()
        self.index = here


def _around(index: int, steps: int) -> range:
    """Return the indices of a step and its neighbours."""
    return range(max(index - 1, 0), min(index + 2, steps))


def number(time: Any) -> float | None:
    """Return a time as a float: a number, or the first element of a tensor on the CPU.

    Return None for any other value.
    """
    if isinstance(time, Tensor):
        return float(time.flatten()[0]) if time.device.type == "cpu" and time.numel() else None
    return float(time) if isinstance(time, (int, float)) else None


def position(timestep: Any, timesteps: Tensor) -> int | None:
    """Return the index of a view in the tensor it was taken from, found by address; None for any other value."""
    if not isinstance(timestep, Tensor) or (timestep.dtype, timestep.device) != (timesteps.dtype, timesteps.device):
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return int(offset) if rest == 0 and 0 <= offset < len(timesteps) else None


def start_of(scheduler: Any, total: int | None) -> int:
    """Return the first iteration of a loop.

    It is the noise scheduler's ``begin_index`` if the pipeline has set it. Otherwise it is the number of steps that the
    progress bar leaves out.

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
