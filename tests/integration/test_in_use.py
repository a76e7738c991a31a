"""Accelerated pipelines in the settings that people run them in: number types, offloading, compilation, saving,
quantised weights. Each is compared with the same setting untouched, and skips are counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate as huggingface
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from pipelines import TINY, fresh, run, shared
from pipelines.more.unets import sdxl_ip_call, with_ip_adapters
from probes import bound, granularities, hold, ours
from torch import Tensor, nn

from diffcache import accelerate, accelerated, measure, report, restore
from diffcache.errors import AlreadyAccelerated

SOME = ("flux", "sdxl", "wan", "chroma")  # distilled guidance; batched, a U-Net; separate calls, video; separate
STEPS = 4  # twice a computed step and a predicted one


def call_of(pipe: Any, name: str) -> dict[str, Any]:
    return TINY[name].call(pipe) | {"num_inference_steps": STEPS}


def planned(pipe: Any, name: str, granularity: str, mask: str) -> Any:
    return bound(pipe, hold((mask * STEPS)[:STEPS]), granularity)


def skipped(pipe: Any) -> int:
    rows = report(pipe).rows
    assert not any(row.failed_open for row in rows)
    return sum(row.predicted for row in rows)


def assert_serves(
    pipe: Any,
    name: str,
    granularity: str = "model",
    call: dict[str, Any] | None = None,
    untouched: Tensor | None = None,
) -> None:
    """Bit-equal when all is computed, skipping and repeatable when not, as found afterwards; as it is set up now.

    Args:
        untouched: What the pipeline returns without acceleration, if it is known.
    """
    call = call or call_of(pipe, name)
    untouched = run(pipe, call) if untouched is None else untouched
    with accelerated(pipe, planned(pipe, name, granularity, "#")):
        assert torch.equal(run(pipe, call), untouched)
        assert skipped(pipe) == 0
    with accelerated(pipe, planned(pipe, name, granularity, "#.")):
        fast = run(pipe, call)
        assert skipped(pipe) > 0
        assert torch.isfinite(fast).all()
        assert not torch.equal(fast, untouched)
        assert torch.equal(run(pipe, call), fast)
        assert report(pipe).bytes_held == 0
    assert torch.equal(run(pipe, call), untouched)


places = pytest.mark.parametrize(("name", "granularity"), [(n, g) for n in SOME for g in granularities(TINY[n])])


@places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(name: str, granularity: str, dtype: torch.dtype) -> None:
    pipe = fresh(name).to(dtype)
    call = call_of(pipe, name)
    halved = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    untouched = run(pipe, halved)
    with accelerated(pipe, planned(pipe, name, granularity, "#")):
        assert torch.equal(run(pipe, halved), untouched)
    with accelerated(pipe, planned(pipe, name, granularity, "#.")):
        fast = run(pipe, halved)
        assert skipped(pipe) > 0
        assert torch.isfinite(fast).all()
        assert not torch.equal(fast, untouched)


def sequentially(pipe: Any, name: str) -> None:
    """What ``enable_sequential_cpu_offload`` does: weights come layer by layer, and go."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            huggingface.cpu_offload(part, torch.device("cpu"), offload_buffers=True)


def in_groups(kind: str, pipe: Any, name: str) -> None:
    for denoiser in TINY[name].denoisers:
        options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(
            getattr(pipe, denoiser), onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
            offload_type=kind, **options,
        )  # fmt: skip


OFFLOADS: dict[str, Callable[[Any, str], None]] = {
    "sequential": sequentially,
    "groups of blocks": lambda pipe, name: in_groups("block_level", pipe, name),
    "groups of leaves": lambda pipe, name: in_groups("leaf_level", pipe, name),
}


@places
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_before(name: str, granularity: str, offload: str) -> None:
    pipe, untouched = offloaded(name, offload)
    assert_serves(pipe, name, granularity, untouched=untouched)
    assert not ours(pipe)


@functools.cache
def offloaded(name: str, offload: str) -> tuple[Any, Tensor]:
    """Return a pipeline that all granularities share, and what it returns: offloaded, the same as before."""
    pipe = fresh(name)
    plain = run(pipe, call_of(pipe, name))
    OFFLOADS[offload](pipe, name)
    assert torch.equal(run(pipe, call_of(pipe, name)), plain)
    return pipe, plain


@places
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_after(name: str, granularity: str, offload: str) -> None:
    pipe = fresh(name)
    call = call_of(pipe, name)
    accelerate(pipe, planned(pipe, name, granularity, "#."))
    fast = run(pipe, call)
    OFFLOADS[offload](pipe, name)
    assert torch.equal(run(pipe, call), fast)
    assert skipped(pipe) > 0
    restore(pipe)


def test_tiled_decoding() -> None:
    pipe = fresh("sdxl")
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    call = call_of(pipe, "sdxl") | {"output_type": "pt"}
    untouched = run(pipe, call)
    with accelerated(pipe, planned(pipe, "sdxl", "stack", "#")):
        assert torch.equal(run(pipe, call), untouched)


