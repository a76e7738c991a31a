"""Few-step solvers with trained coefficients, for ``methods.py``: DyWeight and S4S, as noise schedulers of diffusers.

A solver calls the network as often as its budget allows, and caches nothing. Its coefficients are trained by
backpropagation through the whole sampling loop. The loss is the mean squared error of the final latents, compared with
those of the full run from the same noise. The pipeline itself runs the loop, so the solver sees the guided output.

``DyWeight`` follows arXiv 2603.11607 and Westlake-AGI-Lab/DyWeight @620534e (``models/flux/dyweight.py``,
``dyweight_flux/train_example.yaml``): free weights of the newest two outputs, and a scale of the level that the network
is given. The weights of a step need not add up to 1. Their sum moves the level from which the next step begins.

``S4S`` follows arXiv 2502.17423 in the form that arXiv 2510.17699 (Table 1) gives: free coefficients of the newest
three predictions of the clean sample, a trained grid, and a correction of the levels that the network is given.
``trained`` alternates between coefficients and levels (S4S-Alt). It relaxes the objective: the noise of each
calibration sample may move within a small ball. The grid and the ball are those of LD3 (vinhsuhi/LD3 @9e4a66f).

Some parts are a reading. DyWeight's source combines velocities over noise levels; with DDIM, the level is an angle and
a step is a rotation, so that the untrained solver is DDIM. Of S4S only the abstract and the form above were read. The
papers train on thousands of samples, and this module for given seconds. Therefore Adam runs without weight decay, with
the rates below and one cosine over the seconds. The radius of the ball is a choice of this module.
"""

from __future__ import annotations

import abc
import contextlib
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from safetensors.torch import load_file, save
from torch import Tensor

from diffcache.documents import files
from diffcache.profiling.recording import final_states, with_copied_generators

RATE = 5e-3  # of Adam, for weights and coefficients
LEVEL_RATE = 2e-2  # of Adam, for scales, grids and corrections of levels: they are logits, or shares of a step
PHASES = 8  # of S4S-Alt: coefficients and levels take turns
BALL = 0.01  # how far a calibration sample's noise may move, as a share of the length of the noise
NOISE_RATE = 0.1  # of the step that moves the noise, as a share of the ball
MOST_NORM = 1.0  # of the gradient


