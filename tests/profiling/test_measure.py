"""A profile says what was measured: every table against its definition, every number against its source."""

from __future__ import annotations

import functools
import itertools
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from calibrated import BATCH, CALLS, calibration, calls, final_states
from measured import check_tables
from pipelines import SCHEDULERS, TINY, fresh, run, shared, watch
from torch.utils.flop_counter import FlopCounterMode

import diffcache
from diffcache import host
from diffcache.documents import Profile
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.planning import plan
from diffcache.profiling import measure
from diffcache.profiling.fitting.dynamics import answers, measure_dynamics, with_answer
from diffcache.profiling.fitting.fit import fit
from diffcache.profiling.recording import record as recording
from diffcache.schedulers.uniform import evenly
from diffcache.simulation import Simulator


def seen_by_a_hook(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs [B, samples, T, tokens, channels] of the calibration's calls, on separate runs."""
    tiny, pipe = TINY[name], calibration(name).pipe
    branches = 1 if tiny.guidance == "none" else 2
    found = []
    for call in calls(name, pipe):
        given: list[np.ndarray] = []
        made: list[np.ndarray] = []

        def hook(module: Any, args: Any, kwargs: Any, output: Any, given: Any = given, made: Any = made) -> None:
            given.append(vectors(args[0] if args else kwargs["hidden_states"]))
            made.append(vectors(output[0]))

        handle = getattr(pipe, tiny.denoisers[0]).register_forward_hook(hook, with_kwargs=True)
        pipe(**call)
        handle.remove()
        pair = []
        for seen in (given, made):
            flat = np.stack(seen)
            pair.append(flat.reshape(tiny.steps, branches, BATCH, *flat.shape[2:]).transpose(1, 2, 0, 3, 4))
        found.append(pair)
    inputs, outputs = (np.concatenate([pair[n] for pair in found], axis=1) for n in range(2))
    return inputs, outputs


def vectors(tensor: torch.Tensor) -> np.ndarray:
    """Return [batch, tokens, channels] for every layout."""
    plain = tensor.detach().double().numpy()
    if plain.ndim > 3:
        plain = np.moveaxis(plain, 1, -1)
    return plain.reshape(len(plain), -1, plain.shape[-1])


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "dit", "wan", "flux_control"])
def test_tables_are_what_they_are_defined_to_be(name: str) -> None:
    site = calibration(name).profile().denoisers[TINY[name].denoisers[0]].sites["model"]
    inputs, outputs = seen_by_a_hook(name)
    if name == "flux_control":  # the sample comes before the condition; tables are of the sample
        inputs = inputs[..., : outputs.shape[-1]]
    check_tables(site, inputs, outputs)
    if name == "dit":
        assert inputs.shape != outputs.shape  # a learned variance
    if len(outputs) > 1:
        assert not np.allclose(site.output.gram[0], site.output.gram[1], rtol=0.01)  # branches are distinguished


def test_costs_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, tiny = shared("sd3"), TINY["sd3"]
    call = tiny.call(pipe, batch=2) | {"generator": torch.Generator().manual_seed(0)}
    with FlopCounterMode(display=False) as counter:
        pipe(**call)
    of_denoiser = sum(counter.get_flop_counts()["SD3Transformer2DModel"].values())
    with monkeypatch.context() as clock:
        readings = itertools.count()
        clock.setattr(time, "perf_counter", lambda: float(next(readings)))  # between two readings lies a second
        site = measure(pipe, [call]).denoisers["transformer"].sites["model"]
    assert site.flops * tiny.steps == of_denoiser > 0
    assert site.seconds == 1.0
    with watch(pipe, tiny.denoisers) as seen:
        pipe(**call)
    assert site.output_bytes == seen[0].output.numel() * 4
    half = measure(pipe, [tiny.call(pipe, batch=1)]).denoisers["transformer"].sites["model"]
    assert (2 * half.flops, 2 * half.output_bytes) == (site.flops, site.output_bytes)


class LingeringScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
    @functools.wraps(diffusers.FlowMatchEulerDiscreteScheduler.step)  # what it takes is read from its signature
    def step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return super().step(*args, **kwargs)


def test_the_loop_is_timed_without_what_measuring_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kept, steps = fresh("sd3"), recording._kept, TINY["sd3"].steps
    pipe.scheduler = LingeringScheduler.from_config(pipe.scheduler.config)

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.05)  # twice a step
        return kept(*args)

    monkeypatch.setattr(recording, "_kept", slow)
    after = pipe.transformer.register_forward_hook(lambda *_: time.sleep(0.01))  # the pipeline's own, before the step
    measured = measure(pipe, [TINY["sd3"].call(pipe)])
    after.remove()
    network = measured.denoisers["transformer"].sites["model"].seconds * steps
    assert 0.02 * steps + network < measured.seconds < 0.07 * steps + network


def test_seconds_count_every_call_of_a_step() -> None:
    measured = measure(shared("wan"), calls("wan", shared("wan"))[:1])
    model = measured.denoisers["transformer"].sites["model"]
    assert model.calls == 2
    assert measured.seconds > 2 * TINY["wan"].steps * model.seconds


def test_circumstances_are_written_down() -> None:
    pipe = shared("sd15_heun")
    measured = calibration("sd15_heun").profile()
    run(pipe, TINY["sd15_heun"].call(pipe))
    unet = measured.denoisers["unet"]
    assert (unet.class_name, unet.config_digest) == ("UNet2DConditionModel", host.config_digest(pipe.unet))
    assert measured.noise_scheduler is not None
    assert measured.noise_scheduler.class_name == "HeunDiscreteScheduler"
    assert measured.noise_scheduler.config_digest == host.config_digest(pipe.scheduler)
    assert measured.guidance is not None
    assert (measured.guidance.mode, measured.guidance.branches) == ("batched", 2)
    assert measured.guidance.scales["guidance_scale"] == 4.0
    assert measured.steps == 11
    assert measured.start == 0
    assert measured.timesteps.tolist() == pipe.scheduler.timesteps.double().tolist()
    assert measured.sigmas is not None
    assert measured.sigmas.tolist() == pipe.scheduler.sigmas.double().tolist()
    assert measured.samples == CALLS * BATCH
    assert measured.provenance["batch"] == str(BATCH)
    assert measured.provenance["dtype"] == "float32"
    sized = measure(shared("flux"), calls("flux", shared("flux"))[:1]).provenance
    assert (sized["height"], sized["width"], sized["torch"]) == ("32", "24", metadata.version("torch"))


def test_samples_carried_twice_count_once() -> None:
    assert calibration("dit").profile().samples == CALLS * BATCH
    assert calibration("dit").schedule(3, time_limit_s=0).provenance["samples"] == str(CALLS * BATCH)


def test_a_late_start_is_measured_from_there() -> None:
    measured, pipe = calibration("flux_img2img").profile(), shared("flux_img2img")
    run(pipe, TINY["flux_img2img"].call(pipe))
    assert (measured.start, measured.steps) == (2, 4)
    assert measured.timesteps.tolist() == pipe.scheduler.timesteps[2:].double().tolist()
    assert measured.sigmas is not None
    assert measured.sigmas.tolist() == pipe.scheduler.sigmas[2:].double().tolist()
    assert plan(measured, "closed_loop", 2).steps == 6


def test_noise_levels_that_do_not_belong_to_the_steps_are_left_out() -> None:
    assert calibration("dit").profile().sigmas is None  # DDIM has none


REACHED = [("flux", ""), ("dit", ""), ("wan", ""), ("stable_audio", ""), *(("sd15", s) for s in SCHEDULERS["sd15"])]


