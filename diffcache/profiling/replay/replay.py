"""A recorded sampling loop, made runnable on its own: any step can be entered with any state, computed or predicted.

The loop of a pipeline is (input from state) -> denoiser, once per branch -> guided output -> noise scheduler. The
first and third stages live in pipeline code that cannot be called alone, so they are identified from the recording:
the input is the state itself, scaled, repeated or with condition channels around it; the guided output is a linear
combination of the branches, its vectors perhaps stretched to the length of one branch's. Each identification is checked
on every recorded step; a loop that does not fit says so (``NotReplayable``), and planning falls back to what needs no
replay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.errors import DiffCacheError
from diffcache.executor.store import channel_dim
from diffcache.host.channels import Span, carries, find_sample, put, within
from diffcache.profiling.recording.record import Forward, LoopStep, Trajectory, frozen

COARSE, FINE = 0.1, 1e-3  # shares of the output's size that it is moved by, to see what the next state does
TOLERANCE = 1e-3  # relative error up to which a recorded tensor counts as explained; one rounding, if that is more


class NotReplayable(DiffCacheError):  # noqa: N818  says what happened, as the public errors do
    """The pipeline does something around its denoiser that cannot be repeated from what was recorded."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a replayed run stands: the state about to be denoised, and the noise scheduler with its memory."""

    state: Tensor
    scheduler: Any

    def moved(self, step: LoopStep, model_output: Tensor) -> Position:
        """After one ``scheduler.step``; this position stays valid, and noise that was drawn is drawn again."""
        scheduler = _fork(self.scheduler)
        extra = {name: frozen(value) for name, value in step.extra.items()}
        result = scheduler.step(model_output, step.timestep, self.state, **extra, return_dict=False)[0]
        return Position(result, scheduler)

    @property
    def widened(self) -> Position:
        """The same with a state of float32 at least: differences of states come out unrounded."""
        return Position(_wide(self.state), self.scheduler)


