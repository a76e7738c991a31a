"""What is predicted where a rule decides in the run: against diffusers' own cache, fixed schedules, stream by stream.

Each comparison has a twin that plants a fault and sees the comparison fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from hypothesis import given
from hypothesis import strategies as st
from online import INSIDE, STEPS, decided, denoised, governed, plain, played, residual, stacks, strips
from pipelines import TINY, fresh, run, shared
from probes import BRANCHES, leaf_calls
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerated, assets, report
from diffcache.documents import DenoiserPlan
from diffcache.executor import FailedOpen, Store
from diffcache.executor.criteria import first_block
from diffcache.executor.pairing import MAIN, Inputs, pair, reader
from diffcache.host import find_sites

# --- the same as diffusers' own FirstBlockCache ----------------------------------------------------------------------


def first_block_cache(pipe: Any, call: dict[str, Any], threshold: float, **over: Any) -> tuple[Tensor, list[int]]:
    """diffusers' own: its output, and per forward how often attention ran in the last block."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    ran: list[int] = []
    last = find_sites(pipe.transformer)[stacks(pipe)[-1]][-1]
    attention = next(part for name, part in last.named_children() if "attn" in name)
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(0)),
        attention.register_forward_hook(lambda *_: ran.__setitem__(-1, 1)),
    ]
    try:
        return run(pipe, call, **over), ran
    finally:
        for handle in handles:
            handle.remove()
        pipe.transformer.disable_cache()


def assert_like_first_block_cache(pipe: Any, call: dict[str, Any], threshold: float, branches: int, **over: Any) -> str:
    """The same forwards are computed, and the outputs agree to rounding. Returns the strip of the first branch."""
    steps = over.get("num_inference_steps", call.get("num_inference_steps"))
    expected, ran = first_block_cache(pipe, call, threshold, **over)
    schedule = decided(pipe, "first_block", threshold, plan=residual("#" + "." * (steps - 1)))
    with accelerated(pipe, schedule):
        output = run(pipe, call, **over)
        found = report(pipe)
    for site in stacks(pipe):
        for branch, strip in enumerate(strips(found, site)):
            assert strip == "".join("·■"[r] for r in ran[branch::branches]), (site, branch)
    assert not any(row.failed_open for row in found.rows)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    return strips(found, stacks(pipe)[0])[0]


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [
        ("flux", (0.0, 0.35, 0.4, 0.5, 0.7)),
        ("flux_true_cfg", (0.35, 0.5, 0.7)),
        ("wan", (0.1, 0.15, 0.2, 0.3, 0.6)),
        ("cogvideox", (0.4, 0.6, 0.9)),
    ],
)
def test_first_block_is_first_block_cache(name: str, thresholds: Sequence[float]) -> None:
    """Two streams, two stacks, one and two branches: residuals stack by stack telescope to the one that it keeps."""
    pipe = fresh(name)
    seen = {
        assert_like_first_block_cache(
            pipe, TINY[name].call(pipe), threshold, BRANCHES[TINY[name].guidance], num_inference_steps=STEPS
        )
        for threshold in thresholds
    }
    assert len(seen) > 1, "every threshold decides alike: nothing was compared"


def test_first_block_is_first_block_cache_on_the_trained_model() -> None:
    model = assets.load("flux")
    call = model.call(model.subjects[:1], [0], steps=16)
    call["output_type"] = "latent"
    del call["generator"]
    seen = {assert_like_first_block_cache(model.pipe, call, threshold, 1) for threshold in (0.1, 0.25, 0.5)}
    assert len(seen) == 3


def test_streams_of_equal_length_are_distinguished() -> None:
    """As many text tokens as picture tokens: only what one block hands to the next says which is which."""
    pipe = fresh("flux")
    call = {**TINY["flux"].call(pipe), "height": 16, "width": 12}
    with denoised(pipe.transformer) as calls:
        assert "·" in assert_like_first_block_cache(pipe, call, 0.5, 1, num_inference_steps=STEPS)
    assert calls[0][0].shape[1] == call["prompt_embeds"].shape[1]


def test_streams_distinguished_by_their_shape_alone_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import stacks as passes

    monkeypatch.setattr(passes, "_record_flow", lambda *_: None)
    with pytest.raises(FailedOpen, match="none of the first block's outputs is known to carry on its input"):
        test_streams_of_equal_length_are_distinguished()


def test_a_residual_compared_with_the_step_before_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_block, "ABOUT", dataclasses.replace(first_block.ABOUT, accumulates=True))
    with pytest.raises(AssertionError):
        test_first_block_is_first_block_cache("wan", (0.1, 0.15, 0.2, 0.3, 0.6))


def test_a_text_stream_that_is_not_moved_along_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import site as decide
    from diffcache.executor.pairing import alone

    monkeypatch.setattr(decide, "pair", lambda inputs, outputs, flow, **kwargs: alone(inputs.main, outputs))
    with pytest.raises(AssertionError):
        test_every_stream_is_moved_along_with_its_input("flux")


