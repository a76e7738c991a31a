"""Run a recorded sampling loop without its pipeline: enter any step with any state, computed or predicted.

The loop of a pipeline is (input from state) -> denoiser, once per branch -> guided output -> noise scheduler. The
first and third stages are pipeline code that cannot be called alone, so they are identified from the recording. The
input is the state itself, scaled, repeated or with condition channels around it. The guided output is a linear
combination of the branches; its vectors may be rescaled to the length of one branch's vectors. Each identification is
checked on every recorded step. A loop that does not fit raises ``NotReplayable``, and planning then uses methods that
need no replay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.documents.branches import BranchLayout
from diffcache.errors import DiffCacheError
from diffcache.executor.store import channel_dim
from diffcache.host.channels import Span, carries, find_sample, put, within
from diffcache.profiling.recording.generators import with_copied_generators
from diffcache.profiling.recording.record import Forward, LoopStep, Trajectory

COARSE, FINE = 0.1, 1e-3  # shares of the output's size that it is moved by, to see what the next state does
TOLERANCE = 1e-3  # relative error up to which a recorded tensor counts as explained; one rounding, if that is more


class NotReplayable(DiffCacheError):  # noqa: N818  says what happened, as the public errors do
    """The code around the denoiser does something that cannot be repeated from the recording."""


@dataclass(frozen=True, slots=True)
class Position:
    """The point that a replayed run has reached.

    Attributes:
        state: The state that is denoised next.
        scheduler: The noise scheduler with its internal history.
    """

    state: Tensor
    scheduler: Any

    def moved(self, step: LoopStep, model_output: Tensor) -> Position:
        """Return the position after one ``scheduler.step``.

        This position stays valid. A step that draws noise draws the same noise as in the recording.
        """
        scheduler = _fork(self.scheduler)
        extra = {name: with_copied_generators(value) for name, value in step.extra.items()}
        result = scheduler.step(model_output, step.timestep, self.state, **extra, return_dict=False)[0]
        return Position(result, scheduler)

    @property
    def widened(self) -> Position:
        """Return this position with a state of float32 or wider, so that differences of states are not rounded."""
        return Position(_wide(self.state), self.scheduler)


class Replay:
    """A recorded trajectory that can be run again. Steps count from 0 at the loop's first iteration.

    Attributes:
        layout: The branches whose outputs guidance combines.
        first_steps: Steps at which another denoiser takes over, the first step included.
        batch_copies: How often the state itself holds every sample: 2 in pipelines like DiT's, which hold it once per
            branch, else 1.
        guidance: Per step, the weights of the branches in the guided output.
        rescaled_branch: The branch that sets the length of the guided output's vectors along the last axis. None: they
            are not rescaled.
        place: The position of the state in the denoiser's input, which may hold conditions as well.
        nonlinear_steps: Steps at which the noise scheduler is not affine in the guided output, because it clips.
        input_share: float64 [steps], λ: the share of its input that is subtracted from each output before outputs are
            combined. None: outputs are combined as they are.
        rows: Indices of the samples that a fit or a score uses. None: all. The whole batch runs in either case.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.steps = [s for s in trajectory.steps if s.model_output is not None]
        if trajectory.obstacle or len(self.steps) < len(trajectory.steps) or any(s.result is None for s in self.steps):
            raise NotReplayable(
                trajectory.obstacle
                or "what the loop makes of the network's outputs, or what it ends with, is not known: give it a "
                "diffusers noise scheduler, or let sample return the last state."
            )
        first = self.steps[0]
        assert first.model_output is not None
        if len({len(s.calls) for s in self.steps}) != 1:
            raise NotReplayable("the number of denoiser calls changes from step to step.")
        if any(len({id(c.module) for c in s.calls}) != 1 for s in self.steps):
            raise NotReplayable("several denoisers are called in one step.")
        _demand_batches(self.steps)
        if not (isinstance(first.state, Tensor) and first.state.is_floating_point()):
            raise NotReplayable("the state is not a floating-point tensor. It may hold tokens, for example.")
        self.first_steps = trajectory.first_steps
        self.batch_copies = _batch_copies(self.steps[-1])
        per_forward, *others = {
            max(1, len(call.output) * self.batch_copies // len(step.model_output))
            for step in self.steps
            for call in step.calls
            if step.model_output is not None
        }
        if others:
            raise NotReplayable("the number of branches in a forward changes from step to step.")
        self.layout = BranchLayout(len(first.calls) * per_forward, per_forward)
        x, state = first.calls[0].input, first.state
        self.place = find_sample(x, state) if isinstance(x, Tensor) and isinstance(state, Tensor) else None
        self.rescaled_branch: int | None = None
        self.guidance = self._guidance()
        self.nonlinear_steps: set[int] = set()
        self.input_share: np.ndarray | None = None
        self.rows: np.ndarray | None = None
        self._feeds: list[list[Forward]] = []
        position = self.start
        for i in range(len(self.steps)):
            position = self._check(i, position)
        again = zip(self.compute(0, self.start), self.recorded(0), strict=True)
        if not all(self._close(new, old) for new, old in again):
            raise NotReplayable("the network returns another output if it is called again with the same arguments.")

    @property
    def branches(self) -> int:
        """Number of branches whose outputs guidance combines."""
        return self.layout.count

    @property
    def channels(self) -> int:
        """Number of channels of the denoiser's output."""
        output = self.steps[0].calls[0].output
        return int(output.shape[channel_dim(output)])

    @property
    def batch(self) -> int:
        """Number of samples in the recorded run."""
        return len(self.reference(0)) // self.batch_copies

    @property
    def samples(self) -> int:
        """Number of samples that a fit or a score uses."""
        return self.batch if self.rows is None else len(self.rows)

    def part(self, rows: np.ndarray) -> Replay:
        """Return the same run, of which a fit or a score uses only the samples ``rows`` (int [n]).

        Samples of a batch do not depend on each other, so one recorded batch can be split into samples that are fitted
        and samples that are not.
        """
        other = copy.copy(self)
        other.rows = None if len(rows) == self.batch else rows
        return other

    def looked_at(self, tensor: Tensor) -> Tensor:
        """Return the samples of ``tensor`` [N, …], or [copies · N, …], that a fit or a score uses, each once."""
        once = tensor[: self.batch]
        return once if self.rows is None else once[torch.as_tensor(self.rows, device=once.device)]

    @property
    def inputs_repeat(self) -> bool:
        """Whether branches that share a forward have the same main input. Their other arguments may differ."""
        x = self.steps[0].calls[0].input
        parts = self.layout.split(x)
        return all(torch.equal(parts[0], part) for part in parts[1:])

    @property
    def start(self) -> Position:
        """The position before the first step."""
        state = self.steps[0].state
        assert state is not None
        scheduler = _fork(self.trajectory.scheduler)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True  # the recorded run did; without it every step would warn
        return Position(state, scheduler)

    def reference(self, i: int) -> Tensor:
        """Return the full run's state after step ``i``."""
        result = self.steps[i].result
        assert result is not None
        return result

    def recorded(self, i: int) -> list[Tensor]:
        """Return the full run's branch outputs at step ``i``."""
        return self._split(i, [call.output for call in self.steps[i].calls])

    def compute(self, i: int, position: Position) -> list[Tensor]:
        """Run the denoiser at ``position`` and return one tensor per branch."""
        step = self.steps[i]
        with torch.no_grad():
            fresh: dict[int, Tensor] = {}
            for feed in self._feeds[i]:
                again = feed.again(self._input(i, feed.input, position))
                fresh |= {id(old): new for old, new in zip(feed.outputs, again, strict=True)}
            return self._split(i, [c.again(self._input(i, c.input, position), fresh)[0] for c in step.calls])

    def with_input_share(self, input_share: np.ndarray) -> Replay:
        """Return the same run, in which outputs are combined without this share of their inputs (float64 [steps])."""
        other = copy.copy(self)
        other.input_share = input_share
        return other

    def input(self, i: int, position: Position) -> Tensor:
        """Return x of equation (1): the denoiser's input, once per sample, in the guided output's shape."""
        x = position.state
        if hasattr(position.scheduler, "scale_model_input"):
            x = _fork(position.scheduler).scale_model_input(x, self.steps[i].timestep)
        given = self.steps[i].calls[0].input
        return self._like_handed(i, x[: len(x) // self.batch_copies].to(given.dtype))

    @property
    def paired(self) -> bool:
        """Whether an accelerated run can find the part of the denoiser's input that corresponds to its output."""
        return all(
            isinstance(call.input, Tensor) and carries(call.input.shape, call.output.shape, self.place)
            for call in self.steps[0].calls
        )

    def residuals(self, i: int, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Return the branch outputs of step ``i`` without the share λ_i of their input ``x``: F − λ_i x."""
        if self.input_share is None:
            return list(outputs)
        return [_wide(output) - _wide(x) * float(self.input_share[i]) for output in outputs]

    def whole(self, i: int, rest: Tensor, position: Position) -> Tensor:
        """Return the input of the noise scheduler, copies included, for combined residuals of the branches.

        Args:
            i: The step.
            rest: The guided combination of the branches' residuals, copies included.
            position: The point that the run has reached.
        """
        if self.input_share is None:
            return rest
        return rest + self._with_copies(self.input(i, position)) * float(self.input_share[i] * sum(self.guidance[i]))

    def recorded_residuals(self, i: int) -> list[Tensor]:
        """Return the residuals of the full run's branch outputs at step ``i``."""
        x = self.steps[i].calls[0].input
        own = within(x[: len(self._handed(i))], self.place or ())
        return self.residuals(i, self.recorded(i), self._like_handed(i, own))

    def guided(self, i: int, outputs: Sequence[Tensor]) -> Tensor:
        """Return the guided output for these branch outputs: the noise scheduler's input, without copies."""
        combined = _wide(outputs[0]) * self.guidance[i][0]
        for output, g in zip(outputs[1:], self.guidance[i][1:], strict=True):
            combined = combined + _wide(output) * g
        if self.rescaled_branch is not None:
            combined = combined * _rescaling(_wide(outputs[self.rescaled_branch]), combined)
        return combined.to(self._handed(i).dtype)

    def rescaling(self, i: int) -> Tensor:
        """Return the factor by which the full run's guided vectors were rescaled, in a shape that broadcasts."""
        if self.rescaled_branch is None:
            return torch.ones((), dtype=torch.double, device=self._handed(i).device)
        outputs = [output.double() for output in self.recorded(i)]
        combined = sum((o * g for o, g in zip(outputs, self.guidance[i], strict=True)), torch.zeros_like(outputs[0]))
        return _rescaling(outputs[self.rescaled_branch], combined)

    def move(self, i: int, position: Position, guided: Tensor) -> Position:
        """Return the position after step ``i`` with this guided output (without copies)."""
        return position.moved(self.steps[i], self._with_copies(guided))

    def affine(self, i: int, position: Position, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Describe the next state as an affine function of the guided output.

        Args:
            i: The step.
            position: The point that the run has reached.
            near: At nonlinear steps, the output near which the function holds. None: the full run's output.

        Returns:
            The state for output 0, and the gain: one number. At nonlinear steps it is one number per element, without
            copies.
        """
        wide = position.widened
        like = _wide(self._handed(i) if near is None else near.to(torch.float32))
        if i not in self.nonlinear_steps:
            at_zero = self.move(i, wide, torch.zeros_like(like)).state.double()
            return at_zero, (self.move(i, wide, torch.ones_like(like)).state.double() - at_zero).mean()
        nudge = (COARSE if near is None else FINE) * like.abs().mean()
        above, below = (self.move(i, wide, like + n).state.double() for n in (nudge, -nudge))
        gain = (above - below) / (2 * nudge)
        return self.move(i, wide, like).state.double() - gain * self._with_copies(like), gain[: len(like)]

    # -------------------------------------------------------- other levels

    def with_steps(self, trajectory: Trajectory) -> Replay:
        """Return the loop of ``trajectory``, which has other timesteps, references and noise levels.

        The stages that were identified from this recording are the same there.
        """
        other = copy.copy(self)
        other.trajectory, other.steps = trajectory, trajectory.steps
        other._feeds = [
            [new for new, old in zip(step.feeds, own.feeds, strict=True) if any(old is f for f in feeds)]
            for step, own, feeds in zip(other.steps, self.steps, self._feeds, strict=True)
        ]
        return other

    def taken_over(self, position: Position) -> Position:
        """Return a position of the same loop on other noise levels, continued on the levels of this one.

        The levels of both may differ only from this position on.
        """
        scheduler = _fork(position.scheduler)
        for name in ("sigmas", "timesteps"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(self.trajectory.scheduler, name))
        return Position(position.state, scheduler)

    # -------------------------------------------------------- identification

    def _handed(self, i: int) -> Tensor:
        """Return the noise scheduler's input in the full run at step ``i``, without copies."""
        tensor = self.steps[i].model_output
        assert tensor is not None
        return tensor[: len(tensor) // self.batch_copies]

    def _with_copies(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` [N, …] as the state holds it, [copies · N, …]."""
        return torch.cat([tensor] * self.batch_copies) if self.batch_copies > 1 else tensor

    def _split(self, i: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per branch, cut to the guided output's shape.

        Learned variances and condition tokens are dropped.
        """
        like = self._handed(i)
        parts = [part for output in outputs for part in self.layout.split(output)]
        found = [self._like_handed(i, part) for part in parts]
        for part, cut in zip(parts, found, strict=True):
            if cut.shape != like.shape:
                raise NotReplayable(f"an output {tuple(part.shape)} does not make a guided output {tuple(like.shape)}.")
        return found

    def _like_handed(self, i: int, tensor: Tensor) -> Tensor:
        """Return ``tensor`` cut to the guided output's shape: no learned variances, no condition channels."""
        like = self._handed(i)
        for d in range(1, like.ndim if tensor.ndim == like.ndim else 0):
            tensor = tensor.narrow(d, 0, min(like.shape[d], tensor.shape[d]))
        return tensor

    def _guidance(self) -> list[list[float]]:
        """Find the weights of the branches in the guided output at each step, by least squares.

        One set of weights is used for all steps if it explains them all, because one step does not determine them where
        the branches hardly differ.

        Raises:
            NotReplayable: No such weights explain the guided output.
        """
        tables, handed = [], []
        for i in range(len(self.steps)):
            target = self._handed(i).double().flatten()
            rows = torch.stack([*(part.double().flatten() for part in self.recorded(i)), target])
            table = (rows @ rows.T).cpu().numpy()
            tables.append(table)
            handed.append(max(table[-1, -1], 1e-24))
        relative = [table / size for table, size in zip(tables, handed, strict=True)]
        shared = _mix(sum(relative))
        if all(_missed(table, shared) < self._tolerance for table in relative):
            return [shared.tolist()] * len(self.steps)
        weights = [_mix(table) for table in relative]
        worst = max(_missed(table, w) for table, w in zip(relative, weights, strict=True))
        if worst < self._tolerance:
            return [w.tolist() for w in weights]
        if self.branches == 2:
            both = self._rescaled_weights()
            for self.rescaled_branch in range(2):
                self.guidance = [both] * len(self.steps)
                if all(self._close(self.guided(i, self.recorded(i)), self._handed(i)) for i in range(len(self.steps))):
                    return self.guidance
        raise NotReplayable(f"the guided output is not a linear combination of the branches (error {worst:.1e}).")

    def _rescaled_weights(self) -> list[float]:
        """Find the weights of two branches, which add up to 1 or −1, in vectors that were rescaled afterwards.

        Each vector yields weights by least squares; the result is their median.
        """
        found = []
        for i in range(len(self.steps)):
            a, b = (part.double() for part in self.recorded(i))
            t = self._handed(i).double()
            aa, ab, bb, at, bt = ((x * y).sum(-1).flatten() for x, y in ((a, a), (a, b), (b, b), (a, t), (b, t)))
            found.append(torch.stack([bb * at - ab * bt, aa * bt - ab * at]) / (aa * bb - ab * ab))
        first, second = torch.cat(found, 1)
        sign = float((first + second).nanmedian().sign())
        share = float((first / (first + second)).nanmedian())
        return [sign * share, sign * (1 - share)]

    def _input(self, i: int, recorded: Any, position: Position) -> Tensor:
        """Return the denoiser's main input for this state, built as the recorded one was."""
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
        place = self.place  # for other networks that take the state: its place in the denoiser's input, if it fits
        if not place or any(recorded.shape[s.dim] < s.start + s.length for s in place) or x.ndim != recorded.ndim:
            place = None
        differing = [d for d in range(1, x.ndim) if x.ndim == recorded.ndim and x.shape[d] != recorded.shape[d]]
        if place is None and (len(differing) != 1 or x.shape[differing[0]] > recorded.shape[differing[0]]):
            raise NotReplayable(f"a state {tuple(x.shape)} does not make an input {tuple(recorded.shape)}.")
        return put(x, recorded, place or (Span(differing[0], 0, x.shape[differing[0]]),))

    def _check(self, i: int, position: Position) -> Position:
        """Check that the stages explain recorded step ``i`` and that the next step continues from its result.

        Returns:
            The position after the step.
        """
        step = self.steps[i]
        assert step.result is not None
        for call in step.calls:
            if not self._is_input(i, call.input, position):
                raise NotReplayable("the denoiser's input is not the state after scaling, repetition or concatenation.")
        self._feeds.append([f for f in step.feeds if self._is_fed_by_the_state(i, f, position)])
        guided = self.guided(i, self.recorded(i))
        after = self.move(i, position, guided)
        if not self._close(after.state, step.result):
            drawn = not self._close(self.move(i, position, guided).state, after.state)
            raise NotReplayable(
                "the noise scheduler draws noise that a repeated run does not get: not from the generator of the call."
                if drawn
                else "repeating a noise-scheduler step gives another result: the step depends on more than the state, "
                "the model output and what the noise scheduler keeps."
            )
        following = self.steps[i + 1].state if i + 1 < len(self.steps) else step.result
        assert following is not None
        if not self._close(step.result, following):
            raise NotReplayable("the pipeline changes the state between two steps.")
        at_zero, gain = self.affine(i, position)
        moved = self.move(i, position.widened, _wide(guided)).state.double() - at_zero.double()
        if _far(self._with_copies(guided).double() * gain, moved) > TOLERANCE:
            self.nonlinear_steps.add(i)
        return Position(following, after.scheduler)

    def _is_input(self, i: int, recorded: Any, position: Position) -> bool:
        return self._close(self._input(i, recorded, position), recorded)

    def _is_fed_by_the_state(self, i: int, feed: Forward, position: Position) -> bool:
        """Return whether a feeding network's input is built from the state. If not, its recorded output is used."""
        try:
            return self._is_input(i, feed.input, position)
        except NotReplayable:
            return False

    def _close(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and _far(a, b) <= self._tolerance

    @property
    def _tolerance(self) -> float:
        """TOLERANCE, or one rounding of the coarsest number type in the loop if that is more."""
        step = self.steps[0]
        types = {t.dtype for t in (step.state, step.model_output, step.calls[0].output) if t is not None}
        return max(TOLERANCE, *(torch.finfo(t).eps for t in types))


def _demand_batches(steps: Sequence[LoopStep]) -> None:
    tensors = [t for s in steps for t in (s.state, s.model_output, *(c.output for c in s.calls))]
    if any(t is None or t.ndim < 2 or len(t) == 0 for t in tensors):
        raise NotReplayable("states or outputs are not batches of samples.")
    if any(len(c.outputs) != 1 for s in steps for c in s.calls):
        raise NotReplayable("the denoiser returns several tensors.")
    if any(isinstance(v, Tensor) and v.ndim for s in steps for v in s.extra.values()):
        raise NotReplayable("the pipeline itself carries tensors from one noise-scheduler step to the next.")
    if any(len(c.output) % len(s.model_output) for s in steps for c in s.calls if s.model_output is not None):
        raise NotReplayable("outputs and guided outputs differ in their number of samples.")


def _batch_copies(step: LoopStep) -> int:
    """Return 2 if the state holds every sample twice and one forward computes both as different branches, else 1."""
    assert step.state is not None
    assert step.model_output is not None
    if len(step.calls) == 1 and len(step.state) % 2 == 0 and len(step.calls[0].output) == len(step.model_output):
        (a, b), (c, d) = step.state.chunk(2), step.calls[0].output.chunk(2)
        return 2 if torch.equal(a, b) and not torch.equal(c, d) else 1
    return 1


def _fork(scheduler: Any) -> Any:
    """Return a copy of a noise scheduler that can step independently. It is far quicker to make than a deep copy.

    Noise schedulers replace the tensors in their lists and do not write into them, so the copy shares these. Tensors in
    attributes are copied, because PNDM adds to such a tensor in place. A ``step`` in the instance's dictionary is a
    wrapper of the original, and would step the original; the copy does not get it.
    """
    twin = copy.copy(scheduler)
    twin.__dict__.pop("step", None)
    for name, value in vars(twin).items():
        if isinstance(value, list):
            twin.__dict__[name] = list(value)
        elif isinstance(value, Tensor):
            twin.__dict__[name] = value.clone()
    return twin


def _rescaling(like: Tensor, combined: Tensor) -> Tensor:
    """Return the length of the vectors of ``like`` relative to those of ``combined``."""
    return (like.square().sum(-1, keepdim=True) / combined.square().sum(-1, keepdim=True)).sqrt()


def _mix(table: np.ndarray) -> np.ndarray:
    """Return the least-squares weights of all tensors but the last, for the last, from their inner products."""
    return np.asarray(np.linalg.lstsq(table[:-1, :-1], table[:-1, -1], rcond=1e-12)[0])


def _missed(table: np.ndarray, weights: np.ndarray) -> float:
    """Return the share of the last tensor's norm that these weights leave unexplained, from inner products."""
    rest = np.append(weights, -1.0)
    return float(np.sqrt(max(rest @ table @ rest, 0.0)))


def _far(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ relative to ‖b‖. Norms far below 1e-12 count as 0."""
    return float((a.double() - b.double()).norm() / (b.double().norm() + 1e-12))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