@dataclass(frozen=True, slots=True)
class Levels:
    """Noise levels of a process, by one number u that falls to 0.

    Attributes:
        kind: "flow": state = (1 − u) · clean + u · noise. "angle": state = cos u · clean + sin u · noise.
        even: float64 [steps + 1], the levels of the pipeline's noise scheduler at this number of steps, and the end.
        angles: float64 [training steps], u of each training timestep. Empty for "flow".
        timesteps: The number of training timesteps.
    """

    kind: Literal["flow", "angle"]
    even: Tensor
    angles: Tensor
    timesteps: int

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Levels:
        """Return the levels of a noise scheduler.

        Args:
            scheduler: FlowMatchEulerDiscreteScheduler, or DDIMScheduler with the prediction type ``v_prediction``.
            steps: The number of steps.

        Raises:
            ValueError: For another noise scheduler.
        """
        name, config = type(scheduler).__name__, scheduler.config
        own = type(scheduler).from_config(config)
        if name == "FlowMatchEulerDiscreteScheduler" and not config.use_dynamic_shifting:
            own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())  # as FluxPipeline does
            return cls("flow", own.sigmas.double(), torch.zeros(0, dtype=torch.float64), config.num_train_timesteps)
        if name == "DDIMScheduler" and config.prediction_type == "v_prediction" and config.set_alpha_to_one:
            clean = own.alphas_cumprod.double()
            angles = torch.atan2((1 - clean).sqrt(), clean.sqrt())
            own.set_timesteps(steps)
            even = torch.cat([angles[own.timesteps], torch.zeros(1, dtype=torch.float64)])
            return cls("angle", even, angles, config.num_train_timesteps)
        raise ValueError(
            f"{name} with prediction type {config.get('prediction_type')!r} has no trained solver; use "
            f"FlowMatchEulerDiscreteScheduler without dynamic shifting, or DDIMScheduler with v_prediction and "
            f"set_alpha_to_one"
        )

    def timestep(self, level: Tensor) -> Tensor:
        """Return the timesteps that the network takes for levels. Between training timesteps they are interpolated."""
        if self.kind == "flow":
            return level * self.timesteps
        after = torch.searchsorted(self.angles, level.detach().contiguous()).clamp(1, len(self.angles) - 1)
        low, high = self.angles[after - 1], self.angles[after]
        return (after - 1 + (level - low) / (high - low)).clamp(0, self.timesteps - 1)

    def shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the clean sample and of the noise in a state."""
        return (1 - level, level) if self.kind == "flow" else (level.cos(), level.sin())

    def clean(self, state: Tensor, output: Tensor, level: Tensor) -> Tensor:
        """Return the prediction of the clean sample that an output (a velocity) stands for."""
        clean, noise = (share.to(state.dtype) for share in self.shares(level))
        return state - noise * output if self.kind == "flow" else clean * state - noise * output

    def along(self, state: Tensor, velocity: Tensor, by: Tensor) -> Tensor:
        """Return the state after a step of ``by`` along a velocity: one step of Euler, or of DDIM."""
        if self.kind == "flow":
            return state + by.to(state.dtype) * velocity
        return by.cos().to(state.dtype) * state + by.sin().to(state.dtype) * velocity

    def towards(self, state: Tensor, clean: Tensor, level: Tensor, after: Tensor) -> Tensor:
        """Return the state at ``after`` on the straight way from ``state`` at ``level`` to a clean sample."""
        (now_clean, now_noise), (then_clean, then_noise) = self.shares(level), self.shares(after)
        kept = then_noise / now_noise
        return kept.to(state.dtype) * state + (then_clean - now_clean * kept).to(state.dtype) * clean


class TrainedSolver(SchedulerMixin, ConfigMixin, abc.ABC):
    """A noise scheduler with trained coefficients.

    Args:
        scheduler: The pipeline's noise scheduler. Its configuration is taken over.
        steps: The number of steps. No other number can be run.

    Attributes:
        coefficients: Name -> float64 tensor. What is combined.
        corrections: Name -> float64 tensor. What moves levels.
        noise: Offset of the first state, [samples, …], or None.
        stop: Whether to raise ``LoopEnded`` after the last step, so that nothing is decoded.
    """

    order = 1
    init_noise_sigma = 1.0
    window = 1  # the number of newest outputs that are combined
    alternates = False  # whether coefficients and levels are trained in turns, and the noise of samples may move

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.register_to_config(**dict(scheduler.config))
        self.levels = Levels.of(scheduler, steps)
        self.steps = steps
        self.coefficients: dict[str, Tensor] = {}
        self.corrections: dict[str, Tensor] = {}
        self.noise: Tensor | None = None
        self.stop = False
        self.timesteps = torch.zeros(0)
        self._kept: list[Tensor] = []
        self._index = 0
        self._state_levels = self._network_levels = self.levels.even

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        return self.coefficients | self.corrections

    @abc.abstractmethod
    def planned(self) -> tuple[Tensor, Tensor]:
        """Return the levels of the states [steps + 1] and those that the network is given [steps]."""

    @abc.abstractmethod
    def after(self, state: Tensor, output: Tensor, i: int) -> Tensor:
        """Return the state after step ``i``."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a loop. The levels of ``sigmas`` are replaced by those of the solver.

        Raises:
            ValueError: For another number of steps than the solver has.
        """
        asked = num_inference_steps if sigmas is None else len(sigmas)
        if asked != self.steps:
            raise ValueError(f"num_inference_steps is {asked}; this solver has {self.steps} steps: pass {self.steps}")
        self._state_levels, self._network_levels = self.planned()
        self.timesteps = self.levels.timestep(self._network_levels).float().to(device)
        self._kept, self._index = [], 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: the loop begins at the first step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the state as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the next state."""
        if self._index == 0:
            sample = self.moved(sample)
        state = self.after(sample, model_output, self._index)
        self._index += 1
        if self._index == self.steps and self.stop:
            raise LoopEnded(state)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def moved(self, sample: Tensor) -> Tensor:
        """Return the first state, moved by the offset ``noise``. DiT's state holds each sample once per branch."""
        if self.noise is None:
            return sample
        return sample + torch.cat([self.noise] * (len(sample) // len(self.noise)))

    def keep(self, output: Tensor) -> list[Tensor]:
        """Keep an output, and return the newest of the window, newest first."""
        self._kept = [output, *self._kept][: self.window]
        return self._kept


class LoopEnded(Exception):  # noqa: N818 it carries a result
    """Carries the last state out of a pipeline.

    Args:
        state: The last state.
    """

    def __init__(self, state: Tensor) -> None:
        super().__init__("the sampling loop has ended")
        self.state = state


class DyWeight(TrainedSolver):
    """Free weights of the newest outputs, and a scale of the network's level for each step.

    Without training it is Euler, or DDIM: the weight of the newest output is 1, and all scales are 1.
    """

    window = 2

    def __init__(self, scheduler: Any, steps: int) -> None:
        super().__init__(scheduler, steps)
        weights = torch.zeros(steps, self.window, dtype=torch.float64)  # newest first
        weights[:, 0] = 1
        self.coefficients = {"weights": weights}
        self.corrections = {"scales": torch.zeros(steps, dtype=torch.float64)}  # logits of a scale from 0.5 to 1.5

    def planned(self) -> tuple[Tensor, Tensor]:
        even, weights = self.levels.even, self.coefficients["weights"]
        states = [even[0]]
        for i in range(self.steps):
            used = weights[i, : i + 1].sum()
            states.append(states[i] + used * (even[i + 1] - states[i]))
        found = torch.stack(states)
        return found, found[:-1] * (0.5 + self.corrections["scales"].sigmoid())

    def after(self, state: Tensor, output: Tensor, i: int) -> Tensor:
        weights = self.coefficients["weights"][i].to(state.dtype)
        velocity = sum((w * kept for w, kept in zip(weights, self.keep(output), strict=False)), torch.zeros_like(state))
        return self.levels.along(state, velocity, self.levels.even[i + 1] - self._state_levels[i])


class S4S(TrainedSolver):
    """Free coefficients of the newest predictions of the clean sample, a free grid, and corrected network levels.

    Without training it is DPM-Solver++(2M) on the grid of the pipeline's noise scheduler.
    """

    window = 3
    alternates = True

    def __init__(self, scheduler: Any, steps: int) -> None:
        super().__init__(scheduler, steps)
        even = self.levels.even
        self.coefficients = {"coefficients": second_order(self.levels, self.window)}
        self.corrections = {
            "grid": (even[:-1] - even[1:]).log(),  # logits: a softmax makes the shares of the whole way
            "shifts": torch.zeros(steps, dtype=torch.float64),  # in shares of the shorter of the two steps around
        }

    def planned(self) -> tuple[Tensor, Tensor]:
        first, last = self.levels.even[0], self.levels.even[-1]
        lengths = self.corrections["grid"].softmax(0) * (first - last)
        inner = first - lengths.cumsum(0)[:-1]
        states = torch.cat([first[None], inner, last[None]])
        shorter = torch.minimum(lengths, torch.cat([lengths[:1], lengths[:-1]]))
        shifts = self.corrections["shifts"].clamp(-0.5, 0.5) * shorter
        return states, (states[:-1] + shifts).clamp(max=float(first))

    def after(self, state: Tensor, output: Tensor, i: int) -> Tensor:
        used = self.coefficients["coefficients"][i].to(state.dtype)
        kept = self.keep(self.levels.clean(state, output, self._network_levels[i]))
        clean = sum((c * one for c, one in zip(used, kept, strict=False)), torch.zeros_like(state))
        return self.levels.towards(state, clean, *self._state_levels[i : i + 2])


def second_order(levels: Levels, window: int) -> Tensor:
    """Return the coefficients of DPM-Solver++(2M) on the even grid, float64 [steps, window], newest first.

    The first and the last step have order 1, as in diffusers.
    """
    clean, noise = levels.shares(levels.even)
    length = (clean / noise).log().diff()  # of a step, in half the logarithm of the signal-to-noise ratio
    found = torch.zeros(len(length), window, dtype=torch.float64)
    found[:, 0] = 1
    for i in range(1, len(length) - 1):
        half = 0.5 * length[i] / length[i - 1]  # 0 after a step from pure noise, which is infinitely long
        found[i, 0], found[i, 1] = 1 + half, -half
    return found


SOLVERS: dict[str, type[TrainedSolver]] = {"dyweight": DyWeight, "s4s": S4S}


@dataclass(frozen=True, slots=True)
class Trained:
    """A solver and what its training cost.

    Attributes:
        solver: The solver.
        seconds: The seconds of the training, with the full runs that it is compared with.
        updates: The number of updates of the coefficients.
    """

    solver: TrainedSolver
    seconds: float
    updates: int

    def save(self, path: Path) -> None:
        """Write the coefficients to a safetensors file."""
        tensors = {name: value.detach().contiguous() for name, value in self.solver.parameters.items()}
        tensors["cost"] = torch.tensor([self.seconds, self.updates], dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, save(tensors))

    @classmethod
    def load(cls, path: Path, solver: TrainedSolver) -> Trained:
        """Read coefficients into an untrained solver of the same kind and number of steps.

        Raises:
            ValueError: If the file holds coefficients of another solver.
        """
        found = load_file(path)
        seconds, updates = found.pop("cost").tolist()
        if {name: value.shape for name, value in found.items()} != {n: v.shape for n, v in solver.parameters.items()}:
            raise ValueError(
                f"{path} holds no coefficients of {type(solver).__name__} with {solver.steps} steps; "
                f"delete the file, and it is made again"
            )
        for group in (solver.coefficients, solver.corrections):
            group.update({name: found[name] for name in group})
        return cls(solver, seconds, int(updates))


def trained(
    pipe: Any,
    solver: TrainedSolver,
    calls: Sequence[Mapping[str, Any]],
    seconds: float,
    *,
    updates: int | None = None,
    ball: float = BALL,
) -> Trained:
    """Train a solver on calls of a pipeline, in place.

    Args:
        pipe: The pipeline, with its own noise scheduler.
        solver: The solver.
        calls: Arguments of calls with as many steps as the full run has.
        seconds: The seconds that the training takes, with the full runs of the calls.
        updates: The number of updates, instead of the number that fits into ``seconds``.
        ball: For S4S, how far the noise of a sample may move, as a share of its length.
    """
    began = time.monotonic()
    ends = final_states(pipe, calls)
    runs = [{**call, "num_inference_steps": solver.steps} for call in calls]
    offsets: list[Tensor | None] = [
        torch.zeros_like(end[: len(call["generator"])]).requires_grad_() if solver.alternates and ball else None
        for end, call in zip(ends, calls, strict=True)
    ]
    optimizer = torch.optim.Adam(
        [
            {"params": [value.requires_grad_() for value in group.values()], "rate": rate}
            for group, rate in ((solver.coefficients, RATE), (solver.corrections, LEVEL_RATE))
        ]
    )
    done = 0
    with _attached(pipe, solver):
        while True:
            passed = (time.monotonic() - began) / seconds if updates is None else done / updates
            if passed >= 1:
                break
            for n, group in enumerate(optimizer.param_groups):
                turn = not solver.alternates or int(passed * PHASES) % 2 == n
                group["lr"] = group["rate"] * turn * 0.5 * (1 + math.cos(math.pi * passed))
            k = done % len(runs)
            solver.noise = offsets[k]
            end = _end(pipe, runs[k])
            optimizer.zero_grad()
            (end - ends[k]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(list(solver.parameters.values()), MOST_NORM)
            optimizer.step()
            offset = offsets[k]
            offsets[k] = None if offset is None else nearer(offset, ball)
            done += 1
    for value in solver.parameters.values():
        value.requires_grad_(False)
    solver.noise = None
    return Trained(solver, time.monotonic() - began, done)


def nearer(offset: Tensor, ball: float) -> Tensor:
    """Return the offset of the noise after a step against its gradient, within the ball around the noise.

    Args:
        offset: [samples, …], with a gradient or none.
        ball: The radius, as a share of the expected length of a sample's noise.
    """
    radius = ball * math.sqrt(offset[0].numel())

    def lengths(of: Tensor) -> Tensor:
        return of.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (of.ndim - 1))

    with torch.no_grad():
        new = offset.detach().clone()
        if offset.grad is not None:
            new -= NOISE_RATE * radius * offset.grad / lengths(offset.grad)
        new *= (radius / lengths(new)).clamp(max=1)
    return new.requires_grad_()


def _end(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    """Run the pipeline with gradients, and return the last state."""
    copied = {name: with_copied_generators(value) for name, value in call.items()}
    try:
        inspect.unwrap(type(pipe).__call__)(pipe, **copied)  # without the decorator that turns gradients off
    except LoopEnded as ended:
        return ended.state
    raise RuntimeError(f"{type(pipe).__name__} ended without its {call['num_inference_steps']} steps; check its loop")


@contextlib.contextmanager
def _attached(pipe: Any, solver: TrainedSolver) -> Iterator[None]:
    """Let the pipeline use a solver and stop after its loop. Its network gets no gradients, and moved first states."""

    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if solver._index or solver.noise is None:
            return args, kwargs
        if args:
            return (solver.moved(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": solver.moved(kwargs["hidden_states"])}

    own, wanted = pipe.scheduler, [(p, p.requires_grad) for p in pipe.transformer.parameters()]
    hook = pipe.transformer.register_forward_pre_hook(move, with_kwargs=True)
    pipe.scheduler, solver.stop = solver, True
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        pipe.scheduler, solver.stop = own, False
        hook.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