@pytest.fixture
def counted() -> Iterator[Any]:
    """Dynamo's counters, cleared, and its memory of other tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sdxl"])
def test_a_compiled_denoiser_is_one_graph_and_compiled_once(name: str, counted: Any) -> None:
    """Under ``fullgraph=True`` a break would be an error."""
    pipe = fresh(name)
    call = call_of(pipe, name)
    (denoiser,) = TINY[name].denoisers
    getattr(pipe, denoiser).compile(backend="eager", fullgraph=True)
    untouched = run(pipe, call)
    graphs = counted["stats"]["unique_graphs"]
    with accelerated(pipe, planned(pipe, name, "model", "#.")), torch._dynamo.config.patch(error_on_recompile=True):
        fast = run(pipe, call)
        assert torch.equal(run(pipe, call), fast)
        assert skipped(pipe) > 0
    assert not torch.equal(fast, untouched)
    assert counted["graph_break"] == {}
    assert counted["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["flux", "wan", "qwen_image"])
@pytest.mark.parametrize("granularity", ["model", "stack", "block"])
def test_repeated_blocks_are_compiled_once(name: str, granularity: str, counted: Any) -> None:
    pipe = fresh(name)
    call = call_of(pipe, name)
    (denoiser,) = TINY[name].denoisers
    getattr(pipe, denoiser).compile_repeated_blocks(backend="eager", fullgraph=True)
    untouched = run(pipe, call)
    graphs = counted["stats"]["unique_graphs"]
    with accelerated(pipe, planned(pipe, name, granularity, "#")):
        assert torch.equal(run(pipe, call), untouched)
    with accelerated(pipe, planned(pipe, name, granularity, "#.")):
        fast = run(pipe, call)
        assert torch.equal(run(pipe, call), fast)
        assert skipped(pipe) > 0
    assert counted["graph_break"] == {}
    assert counted["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_what_is_saved_while_accelerated_is_the_plain_pipeline(name: str, tmp_path: Any) -> None:
    pipe = fresh(name)
    call = call_of(pipe, name)
    untouched = run(pipe, call)
    with accelerated(pipe, planned(pipe, name, granularities(TINY[name])[-1], "#.")):
        pipe.save_pretrained(tmp_path)
    nothing = {part: None for part, value in pipe.components.items() if value is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **nothing)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, call), untouched)


@places
def test_quantised_weights(name: str, granularity: str) -> None:
    pipe, untouched = quantised(name)
    assert_serves(pipe, name, granularity, untouched=untouched)
    assert not ours(pipe)


@functools.cache
def quantised(name: str) -> tuple[Any, Tensor]:
    """Return a pipeline that all granularities share, and what it returns."""
    torchao = pytest.importorskip("torchao.quantization")  # the newest asks for a newer torch than the oldest here
    pipe = fresh(name)
    for denoiser in TINY[name].denoisers:
        torchao.quantize_(getattr(pipe, denoiser), torchao.Int8WeightOnlyConfig())
    untouched = run(pipe, call_of(pipe, name))
    assert not torch.equal(untouched, run(shared(name), call_of(shared(name), name)))
    return pipe, untouched


def with_lora(pipe: Any, name: str) -> None:
    for denoiser in TINY[name].denoisers:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
            getattr(pipe, denoiser).add_adapter(config, "style")


@places
def test_a_lora_comes_and_goes_before_and_after(name: str, granularity: str) -> None:
    before, after = fresh(name), fresh(name)
    call = call_of(before, name)
    plain = run(before, call)
    accelerate(after, planned(after, name, granularity, "#."))
    fast = run(after, call)
    with_lora(before, name)
    with_lora(after, name)
    assert not torch.equal(run(before, call), plain)
    assert_serves(before, name, granularity)
    accelerate(before, planned(after, name, granularity, "#."))
    assert torch.equal(run(after, call), run(before, call))
    assert not torch.equal(run(after, call), fast)
    assert skipped(after) > 0
    for denoiser in TINY[name].denoisers:
        getattr(after, denoiser).delete_adapters("style")
        getattr(after, denoiser).unload_lora()
    assert torch.equal(run(after, call), fast)
    restore(after)
    assert torch.equal(run(after, call), plain)


@pytest.mark.parametrize("granularity", ["model", "stack"])
def test_an_image_adapter_that_comes_afterwards(granularity: str) -> None:
    before, after = fresh("sdxl"), fresh("sdxl")
    accelerate(after, planned(after, "sdxl", granularity, "#."))
    run(after, call_of(after, "sdxl"))
    call = sdxl_ip_call(with_ip_adapters(before)) | {"num_inference_steps": STEPS}
    with_ip_adapters(after)
    assert_serves(before, "sdxl", granularity, call)
    accelerate(before, f"uniform:every=2,sites={granularity}")
    assert torch.equal(run(after, call), run(before, call))
    assert skipped(after) > 0


def test_diffusers_own_cache_is_refused_and_works_on_after_ours() -> None:
    pipe = fresh("flux")
    call = call_of(pipe, "flux")
    untouched = run(pipe, call)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    theirs = run(pipe, call)
    assert not torch.equal(theirs, untouched)
    with pytest.raises(AlreadyAccelerated, match="disable_cache"):
        accelerate(pipe, planned(pipe, "flux", "model", "#."))
    with pytest.raises(AlreadyAccelerated, match="disable_cache"):
        measure(pipe, [call])
    assert torch.equal(run(pipe, call), theirs)
    pipe.transformer.disable_cache()
    assert_serves(pipe, "flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert torch.equal(run(pipe, call), theirs)
