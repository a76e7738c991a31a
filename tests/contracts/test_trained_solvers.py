"""Trained few-step solvers of the benchmarks: untrained they are known solvers, and steps and gradients are right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import trained_solvers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from trained_solvers import S4S, SOLVERS, DyWeight, Levels, Trained, TrainedSolver, nearer, trained

from diffcache.assets import NAMES, DemoModel, load
from diffcache.profiling.recording import final_states

STEPS = 4  # divides 1000, so DDIM's strides are whole numbers
FULL = 10
COSINE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> DemoModel:
    return load(request.param)


def calls(model: DemoModel, steps: int = FULL, count: int = 1) -> list[dict[str, Any]]:
    return [model.call([model.subjects[n]], [n], steps=steps) for n in range(count)]


def end(model: DemoModel, scheduler: Any, steps: int = STEPS) -> Tensor:
    own, model.pipe.scheduler = model.pipe.scheduler, scheduler
    try:
        return final_states(model.pipe, calls(model, steps))[0]
    finally:
        model.pipe.scheduler = own


def noise_scheduler(name: str) -> Any:
    """The demo models have the same."""
    return FlowMatchEulerDiscreteScheduler() if name == "flux" else DDIMScheduler(**COSINE)


# --- without training ------------------------------------------------------------------------------------------------


def test_dyweight_without_training_is_the_noise_scheduler(model: DemoModel) -> None:
    expected = end(model, model.pipe.scheduler)
    found = end(model, DyWeight(model.pipe.scheduler, STEPS))
    if model.about.family == "flux":
        assert torch.equal(found, expected)  # Euler: the same operations
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # DDIM: a rotation instead of four products


@pytest.mark.parametrize("kind", ["flux", "dit"])
def test_s4s_without_training_is_dpm_solver(kind: str) -> None:
    """A velocity that depends on the state stands for the network."""
    own = noise_scheduler(kind)
    solver = S4S(own, STEPS)
    if kind == "flux":
        known = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        known.set_timesteps(STEPS)
        known.sigmas = solver.levels.even.float()  # its formula on the grid of FluxPipeline
    else:
        known = DPMSolverMultistepScheduler.from_config(own.config)
        known.set_timesteps(STEPS)
    solver.set_timesteps(STEPS)
    state = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = found = state
    for i in range(STEPS):
        expected = known.step(expected.tanh() + 0.1 * i, known.timesteps[i], expected).prev_sample
        found = solver.step(found.tanh() + 0.1 * i, solver.timesteps[i], found).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - state).abs().max() > 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_a_coefficient_that_differs_is_noticed(model: DemoModel, name: str) -> None:
    """The two tests above compare something."""
    solver = SOLVERS[name](model.pipe.scheduler, STEPS)
    before = end(model, solver)
    next(iter(solver.coefficients.values()))[1, 1] += 0.02
    assert (end(model, solver) - before).abs().max() > 2e-3


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_levels_and_timesteps_agree(name: str) -> None:
    own = noise_scheduler(name)
    levels = Levels.of(own, 8)
    own.set_timesteps(8, **({"sigmas": np.linspace(1, 1 / 8, 8).tolist()} if name == "flux" else {}))
    torch.testing.assert_close(levels.timestep(levels.even[:-1]), own.timesteps.double(), rtol=0, atol=1e-4)
    assert levels.even[-1] == 0
    between = (levels.even[2] + levels.even[3]) / 2
    assert own.timesteps[3] < levels.timestep(between) < own.timesteps[2]
    clean, noise = levels.shares(levels.even)
    assert torch.allclose(clean + noise if name == "flux" else clean**2 + noise**2, torch.ones_like(clean))


# --- one step after another, against the formulas --------------------------------------------------------------------


def run(solver: TrainedSolver, outputs: np.ndarray, state: np.ndarray) -> np.ndarray:
    solver.set_timesteps(solver.steps)
    found = torch.from_numpy(state)
    for t, output in zip(solver.timesteps, torch.from_numpy(outputs), strict=True):
        found = solver.step(output, t, found, return_dict=False)[0]
    return np.asarray(found)


def randomised(name: str, kind: str, seed: int = 0) -> TrainedSolver:
    solver = SOLVERS[name](noise_scheduler(kind), 5)
    draw = torch.Generator().manual_seed(seed)
    for value in solver.parameters.values():
        value += 0.1 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
    return solver


def drawn(name: str, kind: str) -> tuple[TrainedSolver, np.ndarray, np.ndarray]:
    """Return a solver with random coefficients, random outputs of its steps, and a random first state."""
    draw = np.random.default_rng(1)
    return randomised(name, kind), draw.normal(size=(5, 2, 3)), draw.normal(size=(2, 3))


@pytest.mark.parametrize("kind", ["flux", "dit"])
def test_dyweight_steps_as_its_source_does(kind: str) -> None:
    solver, outputs, state = drawn("dyweight", kind)
    weights, scales = solver.coefficients["weights"].numpy(), solver.corrections["scales"].numpy()
    grid = solver.levels.even.numpy()
    level, x, given = grid[0], state, []
    for k in range(5):
        given.append((0.5 + 1 / (1 + np.exp(-scales[k]))) * level)
        used = weights[k, : k + 1]
        velocity = sum(w * outputs[k - j] for j, w in enumerate(used))
        by = grid[k + 1] - level
        x = x + by * velocity if kind == "flux" else np.cos(by) * x + np.sin(by) * velocity
        level = level + used.sum() * by
    assert np.allclose(run(solver, outputs, state), x)
    assert np.allclose(solver.timesteps, solver.levels.timestep(torch.tensor(np.array(given))), atol=1e-3)


@pytest.mark.parametrize("kind", ["flux", "dit"])
def test_s4s_steps_as_its_formula_does(kind: str) -> None:
    solver, outputs, state = drawn("s4s", kind)
    c, logits = solver.coefficients["coefficients"].numpy(), solver.corrections["grid"].numpy()
    lengths = np.exp(logits) / np.exp(logits).sum() * float(solver.levels.even[0])
    grid = float(solver.levels.even[0]) - np.concatenate([[0], np.cumsum(lengths)])
    grid[-1] = 0
    shorter = np.minimum(lengths, np.concatenate([lengths[:1], lengths[:-1]]))
    given = np.minimum(grid[:-1] + np.clip(solver.corrections["shifts"].numpy(), -0.5, 0.5) * shorter, grid[0])
    assert (np.diff(grid) < 0).all()

    def shares(u: Any) -> tuple[Any, Any]:
        return (1 - u, u) if kind == "flux" else (np.cos(u), np.sin(u))

    x, clean = state, []
    for n in range(5):
        signal, noise = shares(given[n])
        clean.insert(0, (1 if kind == "flux" else signal) * x - noise * outputs[n])
        mixed = sum(one * of for one, of in zip(c[n], clean[:3], strict=False))
        (a, s), (a_next, s_next) = shares(grid[n]), shares(grid[n + 1])
        x = s_next / s * x + (a_next - a * s_next / s) * mixed
    assert np.allclose(run(solver, outputs, state), x)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_agree_with_differences(name: str) -> None:
    """Of the loss over all parameters, through a small function in place of the network."""
    solver = randomised(name, "dit")
    state = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss() -> Tensor:
        solver.set_timesteps(5)
        x = state
        for i in range(5):
            level = solver._network_levels[i]
            x = solver.step((x * (1 + level)).tanh() + level**2, None, x, return_dict=False)[0]
        return x.square().mean()

    for value in solver.parameters.values():
        value.requires_grad_()
    loss().backward()
    for label, value in solver.parameters.items():
        assert value.grad is not None
        for place in np.ndindex(*value.shape):
            with torch.no_grad():
                value[place] += 1e-5
                high = loss()
                value[place] -= 2e-5
                low = loss()
                value[place] += 1e-5
            assert abs(float(value.grad[place] - (high - low) / 2e-5)) < 1e-6, (label, place)


@pytest.mark.parametrize("name", SOLVERS)
def test_training_lowers_the_error_of_the_final_latents(model: DemoModel, name: str, tmp_path: Path) -> None:
    given = calls(model)
    target = final_states(model.pipe, given)[0]
    own = model.pipe.scheduler
    solver = SOLVERS[name](own, STEPS)
    before = (end(model, solver) - target).square().mean()
    made = trained(model.pipe, solver, given, 1.0, updates=16)
    assert made.updates == 16
    assert made.seconds > 0
    assert (end(model, solver) - target).square().mean() < 0.9 * before
    assert model.pipe.scheduler is own
    assert not solver.stop
    assert solver.noise is None
    assert all(p.requires_grad for p in model.pipe.transformer.parameters())
    assert not model.pipe.transformer._forward_pre_hooks
    made.save(tmp_path / "solver.safetensors")
    again = Trained.load(tmp_path / "solver.safetensors", SOLVERS[name](own, STEPS))
    assert (again.seconds, again.updates) == (made.seconds, made.updates)
    assert torch.equal(end(model, again.solver), end(model, solver))
    with pytest.raises(ValueError, match="delete the file"):
        Trained.load(tmp_path / "solver.safetensors", SOLVERS[name](own, STEPS + 1))


def test_all_parameters_are_trained(model: DemoModel) -> None:
    for solver in (kind(model.pipe.scheduler, STEPS) for kind in SOLVERS.values()):
        before = {name: value.clone() for name, value in solver.parameters.items()}
        trained(model.pipe, solver, calls(model), 1.0, updates=trained_solvers.PHASES)
        assert all(not torch.equal(value, before[name]) for name, value in solver.parameters.items())


def test_the_seconds_end_the_training(model: DemoModel) -> None:
    made = trained(model.pipe, DyWeight(model.pipe.scheduler, STEPS), calls(model), 1e-3)
    assert made.updates == 0  # the full runs take longer


def test_noise_moves_against_the_gradient_and_stays_in_the_ball() -> None:
    offset = torch.zeros(3, 2, 8).requires_grad_()
    slope = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    radius = 0.01 * 16**0.5
    for _ in range(25):
        (offset * slope).sum().backward()
        offset = nearer(offset, 0.01)
        assert (offset.flatten(1).norm(dim=1) <= radius * (1 + 1e-5)).all()
    towards = -radius * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    assert torch.allclose(offset, towards, atol=1e-6)


def test_moved_noise_reaches_the_network_and_the_state(model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = DyWeight(model.pipe.scheduler, STEPS)
    (call,) = calls(model, STEPS)
    states: list[Tensor] = []
    step = solver.after

    def watched(state: Tensor, output: Tensor, i: int) -> Tensor:
        states.append(state)
        return step(state, output, i)

    monkeypatch.setattr(solver, "after", watched)

    def inputs() -> list[Tensor]:
        """The network's inputs of one run, as its hooks leave them."""
        seen: list[Tensor] = []
        states.clear()
        with torch.no_grad(), trained_solvers._attached(model.pipe, solver):
            hook = model.pipe.transformer.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            trained_solvers._end(model.pipe, call)
            hook.remove()
        return seen

    plain = inputs()
    solver.noise = torch.full_like(plain[0][:1], 0.5)
    moved = inputs()
    forwards = 2 if model.about.separate_cfg else 1  # of a step
    assert len(moved) == forwards * STEPS
    for branch in range(forwards):
        assert torch.equal(moved[branch], plain[branch] + 0.5)
        assert torch.equal(states[0], moved[branch])
    assert not torch.allclose(moved[forwards], plain[forwards] + 0.5)  # the offset is added once


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_number_of_steps_is_refused(model: DemoModel) -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 5; this solver has 4 steps: pass 4"):
        end(model, DyWeight(model.pipe.scheduler, STEPS), 5)


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler(), DDIMScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)],
)
def test_a_noise_scheduler_without_levels_is_refused(scheduler: Any) -> None:
    with pytest.raises(ValueError, match="has no trained solver; use"):
        DyWeight(scheduler, STEPS)
