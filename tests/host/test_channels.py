"""Coefficients of inputs work on the sample's own channels, wherever the pipeline puts them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import ALL, fresh, run
from probes import bound, hold
from small_loop import loop as small_loop
from small_loop import noise, random_plan
from torch import Tensor

from diffcache import accelerated, host, report
from diffcache.documents import Guidance
from diffcache.errors import ScheduleMismatch
from diffcache.executor import FailedOpen
from diffcache.host.channels import Span, counterpart, find_sample
from diffcache.patch import layer
from diffcache.profiling import Calibration

# Pipeline -> dimension and first entry of the sample in the denoiser's input; None: the input is the sample.
WHERE = {
    "marigold_depth": (1, 4),
    "stable_video": (2, 0),
    "kandinsky5_image_to_video": (4, 0),
    "sd15_instruct_pix2pix": (1, 0),
    "sd15_upscale": (1, 0),
    "pia": (1, 0),
    "wan_image_to_video": (1, 0),
    "cogvideox_image_to_video": (2, 0),
    "flux_control": (2, 0),
    "ltx": None,
    "dit": None,
    "stable_audio": None,
}


def seen(pipe: Any, name: str, schedule: Any, **over: Any) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Inputs and outputs of the denoiser in an accelerated run, and the samples that the noise scheduler steps."""
    (component,) = ALL[name].denoisers
    network, calls, samples = getattr(pipe, component), [], []
    main_of = host.main_of(network)

    def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
        x = main_of(args, kwargs).detach().clone()
        value = inner(*args, **kwargs)
        output = value[0] if isinstance(value, tuple) else value.sample
        calls.append((x, output.detach().clone()))
        return value

    def stepped(inner: Any, *args: Any, **kwargs: Any) -> Any:
        samples.append((args[2] if len(args) == 3 else kwargs.get("sample", args[-1])).detach().clone())
        return inner(*args, **kwargs)

    with accelerated(pipe, schedule):
        off, back = layer(network, "forward", around), layer(pipe.scheduler, "step", stepped)
        try:
            run(pipe, ALL[name].call(pipe), **over)
        finally:
            off()
            back()
    return calls, samples


def kappa_one(pipe: Any, name: str, every: int = 2) -> Any:
    """Reuse plus the drift of the input: F(a) + x − x(a)."""
    steps = ALL[name].steps
    mask = [i % every == 0 for i in range(steps)]
    kappa = np.where(mask, 0.0, 0.5)[None]
    return bound(pipe, hold(mask, kappa=kappa))


@pytest.mark.parametrize("name", WHERE)
def test_predictions_with_inputs_follow_the_sample(name: str) -> None:
    pipe, tiny = fresh(name), ALL[name]
    calls, samples = seen(pipe, name, kappa_one(pipe, name))
    made = len(calls) // tiny.steps
    where = WHERE[name]
    for i in range(1, tiny.steps, 2):
        for n in range(made):
            (x, found), (x_0, kept) = calls[i * made + n], calls[(i - 1) * made + n]
            if where is not None:
                dim, start = where
                length = samples[0].shape[dim]
                x, x_0 = (t.narrow(dim, start, length) for t in (x, x_0))
            drift = x - x_0
            if drift.shape != kept.shape:  # a learned variance behind
                drift = torch.cat([drift, torch.zeros_like(drift)], dim=1)
            assert float(drift.abs().max()) > 1e-3
            torch.testing.assert_close(found, kept + 0.5 * drift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["marigold_depth", "stable_video", "kandinsky5_image_to_video"])
def test_easycache_predicts_where_conditions_surround_the_sample(name: str) -> None:
    pipe = fresh(name)
    with accelerated(pipe, "easycache:threshold=100,warmup=1"), warnings.catch_warnings():
        warnings.simplefilter("error", FailedOpen)
        run(pipe, ALL[name].call(pipe))
        rows = report(pipe).rows
    assert all(row.predicted > 0 for row in rows)


def test_a_sample_that_is_not_found_is_reported_and_everything_is_computed() -> None:
    pipe = small_loop()
    pipe.behind = lambda x: [torch.rand_like(x)]
    pipe.before = lambda i, x: x
    ask = pipe.ask
    pipe.ask = lambda x, t, p: ask(x.flip(1), t, p)  # type: ignore[method-assign]
    schedule = bound(pipe, random_plan("#.######", 1, 1))
    with accelerated(pipe, schedule), pytest.warns(FailedOpen, match="which part of the input is the sample"):
        pipe(noise())
    full = pipe(noise())
    assert full.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 6, 5)], ids=["tokens", "pictures"])
