"""A schedule that was fitted on another time grid or guidance scale is refused before the first step."""

from __future__ import annotations

import weakref

import numpy as np
import pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from pipelines.modular import MODULAR, run
from small_loop import Loop, Net, noise

from diffcache import accelerated, host, optimize
from diffcache.errors import ScheduleMismatch
from diffcache.executor import FailedOpen


def fitted(name: str):
    pipe = pipelines.shared(name)
    call = pipelines.TINY[name].call(pipe)
    return (
        pipe,
        call,
        optimize(pipe, [call | {"generator": torch.Generator().manual_seed(0)}], 3, time_limit_s=0),
    )


def test_other_sigmas_of_the_same_number_are_refused():
    pipe, call, schedule = fitted("flux")
    bent = np.linspace(1, 1 / 6, 6) ** 2
    with accelerated(pipe, schedule), pipelines.watch(pipe, ["transformer"]) as calls:
        with pytest.raises(ScheduleMismatch, match=r"other timesteps: .* at step \d, here .*strict=False"):
            pipelines.run(pipe, call, sigmas=bent)
        assert not calls
        pipelines.run(pipe, call)
    with accelerated(pipe, schedule, strict=False):
        pipelines.run(pipe, call, sigmas=bent)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux", "guidance_scale"),
        ("sd3", "guidance_scale"),
        ("wan", "guidance_scale"),
        ("dit", "guidance_scale"),  # the pipeline keeps none
        ("qwen_image", "true_cfg_scale"),  # nor this one
        ("sdxl", "guidance_rescale"),
    ],
)
def test_another_number_of_guidance_is_refused(name, argument):
    pipe, call, schedule = fitted(name)
    scale = schedule.guidance.scales[argument]
    other = scale + 1.5
    with accelerated(pipe, schedule), pipelines.watch(pipe, pipelines.TINY[name].denoisers) as calls:
        with pytest.raises(ScheduleMismatch, match=rf"fitted with {argument}={scale:g}; this run uses {other:g}"):
            pipelines.run(pipe, call, **{argument: other})
        assert not calls
        pipelines.run(pipe, call)
    with accelerated(pipe, schedule, strict=False):
        pipelines.run(pipe, call, **{argument: other})


def test_a_scale_that_is_left_to_the_default_is_known():
    pipe, call, _ = fitted("dit")
    default = {name: value for name, value in call.items() if name != "guidance_scale"}
    schedule = optimize(pipe, [default | {"generator": torch.Generator().manual_seed(0)}], 3, time_limit_s=0)
    assert schedule.guidance.scales["guidance_scale"] == 4.0
    with accelerated(pipe, schedule), pytest.raises(ScheduleMismatch, match=r"guidance_scale=4; this run uses 2"):
        pipelines.run(pipe, call, guidance_scale=2.0)


def test_guidance_that_is_switched_off_without_a_change_of_scale_is_refused_before_the_first_step():
    pipe, call, schedule = fitted("qwen_image")
    assert schedule.guidance.mode == "separate"
    without = {name: value for name, value in call.items() if not name.startswith("negative_prompt")}
    with accelerated(pipe, schedule), pipelines.watch(pipe, ["transformer"]) as calls:
        with pytest.raises(ScheduleMismatch, match=r"fitted with do_true_cfg=1; this run uses 0"):
            pipelines.run(pipe, without)
        assert not calls


class Began(host.LoopObserver):
    """Calls a function when a loop begins."""

    def __init__(self, then):
        self.then = then

    def loop_began(self, run):
        self.then()


def test_lists_settings_of_keywords_and_the_innermost_call_are_read():
    class Plain(Loop):
        def __call__(self, x, cfg_window=(0.1, 0.9), **kwargs):  # not stored on the pipeline
            return super().__call__(x)

    pipe = Plain(Net().requires_grad_(False), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, float] = {}
    watcher = host.LoopWatcher(pipe, Began(lambda: found.update(host.guidance_scales(pipe))))
    watcher.attach()
    pipe(noise(), audio_guidance_scale=torch.tensor(3.0), control_guidance_start=0.2)
    watcher.detach()
    assert found == {"cfg_window[0]": 0.1, "cfg_window[1]": 0.9, "audio_guidance_scale": 3.0}


def test_guiders_and_the_state_of_a_modular_pipeline_are_read():
    pipe = MODULAR["wan"].build(ClassifierFreeGuidance(4.0))
    found: dict[str, float] = {}
    watcher = host.LoopWatcher(pipe, Began(lambda: found.update(host.guidance_scales(pipe))))
    watcher.attach()
    run(pipe, MODULAR["wan"].call(pipe))
    watcher.detach()
    assert found["guidance_scale"] == 4.0
    assert {"guidance_start", "guidance_stop", "guidance_enabled"} <= found.keys()


def test_reading_a_call_keeps_none_of_its_tensors_alive():
    """Before Python 3.13 a frame keeps what was read of its local variables."""

    class Short(Loop):
        def __call__(self):
            x = noise()
            first = weakref.ref(x)
            with self.progress_bar(total=1):
                del x
                return first() is None

    pipe = Short(Net(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    watcher = host.LoopWatcher(pipe, Began(lambda: host.guidance_scales(pipe)))
    watcher.attach()
    assert pipe()
    watcher.detach()


def test_a_pipeline_whose_loop_is_not_seen_says_so_once(recwarn):
    """Kinds that never open a progress bar, or run their loop in another pipeline inside, must not look accelerated."""
    pipe = pipelines.fresh("flux")
    call = pipelines.TINY["flux"].call(pipe)
    with accelerated(pipe, "uniform:every=2"):
        pipelines.run(pipe, call)
        assert not [w for w in recwarn if issubclass(w.category, FailedOpen)]
        for _ in range(2):
            pipe.maybe_free_model_hooks()  # what a call without a loop ends with
    (told,) = [w for w in recwarn if issubclass(w.category, FailedOpen)]
    assert "FluxPipeline was called and its sampling loop was not seen" in str(told.message)
