"""SeaCache's decisions in the run, against diffusers' own SeaCache and a dense computation of the filter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from online import plain, played, strips
from pipelines import TINY, run, shared
from probes import ours
from torch import Tensor

from diffcache import accelerate, estimate, restore
from diffcache.errors import BadOption, Unusable
from diffcache.executor import Store
from diffcache.executor.criteria import Memory, Signal, load
from diffcache.executor.store import AS_IT_IS
from diffcache.host import noise_shares
from diffcache.schedulers import Grid, parse_rule, seacache

sea_cache = pytest.importorskip("diffusers.hooks.sea_cache")
STEPS = 12
ROWS = 6  # of the 48 tokens


def tokens_of(x: Tensor) -> list[Tensor]:
    """Return the tokens of each sample as a picture, [channels, 1, rows, columns]."""
    return [one.T.reshape(-1, 1, ROWS, x.shape[1] // ROWS) for one in x]


def peer(threshold: float, most: int, power: float) -> tuple[Tensor, str]:
    """Return the output of the tiny Flux pipeline with diffusers' SeaCache, and a strip of the steps that computed."""
    pipe, strip = shared("flux"), []
    transformer = pipe.transformer
    last = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][-1]
    forward, inner = transformer.forward, last.attn.forward

    def placed(*args: Any, **kwargs: Any) -> Any:
        times = pipe.scheduler.timesteps
        index = int((times - 1000 * float(kwargs["timestep"][0])).abs().argmin())
        strip.append("·")
        sigma = float(pipe.scheduler.sigmas[index])
        with transformer.cache_context("all", step_index=index, num_inference_steps=len(times), sigma=sigma):
            return forward(*args, **kwargs)

    def ran(*args: Any, **kwargs: Any) -> Any:
        strip[-1] = "■"
        return inner(*args, **kwargs)

    config = diffusers.SeaCacheConfig(
        threshold=threshold,
        residual_order=0,
        max_consecutive_cached=most,
        power_exp=power,
        raw_vision_callback=lambda module, args, kwargs: tokens_of(kwargs["hidden_states"]),
    )
    transformer.enable_cache(config)
    hooked, transformer.forward = transformer.forward, placed
    forward, last.attn.forward = hooked, ran
    try:
        return run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS), "".join(strip)
    finally:
        transformer.forward = hooked
        del last.attn.forward
        transformer.disable_cache()
        vars(transformer).pop("forward", None)


@pytest.mark.parametrize(("threshold", "most", "power"), [(0.1, 0, 2.0), (0.2, 2, 2.0), (0.3, 0, 3.0), (0.6, 0, 2.0)])
def test_it_decides_as_diffusers_does(threshold: float, most: int, power: float) -> None:
    expected, strip = peer(threshold, most, power)
    assert {"■", "·"} == set(strip)
    limited = f",most={most}" if most else ""
    output, found = played("flux", f"seacache:threshold={threshold},power={power},rows={ROWS}{limited}")
    assert strips(found, "stack:transformer_blocks") == [strip]
    assert strips(found, "stack:single_transformer_blocks") == [strip]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert ours(shared("flux")) == []


def test_another_exponent_and_other_rows_decide_otherwise() -> None:
    """The test above compares something."""
    found = {
        strips(played("flux", f"seacache:threshold=0.2,{options}")[1], "stack:transformer_blocks")[0]
        for options in ("power=2.0,rows=6", "power=0.1,rows=6", "power=8.0,rows=1")
    }
    assert len(found) > 1


def test_a_threshold_of_zero_changes_no_bit() -> None:
    output, found = played("flux", "seacache:threshold=0")
    assert found.predicted == 0
    assert torch.equal(output, plain("flux"))


def test_the_estimate_sees_its_decisions() -> None:
    pipe = shared("flux")
    call = {**TINY["flux"].call(pipe), "num_inference_steps": STEPS}
    foreseen = estimate(pipe, "seacache:threshold=100", **call)
    assert foreseen.online
    assert 0 < foreseen.predicted == foreseen.asked
    assert ours(pipe) == []


# --- the filter ------------------------------------------------------------------------------------------------------


def transform(n: int) -> np.ndarray:
    """Return the matrix of the discrete Fourier transform of n points."""
    return np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n)