@pytest.mark.parametrize("before", [True, False])
def test_conditions_that_move_take_no_part(shape: tuple[int, ...], before: bool) -> None:
    """The condition in the sample's extra channels is drawn anew at each step."""
    pipe = small_loop()
    dim = 1 if len(shape) == 4 else -1
    inner = pipe.transformer.forward
    given: list[Tensor] = []

    def ask(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
        parts = [torch.rand_like(x), x] if before else [x, torch.rand_like(x)]
        output = pipe.transformer(hidden_states=torch.cat(parts, dim), timestep=t, prompt=p)[0]
        given.append(x)
        outputs.append(output)
        return output

    outputs: list[Tensor] = []
    pipe.ask = ask  # type: ignore[method-assign]
    assert inner is not None
    mask = [i % 2 == 0 for i in range(8)]
    with accelerated(pipe, bound(pipe, hold(mask, kappa=np.where(mask, 0.0, 0.7)[None]))):
        pipe(noise(*shape))
    for i in range(1, 8, 2):
        torch.testing.assert_close(outputs[i], outputs[i - 1] + 0.7 * (given[i] - given[i - 1]))


# --- guidance in the batch -------------------------------------------------------------------------------------------

BATCHED, NONE = Guidance(mode="batched", branches=2), Guidance(mode="none", branches=1)


def test_guided_stable_video_is_known_to_be_guided() -> None:
    pipe, tiny = fresh("stable_video"), ALL["stable_video"]
    call = tiny.call(pipe)
    with accelerated(pipe, bound(pipe, hold("#.#.#.", 2), guidance=BATCHED)):
        run(pipe, call)
        assert report(pipe).predicted == 3
        with pytest.raises(ScheduleMismatch, match="2 branches in one batch"):
            run(pipe, {**tiny.call(pipe, batch=2), "max_guidance_scale": 1.0})
    with accelerated(pipe, bound(pipe, hold("#.#.#."), guidance=NONE)):
        run(pipe, {**call, "max_guidance_scale": 1.0})
        with pytest.raises(ScheduleMismatch, match="fitted without guidance"):
            run(pipe, call)


def test_a_condition_that_samples_share_does_not_count_as_guidance() -> None:
    pipe = small_loop()
    pipe.behind = lambda x: [torch.ones_like(x[:, :1])]
    x = noise(2, 3, 4, 5)
    with accelerated(pipe, bound(pipe, hold("#.#.#.#.", 2), guidance=BATCHED)):
        with pytest.raises(ScheduleMismatch, match="2 branches in one batch"):
            pipe(x)
    pipe.guide = "batched"
    with accelerated(pipe, bound(pipe, hold("#.#.#.#.", 2), guidance=BATCHED)):
        pipe(x)


# --- where the sample lies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_the_sample_is_found_at_any_place_scaled_and_repeated(dim: int, start: int, dtype: torch.dtype) -> None:
    sample = torch.randn(2, 5, 5, 6, 5)
    parts = [torch.randn_like(sample) for _ in range(2)]
    wide = torch.cat([parts[0].narrow(dim, 0, start), sample * -0.3, parts[1].narrow(dim, 0, 4 - start)], dim)
    assert find_sample(torch.cat([wide, wide]).to(dtype), sample) == (Span(dim, start, 5),)


def test_the_sample_may_lack_frames_too() -> None:
    """Kandinsky 5 steps all frames but the first, in the first channels of each."""
    x = torch.randn(1, 5, 6, 4, 9)
    place = find_sample(x, x[:, 1:, :, :, :4])
    assert place == (Span(1, 1, 4), Span(4, 0, 4))
    assert torch.equal(counterpart(x, (1, 5, 6, 4, 4), place), x[..., :4])


def test_no_sample_is_found_where_there_is_none_or_several() -> None:
    sample = torch.randn(2, 4, 6, 6)
    assert find_sample(torch.randn(2, 8, 6, 6), sample) is None
    assert find_sample(torch.cat([sample, sample], 1), sample) is None
    assert find_sample(torch.randn(2, 8, 6, 7), sample) is None
    assert find_sample(torch.randn(2, 8, 60, 70), sample) is None
    assert find_sample(torch.randn(2, 144, 4), sample) is None
    assert find_sample(torch.randn(3, 8, 6, 6), sample) is None
    assert find_sample(sample, sample) == ()


def test_what_goes_with_an_output() -> None:
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(counterpart(x, (2, 4, 6, 6), (Span(1, 4, 4),)), x[:, 4:])
    filled = counterpart(
        x, (2, 8, 6, 6), (Span(1, 4, 4),)
    )  # a learned variance, and a condition with the same number of channels
    assert torch.equal(filled, torch.cat([x[:, 4:], torch.zeros(2, 4, 6, 6)], 1))
    tokens = torch.randn(2, 12, 3)  # tokens of a picture follow those of the sample: each pairs with its counterpart
    assert counterpart(tokens, (2, 12, 3), (Span(1, 0, 8),)) is tokens


def test_a_loop_with_conditions_before_the_sample_is_replayed() -> None:
    pipe = fresh("marigold_depth")
    call = {**ALL["marigold_depth"].call(pipe), "generator": torch.Generator().manual_seed(0)}
    found = Calibration.record(pipe, [call])
    (trajectory,), (replay,) = found.trajectories, found.replays
    assert replay.place == (Span(1, 4, 4),)
    assert replay.paired
    x = trajectory.steps[0].calls[0].input
    assert torch.equal(replay.input(0, replay.start), x[:, 4:])


def test_another_place_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import state

    monkeypatch.setattr(state, "find_sample", lambda x, sample: (Span(1, 0, sample.shape[1]),))
    with pytest.raises(AssertionError):
        test_predictions_with_inputs_follow_the_sample("marigold_depth")