class Replay:
    """One trajectory. Steps count from 0 at the loop's first iteration.

    branches    number of denoiser outputs that guidance combines
    in_batch    how many of them share one forward
    begins      steps at which another denoiser takes over, the first included
    guidance    per step, the weights of the branches in the guided output
    stretched   the branch whose vectors, along the last axis, give the guided output's their length; None: they keep it
    place       where the state lies in the denoiser's input, which may hold conditions as well
    bent        steps at which the noise scheduler is not affine in the guided output (it clips)
    slopes      float64 [steps]: how much of its input is taken off each output before outputs are combined, or None
    rows        indices of the samples that a fit or a score looks at; None: all. The whole batch runs either way
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.steps = [s for s in trajectory.steps if s.model_output is not None]
        if not self.steps or any(s.result is None for s in self.steps):
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
            raise NotReplayable("the state is no floating-point tensor: tokens, for example.")
        self.begins = trajectory.begins
        self.copies = _copies(self.steps[-1])  # DiT-like pipelines carry a sample once per branch in the state itself
        self.in_batch = max(1, len(first.calls[0].output) * self.copies // len(first.model_output))
        self.branches = len(first.calls) * self.in_batch
        x, state = first.calls[0].input, first.state
        self.place = find_sample(x, state) if isinstance(x, Tensor) and isinstance(state, Tensor) else None
        self.stretched: int | None = None
        self.guidance = self._guidance()
        self.bent: set[int] = set()
        self.slopes: np.ndarray | None = None
        self.rows: np.ndarray | None = None
        self._feeds: list[list[Forward]] = []
        position = self.start
        for i in range(len(self.steps)):
            position = self._check(i, position)
        again = zip(self.compute(0, self.start), self.recorded(0), strict=True)
        if not all(self._close(new, old) for new, old in again):
            raise NotReplayable("the network, called once more with what it was given, returns something else.")

    @property
    def channels(self) -> int:
        """Of the denoiser's output."""
        output = self.steps[0].calls[0].output
        return int(output.shape[channel_dim(output)])

    @property
    def batch(self) -> int:
        """Number of samples in the recorded run."""
        return len(self.reference(0)) // self.copies

    @property
    def samples(self) -> int:
        """Number of samples that a fit or a score looks at."""
        return self.batch if self.rows is None else len(self.rows)

    def part(self, rows: np.ndarray) -> Replay:
        """Return the same run with only the samples ``rows`` (int [n]) looked at. Samples of a batch do not depend on
        each other, so one recorded batch can be split into samples that are fitted and samples that are not."""
        other = copy.copy(self)
        other.rows = None if len(rows) == self.batch else rows
        return other

    def looked_at(self, tensor: Tensor) -> Tensor:
        """Return the samples of ``tensor`` [N, …], or [copies · N, …], that a fit or a score looks at, each once."""
        once = tensor[: self.batch]
        return once if self.rows is None else once[torch.as_tensor(self.rows, device=once.device)]

    @property
    def inputs_repeat(self) -> bool:
        """Whether branches that share a forward are given the same main input, whatever else sets them apart."""
        x = self.steps[0].calls[0].input
        parts = x.chunk(self.in_batch)
        return all(torch.equal(parts[0], part) for part in parts[1:])

    @property
    def start(self) -> Position:
        state = self.steps[0].state
        assert state is not None
        scheduler = _fork(self.trajectory.scheduler)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True  # the recorded run did; without it every step would warn
        return Position(state, scheduler)

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
        step = self.steps[i]
        with torch.no_grad():
            fresh: dict[int, Tensor] = {}
            for feed in self._feeds[i]:
                again = feed.again(self._input(i, feed.input, position))
                fresh |= {id(old): new for old, new in zip(feed.outputs, again, strict=True)}
            return self._split(i, [c.again(self._input(i, c.input, position), fresh)[0] for c in step.calls])

    def sloped(self, slopes: np.ndarray) -> Replay:
        """The same run, with outputs combined less so much of their inputs."""
        other = copy.copy(self)
        other.slopes = slopes
        return other

    def input(self, i: int, position: Position) -> Tensor:
        """x of equation (1): what the denoiser is given of the state, once per sample, in the guided output's shape."""
        x = position.state
        if hasattr(position.scheduler, "scale_model_input"):
            x = _fork(position.scheduler).scale_model_input(x, self.steps[i].timestep)
        given = self.steps[i].calls[0].input
        return self._like_handed(i, x[: len(x) // self.copies].to(given.dtype))

    @property
    def paired(self) -> bool:
        """Whether an accelerated run can tell which part of the denoiser's input belongs to its output."""
        return all(
            isinstance(call.input, Tensor) and carries(call.input.shape, call.output.shape, self.place)
            for call in self.steps[0].calls
        )

    def rests(self, i: int, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Branch outputs of step ``i`` less what of them is taken to be their input ``x``."""
        if self.slopes is None:
            return list(outputs)
        return [_wide(output) - _wide(x) * float(self.slopes[i]) for output in outputs]

    def whole(self, i: int, rest: Tensor, position: Position) -> Tensor:
        """What is handed to the noise scheduler, copies included, where ``rest`` is what the branches' rests make."""
        if self.slopes is None:
            return rest
        return rest + self._spread(self.input(i, position)) * float(self.slopes[i] * sum(self.guidance[i]))

    def recorded_rests(self, i: int) -> list[Tensor]:
        """Those of the full run."""
        x = self.steps[i].calls[0].input
        own = within(x[: len(self._handed(i))], self.place or ())
        return self.rests(i, self.recorded(i), self._like_handed(i, own))

    def guided(self, i: int, outputs: Sequence[Tensor]) -> Tensor:
        """What the pipeline hands to the noise scheduler for these branch outputs (without the state's copies)."""
        combined = _wide(outputs[0]) * self.guidance[i][0]
        for output, g in zip(outputs[1:], self.guidance[i][1:], strict=True):
            combined = combined + _wide(output) * g
        if self.stretched is not None:
            combined = combined * _stretch(_wide(outputs[self.stretched]), combined)
        return combined.to(self._handed(i).dtype)

    def stretch(self, i: int) -> Tensor:
        """By how much the full run's guided vectors were stretched, in a shape that broadcasts against them."""
        if self.stretched is None:
            return torch.ones((), dtype=torch.double, device=self._handed(i).device)
        outputs = [output.double() for output in self.recorded(i)]
        combined = sum((o * g for o, g in zip(outputs, self.guidance[i], strict=True)), torch.zeros_like(outputs[0]))
        return _stretch(outputs[self.stretched], combined)

    def move(self, i: int, position: Position, guided: Tensor) -> Position:
        return position.moved(self.steps[i], self._spread(guided))

    def affine(self, i: int, position: Position, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next state as an affine function of the guided output: (state for output 0, gain).

        The gain is one number. Where the noise scheduler clips, it is one number per element (without copies), and the
        function holds near the full run's output, or ``near`` another one.
        """
        wide = position.widened
        like = _wide(self._handed(i) if near is None else near.to(torch.float32))
        if i not in self.bent:
            at_zero = self.move(i, wide, torch.zeros_like(like)).state.double()
            return at_zero, (self.move(i, wide, torch.ones_like(like)).state.double() - at_zero).mean()
        nudge = (COARSE if near is None else FINE) * like.abs().mean()
        above, below = (self.move(i, wide, like + n).state.double() for n in (nudge, -nudge))
        gain = (above - below) / (2 * nudge)
        return self.move(i, wide, like).state.double() - gain * self._spread(like), gain[: len(like)]

    # -------------------------------------------------------- other levels

    def with_steps(self, trajectory: Trajectory) -> Replay:
        """The same loop with other timesteps, references and a noise scheduler of other levels: what was identified of
        the pipeline holds there too."""
        other = copy.copy(self)
        other.trajectory, other.steps = trajectory, trajectory.steps
        other._feeds = [
            [new for new, old in zip(step.feeds, own.feeds, strict=True) if any(old is f for f in feeds)]
            for step, own, feeds in zip(other.steps, self.steps, self._feeds, strict=True)
        ]
        return other

    def taken_over(self, position: Position) -> Position:
        """A position of this loop on other levels, which differ from here on only."""
        scheduler = _fork(position.scheduler)
        for name in ("sigmas", "timesteps"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(self.trajectory.scheduler, name))
        return Position(position.state, scheduler)

    # -------------------------------------------------------- identification

    def _handed(self, i: int) -> Tensor:
        """What the full run handed to the noise scheduler at step ``i``, without copies."""
        tensor = self.steps[i].model_output
        assert tensor is not None
        return tensor[: len(tensor) // self.copies]

    def _spread(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.copies) if self.copies > 1 else tensor

    def _split(self, i: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per branch, cut to the guided output's shape: learned variances and condition tokens fall away."""
        like = self._handed(i)
        parts = [part for output in outputs for part in output.chunk(self.in_batch)]
        found = [self._like_handed(i, part) for part in parts]
        for part, cut in zip(parts, found, strict=True):
            if cut.shape != like.shape:
                raise NotReplayable(f"an output {tuple(part.shape)} does not make a guided output {tuple(like.shape)}.")
        return found

    def _like_handed(self, i: int, tensor: Tensor) -> Tensor:
        """``tensor`` without what it has beyond the guided output: learned variances, condition channels."""
        like = self._handed(i)
        for d in range(1, like.ndim if tensor.ndim == like.ndim else 0):
            tensor = tensor.narrow(d, 0, min(like.shape[d], tensor.shape[d]))
        return tensor

    def _guidance(self) -> list[list[float]]:
        """Weights of the branches in the guided output at each step, by least squares: one set for all steps if it
        explains them all, for where branches hardly differ a step alone cannot tell them apart."""
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
            both = self._stretched_weights()
            for self.stretched in range(2):
                self.guidance = [both] * len(self.steps)
                if all(self._close(self.guided(i, self.recorded(i)), self._handed(i)) for i in range(len(self.steps))):
                    return self.guidance
        raise NotReplayable(f"the guided output is no linear combination of the branches (error {worst:.1e}).")

    def _stretched_weights(self) -> list[float]:
        """Weights, one the other's complement, of two branches in vectors whose length was changed afterwards: those
        that most vectors, each by least squares, agree on."""
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
        place = self.place  # of other networks that see the state, where it lies in the denoiser's input if it can
        if not place or any(recorded.shape[s.dim] < s.start + s.length for s in place) or x.ndim != recorded.ndim:
            place = None
        differing = [d for d in range(1, x.ndim) if x.ndim == recorded.ndim and x.shape[d] != recorded.shape[d]]
        if place is None and (len(differing) != 1 or x.shape[differing[0]] > recorded.shape[differing[0]]):
            raise NotReplayable(f"a state {tuple(x.shape)} does not make an input {tuple(recorded.shape)}.")
        return put(x, recorded, place or (Span(differing[0], 0, x.shape[differing[0]]),))

    def _check(self, i: int, position: Position) -> Position:
        """The stages explain recorded step ``i``, and the next one starts where it ended; returns where that is."""
        step = self.steps[i]
        assert step.result is not None
        for call in step.calls:
            if not self._is_input(i, call.input, position):
                raise NotReplayable("the denoiser's input is not the state, scaled, repeated or with more around it.")
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
        if _far(self._spread(guided).double() * gain, moved) > TOLERANCE:
            self.bent.add(i)
        return Position(following, after.scheduler)

    def _is_input(self, i: int, recorded: Any, position: Position) -> bool:
        return self._close(self._input(i, recorded, position), recorded)

    def _is_fed_by_the_state(self, i: int, feed: Forward, position: Position) -> bool:
        """If not, what it gave is taken as recorded."""
        try:
            return self._is_input(i, feed.input, position)
        except NotReplayable:
            return False

    def _close(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and _far(a, b) <= self._tolerance

    @property
    def _tolerance(self) -> float:
        """TOLERANCE, or one rounding of the coarsest number type on the way."""
        step = self.steps[0]
        types = {t.dtype for t in (step.state, step.model_output, step.calls[0].output) if t is not None}
        return max(TOLERANCE, *(torch.finfo(t).eps for t in types))


def _demand_batches(steps: Sequence[LoopStep]) -> None:
    tensors = [t for s in steps for t in (s.state, s.model_output, *(c.output for c in s.calls))]
    if any(t is None or t.ndim < 2 or len(t) == 0 for t in tensors):
        raise NotReplayable("states or outputs are no batches of samples.")
    if any(len(c.outputs) != 1 for s in steps for c in s.calls):
        raise NotReplayable("the denoiser returns several tensors.")
    if any(isinstance(v, Tensor) and v.ndim for s in steps for v in s.extra.values()):
        raise NotReplayable("the pipeline itself carries tensors from one noise-scheduler step to the next.")
    if any(len(c.output) % len(s.model_output) for s in steps for c in s.calls if s.model_output is not None):
        raise NotReplayable("outputs and guided outputs differ in their number of samples.")


def _copies(step: LoopStep) -> int:
    """2 if the state holds every sample twice and one forward serves both as different branches, else 1."""
    assert step.state is not None
    assert step.model_output is not None
    if len(step.calls) == 1 and len(step.state) % 2 == 0 and len(step.calls[0].output) == len(step.model_output):
        (a, b), (c, d) = step.state.chunk(2), step.calls[0].output.chunk(2)
        return 2 if torch.equal(a, b) and not torch.equal(c, d) else 1
    return 1


def _fork(scheduler: Any) -> Any:
    """A copy that can step on its own, far quicker to make than a deep one.

    Noise schedulers replace the tensors in their lists, never write into them, so those are shared; what they hold
    directly is copied, for PNDM adds to such a tensor in place. A step of the instance's own (somebody's wrapper)
    belongs to the original and would move that.
    """
    twin = copy.copy(scheduler)
    twin.__dict__.pop("step", None)
    for name, value in vars(twin).items():
        if isinstance(value, list):
            twin.__dict__[name] = list(value)
        elif isinstance(value, Tensor):
            twin.__dict__[name] = value.clone()
    return twin


def _stretch(like: Tensor, combined: Tensor) -> Tensor:
    """By how much the vectors of ``combined`` are shorter than those of ``like``."""
    return (like.square().sum(-1, keepdim=True) / combined.square().sum(-1, keepdim=True)).sqrt()


def _mix(table: np.ndarray) -> np.ndarray:
    """Least-squares weights of all but the last of the tensors whose inner products these are, for the last."""
    return np.asarray(np.linalg.lstsq(table[:-1, :-1], table[:-1, -1], rcond=1e-12)[0])


def _missed(table: np.ndarray, weights: np.ndarray) -> float:
    """How much of the last tensor these weights leave unexplained, by its inner products relative to its own."""
    rest = np.append(weights, -1.0)
    return float(np.sqrt(max(rest @ table @ rest, 0.0)))


def _far(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ relative to b; what is closer than 1e-12 is no distance."""
    return float((a.double() - b.double()).norm() / (b.double().norm() + 1e-12))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