@pytest.mark.parametrize(("name", "noise_scheduler"), REACHED)
def test_reach_states_where_the_noise_scheduler_takes_an_error(name: str, noise_scheduler: str) -> None:
    """Any errors, handed to any steps of the real loop."""
    one = calibration(name, noise_scheduler).replays[0]
    reach = measure_dynamics([one]).reach
    draw = torch.Generator().manual_seed(0)
    position, errors = one.start, []
    for i in range(len(one.steps)):
        output = one.guided(i, one.recorded(i))
        errors.append(0.1 * output.std() * torch.randn(output.shape, generator=draw))
        position = one.move(i, position, output + errors[-1])
        moved = (position.state - one.reference(i))[: len(output)].double()
        told = sum(reach[i, j] * error.double() for j, error in enumerate(errors))
        assert (told - moved).norm() < 1e-3 * moved.norm()  # type: ignore[union-attr]
    swapped = sum(reach[-1, j] * error.double() for j, error in enumerate(reversed(errors)))
    assert (swapped - moved).norm() > 0.1 * moved.norm()  # type: ignore[union-attr]


def test_gram_is_of_the_guided_outputs() -> None:
    _, seen = seen_by_a_hook("chroma")
    seen = seen.reshape(*seen.shape[:3], -1)
    guided = 4 * seen[0] - 3 * seen[1]
    expected = np.einsum("ntc,nsc->ts", guided, guided) / guided.shape[0] / guided.shape[2]
    assert measure_dynamics(calibration("chroma").replays).gram == pytest.approx(expected, rel=1e-4)


def test_response_is_how_the_network_answers_to_errors() -> None:
    replays = calibration("chroma").replays
    found = fit(replays, evenly(6, 3))
    measured = with_answer(measure_dynamics(replays), answers(replays, found))
    response, spread = measured.response, measured.spread
    for i in (2, 4):
        parts, rests = [], []
        for one, position in zip(replays, found.checkpoints[i].positions, strict=True):
            true = one.steps[i].state
            assert true is not None
            given = one.guided(i, one.compute(i, position)), one.guided(i, one.recorded(i))
            errors = (position.state - true).flatten(1).double().numpy()
            changes = (given[0] - given[1]).flatten(1).double().numpy()
            for error, change in zip(errors, changes, strict=True):
                expected, *_ = np.linalg.lstsq(error[:, None], change, rcond=None)
                parts.append(expected[0])
                rests.append((error, change))
        assert len(parts) == CALLS * BATCH
        assert response[i] == pytest.approx(np.median(parts), rel=1e-3, abs=1e-5)
        left = [((change - response[i] * error) ** 2).sum() / (error @ error) for error, change in rests]
        assert spread[i] == pytest.approx(np.median(left), rel=1e-3)
    for found_at in (response, spread):
        assert found_at[3] == pytest.approx((found_at[2] + found_at[4]) / 2)
        assert found_at[5] == found_at[4]
    assert abs(response[2]) > 1e-3
    assert spread[2] > 1e-3


def test_the_simulation_foresees_the_real_error() -> None:
    """To a few dB, on real networks; ranks of masks are what the planner needs, and they agree better."""
    replays = calibration("sd15_ddim").replays
    dynamics = calibration("sd15_ddim").profile().dynamics
    assert dynamics is not None
    simulated, real = [], []
    for seed in range(12):
        compute = np.zeros(6, bool)
        compute[[0, *np.random.default_rng(seed).choice(np.arange(1, 6), 2, replace=False)]] = True
        simulated.append(-10 * np.log10(Simulator(dynamics).error(compute)))
        real.append(fit(replays, compute, per_branch=False).score)
    assert np.corrcoef(simulated, real)[0, 1] > 0.8


def test_a_sample_that_leaves_the_trajectory_does_not_decide_the_response() -> None:
    """Of five samples, one has errors 100 times as large, and an answer of another sign."""
    sizes, parts = np.array([1.0, 1.1, 0.9, 1.2, 100.0]), np.array([0.5, 0.6, 0.4, 0.5, -4.0])
    sums = np.stack([parts * sizes**2, sizes**2, (parts**2 + 0.01) * sizes**2])[:, :, None] * np.ones(6)
    silent = measure_dynamics(calibration("flux").replays)
    found = with_answer(silent, sums)
    assert found.response == pytest.approx(0.5)
    assert found.spread == pytest.approx(0.02)  # 0.01, and the square of the distance from 0.5 of the third of five
    together = with_answer(silent, sums.sum(1, keepdims=True))
    assert together.response == pytest.approx(-4.0, abs=0.01)


