"""Runs that differ from the one before or from what a schedule was made for: some are followed, some are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from pipelines import TINY, fresh, run, shared, with_scheduler
from probes import bound, hold, leaf_calls, ours
from torch import Tensor

from diffcache import accelerated, report
from diffcache.errors import ScheduleMismatch
from diffcache.executor import FailedOpen


@pytest.mark.parametrize("name", ["flux", "sd15", "wan", "z_image", "ltx2"])
def test_another_batch_size_or_resolution_needs_nothing(name: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    calls = [tiny.call(pipe), tiny.call(pipe, batch=3), tiny.call(pipe)]
    calls[1]["height"] *= 2
    expected = []
    for call in calls:
        with accelerated(pipe, "taylorseer:every=2"):
            expected.append(run(pipe, call))
    with accelerated(pipe, "taylorseer:every=2"):
        for call, alone in zip(calls, expected, strict=True):
            assert torch.equal(run(pipe, call), alone)
        assert report(pipe).runs == 3
    assert expected[0].shape != expected[1].shape


def test_under_a_rule_another_number_of_steps_needs_nothing() -> None:
    pipe = shared("flux")
    with accelerated(pipe, "uniform:every=3"):
        for steps, computed in ((6, 2), (4, 2), (7, 3), (1, 1)):
            run(pipe, TINY["flux"].call(pipe), num_inference_steps=steps)
            assert report(pipe).computed == computed
            assert report(pipe).predicted == steps - computed


def test_another_type_between_runs_needs_nothing() -> None:
    pipe = fresh("flux")
    with accelerated(pipe, "taylorseer:every=2"):
        fast = run(pipe, TINY["flux"].call(pipe))
        pipe.to(torch.bfloat16)
        call = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in TINY["flux"].call(pipe).items()}
        half = run(pipe, call)
        assert report(pipe).predicted == 3
        pipe.to(torch.float32)
    assert fast.shape == half.shape


NAMES_BOTH = [
    ("flux", 4, r"made for 6 steps; this run takes 4 .*num_inference_steps=4\). Pass num_inference_steps=6, or make"),
    ("flux", 9, r"made for 6 steps; this run takes 9 .*steps=6, or make a schedule for 9; mismatch='full' computes"),
    ("dit", 3, r"made for 6 steps; this run takes 3 .*Pass num_inference_steps=6"),
    ("sd3_heun", 5, r"made for 11 steps; this run takes 9 .*steps=5\). Pass the number it was made with, or make"),
    ("sd15", 5, r"made for 7 steps; this run takes 6 \(noise scheduler PNDM.*Pass the number it was made with"),
    ("wan22", 5, r"made for 6 steps; this run takes 5 "),
    ("flux_img2img", 5, r"made for 6 steps; this run takes 5 "),
]


@pytest.mark.parametrize(("name", "steps", "says"), NAMES_BOTH)
def test_another_number_of_steps_is_refused_before_the_denoiser_is_called(name: str, steps: int, says: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    run(pipe, tiny.call(pipe))
    total = len(pipe.scheduler.timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)  # wan22 and the late start
        with accelerated(pipe, bound(pipe, hold([i % 2 == 0 for i in range(total)]))):
            fast = run(pipe, tiny.call(pipe))
            with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
                run(pipe, tiny.call(pipe), num_inference_steps=steps)
            assert not calls
            assert "step" not in vars(pipe.scheduler)
            assert torch.equal(run(pipe, tiny.call(pipe)), fast)
    assert ours(pipe) == []


def test_a_swapped_noise_scheduler_is_refused_before_the_denoiser_is_called() -> None:
    pipe, tiny = fresh("sd15_ddim"), TINY["sd15_ddim"]
    first = pipe.scheduler
    with accelerated(pipe, bound(pipe, hold("#.#.#."))):
        fast = run(pipe, tiny.call(pipe))
        with_scheduler(pipe, "euler")
        says = r"noise scheduler DDIMScheduler; the pipeline has EulerDiscreteScheduler. Set pipe.scheduler"
        with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        pipe.scheduler = type(first).from_config(first.config, prediction_type="v_prediction")
        says = r"DDIMScheduler of another configuration \(prediction type epsilon, .*; here v_prediction"
        with leaf_calls(pipe, tiny.denoisers) as more, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        assert not calls
        assert not more
        pipe.scheduler = first
        assert torch.equal(run(pipe, tiny.call(pipe)), fast)


def test_without_strict_a_noise_scheduler_of_another_configuration_is_accepted_and_another_class_is_not() -> None:
    pipe, tiny = fresh("sd15_ddim"), TINY["sd15_ddim"]
    first = pipe.scheduler
    with accelerated(pipe, bound(pipe, hold("#.#.#.")), strict=False):
        pipe.scheduler = type(first).from_config(first.config, prediction_type="v_prediction")
        run(pipe, tiny.call(pipe))
        assert report(pipe).predicted == 3
        with_scheduler(pipe, "euler")
        with pytest.raises(ScheduleMismatch, match="EulerDiscreteScheduler"):
            run(pipe, tiny.call(pipe))


def test_another_denoiser_put_in_place_is_refused_before_it_is_called() -> None:
    pipe, tiny = fresh("flux"), TINY["flux"]
    mine = pipe.transformer
    with accelerated(pipe, "uniform:every=2"):
        fast = run(pipe, tiny.call(pipe))
        pipe.transformer = fresh("flux").transformer
        says = r"'transformer' of this FluxPipeline is another object than when it was accelerated .*restore\(pipe\)"
        with leaf_calls(pipe, tiny.denoisers) as calls, pytest.raises(ScheduleMismatch, match=says):
            run(pipe, tiny.call(pipe))
        assert not calls
        pipe.transformer = mine
        assert torch.equal(run(pipe, tiny.call(pipe)), fast)
