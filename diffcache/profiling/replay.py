"""A recorded sampling loop, made runnable on its own: any step can be entered with any state, computed or predicted.

The loop of a pipeline is (input from state) -> denoiser, once per branch -> guided output -> noise scheduler. The
first and third stages live in pipeline code that cannot be called alone, so they are identified from the recording:
the input is the state itself, scaled, repeated or with condition channels behind it; the guided output is a linear
combination of the branches. Each identification is checked on every recorded step; a loop that does not fit says so
(``NotReplayable``), and planning falls back to what needs no replay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcache.errors import DiffCacheError
from diffcache.profiling.record import LoopStep, Trajectory

TOLERANCE = 1e-3  # relative error up to which a recorded tensor counts as explained


class NotReplayable(DiffCacheError):
    """The pipeline does something between denoiser and noise scheduler that is not linear in the denoiser's output."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a replayed run stands: the state about to be denoised, and the noise scheduler with its memory."""

    state: Tensor
    scheduler: Any

    def moved(self, step: LoopStep, model_output: Tensor) -> Position:
        """After one ``scheduler.step``; this position stays valid."""
        scheduler = _fork(self.scheduler)
        result = scheduler.step(model_output, step.timestep, self.state, **step.extra, return_dict=False)[0]
        return Position(result, scheduler)


