"""A schedule that was fitted on another time grid or guidance scale is refused before the first step."""

from __future__ import annotations

import numpy as np
import pipelines
import pytest
import torch

from diffcache import accelerated, optimize
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


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_another_guidance_scale_is_refused(name):
    pipe, call, schedule = fitted(name)
    other = schedule.guidance.scale + 1.5
    with accelerated(pipe, schedule), pipelines.watch(pipe, ["transformer"]) as calls:
        with pytest.raises(
            ScheduleMismatch, match=rf"guidance scale {schedule.guidance.scale:g}; this run uses {other:g}"
        ):
            pipelines.run(pipe, call, guidance_scale=other)
        assert not calls
        pipelines.run(pipe, call)
    with accelerated(pipe, schedule, strict=False):
        pipelines.run(pipe, call, guidance_scale=other)


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
    assert "FluxPipeline was called and no sampling loop of its own was seen" in str(told.message)
