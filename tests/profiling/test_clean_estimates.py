"""Outputs less their inputs' share: found from noise levels, fitted where samplers draw noise, and run as fitted."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from calibrated import calibration, calls, final_states
from torch import Tensor, nn

import diffcache
from diffcache.cli import show
from diffcache.documents import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.errors import BadOption
from diffcache.profiling import Calibration
from diffcache.profiling.fitting import psnr_db
from diffcache.profiling.fitting.fit import fit
from diffcache.profiling.recording import LoopStep, Trajectory
from diffcache.profiling.replay.input_share import input_share
from diffcache.schedulers.uniform import evenly

STEPS, SAMPLES, SHAPE = 20, 8, (6, 5)
COSINE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
SAMPLERS = [
    ("DDPMScheduler", "epsilon", {}),
    ("DDPMScheduler", "v_prediction", COSINE),
    ("DDIMScheduler", "epsilon", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", "v_prediction", {}),
    ("PNDMScheduler", "epsilon", {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", "epsilon", {}),
    ("EulerDiscreteScheduler", "v_prediction", {}),
    ("DPMSolverMultistepScheduler", "epsilon", {}),
    ("DPMSolverMultistepScheduler", "v_prediction", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", "flow_prediction", {"use_flow_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", None, {"shift": 3.0}),
]


def made(name: str, prediction: str | None, options: dict[str, Any]) -> Any:
    told = options if prediction is None else {"prediction_type": prediction, **options}
    scheduler = getattr(diffusers, name)(**told)
    scheduler.set_timesteps(STEPS)
    return scheduler


def watched(scheduler: Any) -> Trajectory:
    return Trajectory(
        scheduler=scheduler, start=0, timesteps=scheduler.timesteps, guidance_scales={}, steps=[LoopStep()] * STEPS
    )


@pytest.mark.parametrize(("name", "prediction", "options"), SAMPLERS)
def test_what_is_left_of_an_output_is_the_clean_sample_alone(
    name: str, prediction: str | None, options: dict[str, Any]
) -> None:
    """Two inputs, made by the noise scheduler itself from one sample and two noises: what the network should return
    differs, and does not once the input's share is off."""
    scheduler = made(name, prediction, options)
    found = input_share(watched(scheduler))
    assert found is not None
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 3, 2, generator=draw, dtype=torch.double)
    for i in (0, STEPS // 2, STEPS - 1):
        rests, outputs = [], []
        for noise in torch.randn(2, 1, 4, 3, 2, generator=draw, dtype=torch.double):
            scheduler.set_timesteps(STEPS)
            time = scheduler.timesteps[i : i + 1]
            if name.startswith("FlowMatch"):
                x = scheduler.scale_noise(sample, time, noise)
            else:
                x = scheduler.scale_model_input(scheduler.add_noise(sample, noise, time), time[0])
            outputs.append(wanted(prediction, sample, noise, x))
            rests.append(outputs[-1] - found[i] * x)
        assert (outputs[0] - outputs[1]).abs().max() > 1e-2 or found[i] == 0
        assert torch.allclose(*rests, rtol=1e-3, atol=2e-3 * float(rests[0].abs().max()))


def wanted(prediction: str | None, sample: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """What a perfect network returns."""
    if prediction == "epsilon":
        return noise
    if prediction != "v_prediction":
        return noise - sample
    table = torch.stack([sample.flatten(), noise.flatten()], 1)  # x = α sample + σ noise, v = α noise − σ sample
    clean, noisy = torch.linalg.lstsq(table, x.flatten()[:, None]).solution.flatten()
    return clean * noise - noisy * sample


def test_where_levels_or_predictions_are_not_known_there_are_none() -> None:
    assert input_share(watched(made("DDPMScheduler", "sample", {}))) is None
    scheduler = made("DDPMScheduler", "epsilon", {})
    scheduler.alphas_cumprod = None
    assert input_share(watched(scheduler)) is None


class Posterior(nn.Module):
    """Noise in samples of a known kind: one of two points, with a width, so the estimate moves as noise falls."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler, self.turned = scheduler, 1
        self.points = nn.Parameter(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)).clamp(-0.9, 0.9))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        kept = self.scheduler.alphas_cumprod[timestep.long()].float()
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        width = alpha**2 * 0.05 + sigma**2
        far = (x[:, None] - alpha * self.points).square().flatten(2).sum(-1) / (2 * width)
        nearest = torch.einsum("nk,kts->nts", (-far).softmax(1), self.points)
        clean = nearest + alpha * 0.05 / width * (x - alpha * nearest)
        return self.turned * (x - alpha * clean) / sigma


def looped(kind: type, turned: int = 1, **options: Any) -> diffcache.Loop:
    scheduler = kind(prediction_type="epsilon", **{**COSINE, **options})
    network = Posterior(scheduler)
    network.turned = turned

    def sample() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(SAMPLES, *SHAPE)
        with torch.no_grad(), diffcache.trajectory(network, scheduler.timesteps):
            for t in scheduler.timesteps:
                x = scheduler.step(turned * network(x, t), t, x).prev_sample
        return x

    return diffcache.Loop(network, sample, scheduler=scheduler)


CALLS = [{"seed": n} for n in range(4)]
FEW = 4  # fits: what is kept, and how it is combined, does not depend on the mask that a longer search finds


@functools.cache
def drawing() -> tuple[diffcache.Loop, CacheSchedule]:
    """Return a loop with a sampler that draws noise, and a schedule fitted to it. Tests change neither."""
    loop = looped(diffusers.DDPMScheduler)
    return loop, diffcache.optimize(loop, CALLS[:2], 6, held_out=CALLS[2:])


def few_fits(loop: diffcache.Loop, computed: int | diffcache.Budget = 6, **options: Any) -> CacheSchedule:
    """Return a schedule after a search of few fits."""
    return Calibration.record(loop, CALLS[:2]).schedule(computed, fits=FEW, **options)


def test_where_a_sampler_draws_noise_estimates_are_combined_and_run_as_they_were_fitted() -> None:
    loop, schedule = drawing()
    assert schedule.provenance["combined"] == "clean estimates"
    (plan,) = (plan for _, _, plan in schedule.plans())
    assert plan.inputs is not None
    known = Calibration.record(loop, CALLS[:2], held_out=CALLS[2:])
    by_outputs = fit(known.replays, plan.compute, held=known.held)
    own = input_share(known.replays[0].trajectory)
    assert own is not None
    by_estimates = fit(
        [r.with_input_share(own) for r in known.replays],
        plan.compute,
        held=[r.with_input_share(own) for r in known.held],
    )
    assert by_estimates.score > by_outputs.score + 6
    real = measured(loop, known._document(by_estimates.plan, {}), CALLS[2:])
    assert real.numpy() == pytest.approx(by_estimates.held_db, abs=0.05)


def test_the_promise_holds_on_fresh_samples_where_a_sampler_draws_noise() -> None:
    """One sample in about twelve goes to the other point, and ends far away: with and without it in a small group, the
    mean of the group is off by 4 dB."""
    loop, schedule = drawing()
    assert schedule.expected is not None
    real = measured(loop, schedule, [{"seed": n} for n in range(100, 140)])
    assert float(real.mean()) == pytest.approx(schedule.expected.mean_db, abs=1.5)


def measured(loop: diffcache.Loop, schedule: CacheSchedule, calls: list[dict[str, int]]) -> Tensor:
    """Return dB of each sample of an accelerated run."""
    full = [loop(**call) for call in calls]
    with diffcache.accelerated(loop.network, schedule):
        found = [loop(**call) for call in calls]
    return torch.cat([psnr_db(a, b) for a, b in zip(found, full, strict=True)])


def test_a_budget_of_memory_counts_what_is_kept_of_inputs() -> None:
    loop = looped(diffusers.DDPMScheduler)
    output = SAMPLES * SHAPE[0] * SHAPE[1] * 4
    for outputs, combined in ((4, True), (2, True), (1, False)):
        budget = diffcache.Budget(computed_steps=6, memory_bytes=outputs * output)
        schedule = few_fits(loop, budget)
        assert ("combined" in schedule.provenance) == combined
        assert diffcache.estimate(loop, schedule, **CALLS[0]).cache_bytes <= outputs * output


def test_where_it_does_not_outputs_are() -> None:
    loop = looped(diffusers.DDIMScheduler, beta_schedule="linear", beta_end=0.2)
    schedule = few_fits(loop)
    assert "combined" not in schedule.provenance
    assert next(plan for _, _, plan in schedule.plans()).inputs is None


@pytest.mark.parametrize("name", ["flux", "sd3", "dit", "chroma", "sd15_ddim", "wan", "ddpm", "sdxl_img2img"])
def test_pipelines_run_estimates_as_they_were_fitted(name: str) -> None:
    """Guidance apart or in one batch, learned variances, packed latents, a loop that starts late."""
    known = calibration(name)
    own = input_share(known.replays[0].trajectory)
    assert own is not None
    replays = [replay.with_input_share(own) for replay in known.replays]
    found = fit(replays, evenly(len(own), len(own) // 2, replays[0].first_steps), per_branch=known.guidance is not None)
    schedule = known._document(found.plan, {})
    reference = [replay.reference(len(own) - 1) for replay in replays]

    def ends(made: CacheSchedule) -> np.ndarray:
        with diffcache.accelerated(known.pipe, made):
            real = final_states(known.pipe, calls(name, known.pipe))
        pairs = zip(real, reference, replays, strict=True)
        return torch.cat(
            [psnr_db(a[: len(a) // r.batch_copies], b[: len(a) // r.batch_copies]) for a, b, r in pairs]
        ).numpy()

    assert ends(schedule) == pytest.approx(found.error_db, abs=0.01)
    plan = dataclasses.replace(found.plan, inputs=found.plan.inputs * 1.5)  # the comparison can fail
    assert ends(known._document(plan, {})) != pytest.approx(found.error_db, abs=0.01)


def test_a_schedule_of_estimates_is_tied_to_its_steps() -> None:
    compute = np.array([True, False, True, False])
    weights = np.where(compute, 0.0, 1.0)[None, :, None]
    plan = SitePlan(compute=compute, weights=weights, inputs=-0.5 * weights)
    denoisers = {"transformer": DenoiserPlan(sites={"model": plan})}
    schedule = CacheSchedule(steps=4, denoisers=denoisers, timesteps=np.array([4.0, 3.0, 2.0, 1.0]))
    with pytest.raises(BadOption, match="predicts from outputs only"):
        diffcache.resampled(schedule, [4.0, 2.0, 1.0])
    assert show.table(plan).splitlines()[:2] == ["  step  newest  w0    v0", "     1       0   1  -0.5"]


def conditioned(twice: bool) -> diffcache.Loop:
    """The network is given more tokens than it answers for: the sample and ones, or the sample twice."""
    scheduler = diffusers.DDPMScheduler(prediction_type="epsilon", **COSINE)
    network = Conditioned(scheduler)

    def sample() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(SAMPLES, *SHAPE)
        with torch.no_grad(), diffcache.trajectory(network, scheduler.timesteps):
            for t in scheduler.timesteps:
                other = x if twice else torch.ones_like(x)
                x = scheduler.step(network(torch.cat([x, other], 1), t), t, x).prev_sample
        return x

    return diffcache.Loop(network, sample, scheduler=scheduler)


class Conditioned(Posterior):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x[:, : SHAPE[0]], timestep)


@pytest.mark.parametrize("twice", [False, True])
def test_estimates_are_combined_only_where_a_run_can_find_the_sample_in_the_input(twice: bool) -> None:
    loop, plain = conditioned(twice), looped(diffusers.DDPMScheduler)
    schedule, plain_schedule = few_fits(loop), few_fits(plain)
    assert ("combined" in schedule.provenance) is not twice
    for target in (loop, loop.network):
        with diffcache.accelerated(target, schedule):
            fast = loop(**CALLS[2])
            assert sum(row.predicted for row in diffcache.report(target).rows) == STEPS - 6
        if not twice:
            with diffcache.accelerated(plain, plain_schedule):
                assert torch.allclose(fast, plain(**CALLS[2]), atol=1e-4)


@pytest.mark.parametrize(("store", "combined"), [("int8", True), ("int4", False)])
def test_rests_are_not_made_of_what_is_kept_too_coarsely(store: str, combined: bool) -> None:
    schedule = few_fits(looped(diffusers.DDPMScheduler), store=store)
    assert ("combined" in schedule.provenance) == combined


def test_a_loop_that_turns_the_sign_of_outputs_has_slopes_of_the_other_sign() -> None:
    loop = looped(diffusers.DDPMScheduler, turned=-1)
    schedule = few_fits(loop)
    assert schedule.provenance["combined"] == "clean estimates"


class Forgetful(Posterior):
    """Answers otherwise when called again with the same."""

    calls = 0

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, timestep) * (1 + 0.1 * self.calls)


def test_a_network_that_does_not_repeat_its_outputs_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Posterior", Forgetful)
    schedule = few_fits(looped(diffusers.DDIMScheduler))
    assert schedule.provenance["fit_target"] == "output"
    assert "called again with the same arguments" in schedule.provenance["fit_target_reason"]