class Replay:
    """One trajectory. Steps count from 0 at the loop's first iteration.

    branches    number of denoiser outputs that guidance combines
    in_batch    how many of them share one forward
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.steps = [s for s in trajectory.steps if s.model_output is not None]
        first = self.steps[0]
        assert first.model_output is not None and first.state is not None
        if len({len(s.calls) for s in self.steps}) != 1:
            raise NotReplayable("the number of denoiser calls changes from step to step.")
        _demand_batches(self.steps)
        self.copies = _copies(first)  # DiT-like pipelines carry each sample once per branch in the state itself
        self.in_batch = max(1, len(first.calls[0].output) * self.copies // len(first.model_output))
        self.branches = len(first.calls) * self.in_batch
        self.guidance = [self._guidance(i) for i in range(len(self.steps))]
        position = self.start
        for i in range(len(self.steps)):
            position = self._check(i, position)

    @property
    def start(self) -> Position:
        state = self.steps[0].state
        assert state is not None
        return Position(state, self.trajectory.scheduler)

    def reference(self, i: int) -> Tensor:
        """The full run's state after step ``i``."""
        result = self.steps[i].result
        assert result is not None
        return result

    def recorded(self, i: int) -> list[Tensor]:
        """The full run's branch outputs at step ``i``."""
        return self._split(i, [call.output for call in self.steps[i].calls])

    def compute(self, i: int, position: Position) -> list[Tensor]:
        """Run the denoiser at ``position``: one tensor per branch."""
        with torch.no_grad():
            return self._split(i, [call.again(self._input(i, call.input, position)) for call in self.steps[i].calls])

    def guided(self, i: int, outputs: Sequence[Tensor]) -> Tensor:
        """What the pipeline hands to the noise scheduler for these branch outputs (without the state's copies)."""
        combined = outputs[0] * self.guidance[i][0]
        for output, g in zip(outputs[1:], self.guidance[i][1:], strict=True):
            combined = combined + output * g
        return combined

    def move(self, i: int, position: Position, guided: Tensor) -> Position:
        return position.moved(self.steps[i], self._spread(guided))

    def affine(self, i: int, position: Position) -> tuple[Tensor, float]:
        """The next state as an affine function of the guided output: (state for output 0, gain)."""
        like = self._one(self.steps[i].model_output)
        at_zero = self.move(i, position, torch.zeros_like(like)).state
        at_one = self.move(i, position, torch.ones_like(like)).state
        return at_zero, float((at_one.double() - at_zero.double()).mean())

    # -------------------------------------------------------- identification

    def _one(self, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor[: len(tensor) // self.copies]

    def _spread(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.copies) if self.copies > 1 else tensor

    def _split(self, i: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        like = self._one(self.steps[i].model_output)
        dim = 1 if like.ndim >= 4 else like.ndim - 1
        parts = [part for output in outputs for part in output.chunk(self.in_batch)]
        if any(_without(part, dim) != _without(like, dim) or part.shape[dim] < like.shape[dim] for part in parts):
            raise NotReplayable(f"an output {tuple(parts[0].shape)} does not make a guided output {tuple(like.shape)}.")
        return [part.narrow(dim, 0, like.shape[dim]) for part in parts]

    def _guidance(self, i: int) -> list[float]:
        """Weights of the branches in the guided output, by least squares."""
        branches = torch.stack([part.double().flatten() for part in self.recorded(i)], 1)
        target = self._one(self.steps[i].model_output).double().flatten()
        weights = torch.linalg.lstsq(branches, target[:, None]).solution
        error = (branches @ weights - target[:, None]).norm() / target.norm().clamp(min=1e-12)
        if not error < TOLERANCE:
            raise NotReplayable(f"the guided output is no linear combination of the branches (error {error:.1e}).")
        return [float(w) for w in weights[:, 0]]

    def _input(self, i: int, recorded: Any, position: Position) -> Tensor:
        """The denoiser's main input for this state, built as the recorded one was."""
        step = self.steps[i]
        if not isinstance(recorded, Tensor):
            raise NotReplayable(f"the denoiser's main input is a {type(recorded).__name__}, not a tensor.")
        x = position.state
        if hasattr(position.scheduler, "scale_model_input"):
            x = _fork(position.scheduler).scale_model_input(x, step.timestep)
        if len(recorded) % len(x):
            raise NotReplayable(f"a state {tuple(x.shape)} does not make an input {tuple(recorded.shape)}.")
        x = torch.cat([x] * (len(recorded) // len(x))).to(recorded.dtype)
        if x.shape == recorded.shape:
            return x
        differing = [d for d in range(1, x.ndim) if x.ndim == recorded.ndim and x.shape[d] != recorded.shape[d]]
        if len(differing) != 1 or x.shape[differing[0]] > recorded.shape[differing[0]]:
            raise NotReplayable(f"a state {tuple(x.shape)} does not make an input {tuple(recorded.shape)}.")
        d = differing[0]
        return torch.cat([x, recorded.narrow(d, x.shape[d], recorded.shape[d] - x.shape[d])], d)

    def _check(self, i: int, position: Position) -> Position:
        """The stages explain recorded step ``i``, and the next one starts where it ended; returns where that is."""
        step = self.steps[i]
        assert step.result is not None
        for call in step.calls:
            if not _close(self._input(i, call.input, position), call.input):
                raise NotReplayable("the denoiser's input is not the state, scaled, repeated or with channels behind it.")
        after = self.move(i, position, self.guided(i, self.recorded(i)))
        if not _close(after.state, step.result):
            raise NotReplayable("repeating a noise-scheduler step gives another result (it may draw its own noise).")
        following = self.steps[i + 1].state if i + 1 < len(self.steps) else step.result
        assert following is not None
        if not _close(step.result, following):
            raise NotReplayable("the pipeline changes the state between two steps.")
        return Position(following, after.scheduler)


def _demand_batches(steps: Sequence[LoopStep]) -> None:
    tensors = [t for s in steps for t in (s.state, s.model_output, *(c.output for c in s.calls))]
    if any(t is None or t.ndim < 2 or len(t) == 0 for t in tensors):
        raise NotReplayable("states or outputs are no batches of samples.")
    if any(isinstance(v, Tensor) and v.ndim for s in steps for v in s.extra.values()):
        raise NotReplayable("the pipeline itself carries tensors from one noise-scheduler step to the next.")
    if any(len(c.output) % len(s.model_output) for s in steps for c in s.calls if s.model_output is not None):
        raise NotReplayable("outputs and guided outputs differ in their number of samples.")


def _without(tensor: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(tensor.shape) if d != dim)


def _copies(step: LoopStep) -> int:
    """2 if the state holds every sample twice and one forward serves both, else 1."""
    state = step.state
    assert state is not None and step.model_output is not None
    if len(step.calls) == 1 and len(state) % 2 == 0 and len(step.calls[0].output) == len(step.model_output):
        first, second = state.chunk(2)
        return 2 if torch.equal(first, second) else 1
    return 1


def _fork(scheduler: Any) -> Any:
    """A copy that can step on its own. Noise schedulers keep their memory in attributes and lists of tensors they
    replace, never write into; a copy of those is enough, and far quicker than a deep one."""
    twin = copy.copy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, list):
            twin.__dict__[name] = list(value)
    return twin


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).norm() <= TOLERANCE * b.double().norm() + 1e-12)