# --- what is predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["modulated_input", "output_rate"])
@pytest.mark.parametrize("name", ["flux", "dit", "sd3"])
def test_a_run_is_bit_for_bit_the_schedule_of_the_steps_it_computed(name: str, rule: str) -> None:
    pipe = shared(name)
    output, found = played(name, decided(pipe, rule, 0.5))
    (strip,) = strips(found, governed(pipe, rule))
    assert "·" in strip
    assert "■" in strip[2:]
    plan = residual(strip.replace("■", "#"))
    sites = stacks(pipe) if rule in INSIDE else ["model"]
    static = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=dict.fromkeys(sites, plan))})
    expected, _ = played(name, static)
    assert torch.equal(output, expected)
    assert not torch.equal(output, plain(name))


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_every_stream_is_moved_along_with_its_input(name: str) -> None:
    """Text and pictures, in any order in which a block takes and returns them; the last one of SD 3 drops the text."""
    pipe = shared(name)
    site = stacks(pipe)[-1]  # where the blocks before have changed the text
    modules = find_sites(pipe.transformer)[site]
    plan = residual("#" + "." * (STEPS - 1))
    given: list[dict[str, Tensor]] = []
    returned: list[tuple[Tensor, ...]] = []
    read = reader(modules[0])

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append({name: t.clone() for name, t in read(args, kwargs).named().items()})

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        returned.append(tuple(t.clone() for t in output if t is not None))

    handles = [
        modules[0].register_forward_pre_hook(enter, with_kwargs=True),
        modules[-1].register_forward_hook(leave),
    ]
    try:
        schedule = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites={site: plan})})
        played(name, schedule)
    finally:
        for handle in handles:
            handle.remove()
    moved = 0
    for i in range(1, STEPS):
        for j, first in enumerate(returned[0]):
            fitting = [
                n for n, t in given[0].items() if t.shape == first.shape and n in (MAIN, "encoder_hidden_states")
            ]
            (stream,) = fitting
            expected = first + (given[i][stream] - given[0][stream])
            torch.testing.assert_close(returned[i][j], expected)
            moved += not torch.equal(given[i][stream], given[0][stream])
    assert moved >= STEPS - 1


def test_an_anchor_that_stays_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put

    def put_once(self: Store, key: Any, step: int, anchor: Any) -> None:
        if step >= 0 or self.get(key, step) is None:
            put(self, key, step, anchor)

    monkeypatch.setattr(Store, "put", put_once)
    monkeypatch.setattr(Store, "drop", lambda self, key, step: None)
    with pytest.raises(AssertionError):
        test_a_run_is_bit_for_bit_the_schedule_of_the_steps_it_computed("flux", "output_rate")


def test_predicted_steps_do_not_run_the_blocks() -> None:
    """Under first_block the first one runs, under modulated_input its first normalisation, else no part of a block."""
    pipe = shared("flux")
    with leaf_calls(pipe, ["transformer"]) as full:
        plain("flux")
    for rule in INSIDE:
        with leaf_calls(pipe, ["transformer"]) as calls:
            _, found = played("flux", decided(pipe, rule))
        (strip, *_) = strips(found, stacks(pipe)[0])
        assert strip == "■" + "·" * (STEPS - 1)
        for (denoiser, path), times in full.items():
            inside = path.startswith(("transformer_blocks.", "single_transformer_blocks."))
            runs = {"first_block": "transformer_blocks.0.", "modulated_input": "transformer_blocks.0.norm1."}
            first = rule in runs and path.startswith(runs[rule])
            assert calls[denoiser, path] == (times if first or not inside else times // STEPS), (rule, path)


# --- which input goes with which output ------------------------------------------------------------------------------


@given(st.data())
def test_streams_find_their_outputs(data: st.DataObject) -> None:
    """By shape where shapes differ, by what was seen to flow where they do not; in any order, among other inputs."""
    count = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    inputs = [torch.zeros(2, n, 5) for n in lengths]
    order = data.draw(st.permutations(range(count)))
    outputs = [torch.ones_like(inputs[i]) for i in order]
    names = [MAIN, *(f"stream_{i}" for i in range(1, count))]
    others = {names[i]: inputs[i] for i in data.draw(st.permutations(range(1, count)))}
    others |= {"temb": torch.zeros(2, 5)}
    twins = {i for i in range(count) if lengths.count(lengths[i]) > 1}
    known = data.draw(st.sets(st.sampled_from(range(count))))
    flow = {names[i]: order.index(i) for i in known}
    found = pair(Inputs((inputs[0],), others), outputs, flow)
    x = found.x(Inputs((inputs[0],), others))
    for i in range(count):
        own = found.own[order.index(i)]
        if i in known or not twins - known:
            assert own is not None
            assert x[own] is inputs[i]
        elif own is not None:
            assert x[own].shape == inputs[i].shape
    # One unknown among twins follows from the others.
    groups = [{j for j in twins if lengths[j] == n} for n in set(lengths)]
    assert found.unclear == any(len(group - known) > 1 for group in groups)


def test_streams_that_cannot_be_distinguished_are_not_predicted() -> None:
    """Two inputs of a block have the shape of both outputs, and the host hands on copies."""
    two = Inputs((torch.ones(1, 3, 4),), {"text": torch.ones(1, 3, 4)})
    found = pair(two, (torch.ones(1, 3, 4), torch.ones(1, 3, 4)), {})
    assert found.unclear
    assert found.own == (None, None)