def dense(picture: np.ndarray, noise: float, power: float) -> np.ndarray:
    """Filter a picture [rows, columns] by matrices. The gain at a frequency is a S / (a² S + b²), S = 1 / f^power."""
    gains = []
    for n in picture.shape:
        f = np.minimum(np.arange(n), n - np.arange(n)) / n
        clean = 1 - noise
        rest = clean / (clean**2 + noise**2 * f**power)  # the same fraction, times f^power above and below
        gains.append(rest)
    gain = np.outer(*gains)
    rows, columns = (transform(n) for n in picture.shape)
    spectrum = rows @ picture @ columns.T * gain / gain.mean()
    return np.asarray((rows.conj().T @ spectrum @ columns.conj()).real)


@pytest.mark.parametrize("layout", ["tokens", "square tokens", "channels"])
def test_the_change_is_that_of_a_dense_computation(layout: str) -> None:
    draw, levels = np.random.default_rng(0), np.array([0.9, 0.6, 0.2])
    side = (5, 5) if layout == "square tokens" else (4, 7)
    pictures = draw.normal(size=(2, 3, 2, *side))  # now and then, samples, channels
    now, then = (torch.from_numpy(p if layout == "channels" else p.reshape(3, 2, -1).swapaxes(1, 2)) for p in pictures)
    criterion = load("filtered_input", {"power": 2.5, "rows": 4 if layout == "tokens" else 0})
    signal = Signal(2, [now], [then], AS_IT_IS, since=1, levels=levels)
    changes = []
    for new, old in zip(*pictures, strict=True):
        filtered = [[dense(p, s, 2.5) for p in one] for one, s in ((new, 0.2), (old, 0.6))]
        changes.append(np.abs(np.subtract(*filtered)).mean() / np.abs(filtered[1]).mean())
    found = float(criterion.change(signal, Memory(Store(), "net", 0)))
    np.testing.assert_allclose(found, np.mean(changes), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), lambda s, i: float(s.sigmas[i])),
        (lambda: diffusers.DDIMScheduler(), lambda s, i: _of(float(s.alphas_cumprod[int(s.timesteps[i])]))),
        (lambda: diffusers.EulerDiscreteScheduler(), lambda s, i: float(s.sigmas[i] / (1 + s.sigmas[i]))),
        (lambda: diffusers.EDMEulerScheduler(), lambda s, i: float(s.sigmas[i] / (1 + s.sigmas[i]))),
        (
            lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            lambda s, i: float(s.sigmas[i]),
        ),
    ],
)
def test_the_share_of_noise_follows_from_the_noise_scheduler(
    make: Callable[[], Any], share: Callable[[Any, int], float]
) -> None:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    found = noise_shares(scheduler, scheduler.timesteps)
    assert found is not None
    np.testing.assert_allclose(found, [share(scheduler, i) for i in range(STEPS)], rtol=2e-3)
    assert (np.diff(found) < 0).all()
    assert 0 < found[-1] < 0.5 < found[0] <= 1


def _of(kept: float) -> float:
    """Return the share of noise in a state of variance-preserving diffusion."""
    clean, noise = math.sqrt(kept), math.sqrt(1 - kept)
    return noise / (clean + noise)


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_steps_are_computed() -> None:
    plan, online = seacache.rule(Grid(np.linspace(1, 0.1, 10), start=2), warmup=3, last=2, threshold=0.5, most=4)
    assert "".join("#" if c else "." for c in plan.compute) == "#####...##"
    assert (online.rule, online.most, online.limit.tolist()) == ("filtered_input", 4, [0.5] * 10)
    assert seacache.rule(Grid(np.linspace(1, 0.1, 10)), last=0)[0].compute.sum() == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("threshold", -1), ("warmup", 0), ("last", -1), ("most", 0), ("power", 0.0), ("power", "high"), ("rows", -1)],
)
def test_an_option_out_of_range_is_refused_with_its_name(option: str, value: object) -> None:
    with pytest.raises(BadOption, match=f"{option}=.*was given. Allowed: "):
        parse_rule(f"seacache:{option}={value}")
    assert ours(shared("flux")) == []


def test_a_loop_without_known_levels_of_noise_is_refused() -> None:
    signal = Signal(1, [torch.ones(1, 4, 2)], [torch.ones(1, 4, 2)], AS_IT_IS, since=0)
    with pytest.raises(Unusable, match=r"noise scheduler.*levels of noise are not known.*easycache"):
        load("filtered_input").change(signal, Memory(Store(), "net", 0))
    assert noise_shares(object(), torch.arange(3)) is None


def test_rows_that_the_tokens_do_not_fill_are_refused() -> None:
    pipe = shared("flux")
    accelerate(pipe, "seacache:rows=7")
    try:
        with pytest.raises(BadOption, match=r"rows=7 was given. Allowed: a number that divides 48"):
            run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS)
    finally:
        restore(pipe)