def test_the_response_is_the_median_over_calls_each_fitted_alone() -> None:
    replays, measured = calibration("sd3").replays, calibration("sd3").profile().dynamics
    mask = evenly(6, 3)
    sums = [answers([one], fit([one], mask, per_branch=False)) for one in replays]
    product, energy, _ = np.concatenate(sums, axis=1)
    assert measured is not None
    assert measured.response[[2, 4]] == pytest.approx(np.median(product[:, [2, 4]] / energy[:, [2, 4]], axis=0))
    together = with_answer(measure_dynamics(replays), answers(replays, fit(replays, mask)))
    assert together.response[2] != measured.response[2]


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "wan", "sdxl_img2img"])
def test_a_plan_from_a_profile_alone_beats_reuse(name: str, tmp_path: Path) -> None:
    calibrated = calibration(name)
    schedule = plan(Profile.load(calibrated.profile().save(tmp_path / "profile.safetensors")), "closed_loop", 2)
    full = torch.cat([r.reference(len(r.steps) - 1) for r in calibrated.replays])

    def error(how: object) -> float:
        with diffcache.accelerated(calibrated.pipe, how):  # type: ignore[arg-type]
            ends = torch.cat(final_states(calibrated.pipe, calls(name, calibrated.pipe)))
            assert not any(r.failed_open for r in diffcache.report(calibrated.pipe).rows)
        return float((ends - full).norm() / full.norm())

    every = -(-(calibrated.steps - calibrated.start) // 2)
    assert error(schedule) < error(f"uniform:every={every}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cogvideox_dpm", "carries tensors"),
        ("flux_inpaint", "changes the state"),
        ("ddim", "clips"),
        ("z_image", "several tensors"),
    ],
)
def test_a_loop_without_dynamics_says_why_and_keeps_its_tables(name: str, why: str) -> None:
    measured = calibration(name).profile()
    assert measured.dynamics is None
    assert why in measured.provenance["no_dynamics"]
    site = measured.denoisers[TINY[name].denoisers[0]].sites["model"]
    assert site.output.l1.any()
    assert Profile.from_bytes(measured.to_bytes()) == measured
    with pytest.raises(BadOption, match=f"it has no dynamics .*{why}"):
        plan(measured, "closed_loop", 3)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_a_file_keeps_a_measured_profile(name: str, tmp_path: Path) -> None:
    measured = calibration(name).profile()
    assert Profile.load(measured.save(tmp_path / "profile.safetensors")) == measured


def test_measuring_is_recording_and_leaves_generators_alone() -> None:
    pipe = shared("flux")
    made = calls("flux", pipe)
    found = [g.get_state() for call in made for g in call["generator"]]
    measured = measure(pipe, made)
    assert all(
        torch.equal(g.get_state(), s) for g, s in zip([g for c in made for g in c["generator"]], found, strict=True)
    )
    ours, theirs = measured.dynamics, calibration("flux").profile().dynamics
    assert ours is not None
    assert theirs is not None
    assert (ours.gram.tolist(), ours.response.tolist()) == (theirs.gram.tolist(), theirs.response.tolist())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(BadOption, match="at least one dictionary"):
        measure(shared("flux"), [])
    with pytest.raises(UnsupportedModel, match=r"changes denoisers on its way \(transformer, transformer_2\)"):
        calibration("wan22").profile()
    pipe = fresh("z_image")  # guidance that ends early: two branches in a call, then one
    with pytest.raises(UnsupportedModel, match="change their shape on the way"):
        measure(pipe, [TINY["z_image"].call(pipe) | {"cfg_normalization": False, "cfg_truncation": 0.5}])
