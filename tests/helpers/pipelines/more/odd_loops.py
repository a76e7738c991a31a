"""Loops of other habits: a step taken in parts, noise schedulers of the loop's own, levels set up within the loop."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.flux import flux2
from pipelines.more.flux import around, flux2_edit_call
from pipelines.more.newer_videos import helios_call
from pipelines.more.qwen import qwen_21, qwen_21_call
from pipelines.more.unets import sd15_call, sd15_plain, tiny
from pipelines.more.wan import sky_reels, wan_call, wan_vae
from pipelines.parts import assemble, network
from pipelines.tiny import plain, two_calls


def _panorama_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two views of one picture, each with separate states of the noise scheduler."""
    return {**sd15_call(pipe, batch), "height": 16, "width": 576}


def _forcing() -> Any:
    return sky_reels(diffusers.SkyReelsV2DiffusionForcingPipeline)


def _forcing_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**wan_call(pipe, batch), "prompt": None}


def _forcing_in_turn_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Later frames wait: more iterations than the noise scheduler has timesteps."""
    return {**_forcing_call(pipe, batch), "ar_step": 2, "causal_block_size": 1}


def _pyramid() -> Any:
    return assemble(
        "helios",
        diffusers.HeliosPyramidPipeline,
        transformer=network("HeliosTransformer3DModel"),
        vae=wan_vae,
        scheduler=lambda: diffusers.HeliosScheduler(gamma=0.3),  # a third makes the noise of a block singular
    )


def _pyramid_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Three sizes, one after the other, with two steps each."""
    call = {**helios_call(pipe, batch), "num_frames": 5, "pyramid_num_inference_steps_list": [2, 2, 2]}
    del call["num_inference_steps"]
    return call


def _far() -> Any:
    return assemble(
        "any_flow",
        diffusers.AnyFlowFARPipeline,
        transformer=network("AnyFlowFARTransformer3DModel", chunk_partition=(1, 1, 1)),
        vae=wan_vae,
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


def _klein_kv() -> Any:
    return around(diffusers.Flux2KleinKVPipeline, flux2())


def _qwen_21_cached_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_21_call(pipe, batch), "use_kv_cache": True}


PIPELINES = (
    tiny("sd15_panorama", sd15_plain, "StableDiffusionPanoramaPipeline", _panorama_call),
    two_calls("sky_reels_forcing", _forcing, _forcing_call, modality="video"),
    two_calls("helios_pyramid", _pyramid, _pyramid_call, modality="video"),
)

# What cannot be cached, or not at once, and how the reported outcome begins.
LIMITS = {
    tiny("sd15_sag", sd15_plain, "StableDiffusionSAGPipeline", sd15_call): "UnsupportedModel",
    two_calls("sky_reels_forcing_in_turn", _forcing, _forcing_in_turn_call, modality="video", steps=10): "failed open",
    two_calls("any_flow_far", _far, wan_call, modality="video"): "no effect",
    plain("flux2_klein_kv", _klein_kv, flux2_edit_call): "failed open",
    two_calls("qwen_21_cached", qwen_21, _qwen_21_cached_call): "failed open",
}
