"""Newer transformers for videos, those of Kandinsky 5 and Cosmos for pictures as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch import nn

from pipelines.more.videos import hunyuan_vae
from pipelines.more.wan import flow_unipc, frames, wan_vae
from pipelines.parts import (
    BETAS,
    POOLED,
    STEPS,
    TOKENS,
    VIDEO,
    assemble,
    flow_euler,
    image_vae,
    network,
    normal,
    picture,
    prompt,
    text,
)
from pipelines.tiny import one_batch, two_calls

HEIGHT, WIDTH, FRAMES = VIDEO["height"], VIDEO["width"], VIDEO["num_frames"]


# --- Latte, Allegro, EasyAnimate -------------------------------------------------------------------------------------


def _ddim() -> Any:
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False)


def _latte() -> Any:
    made = network("LatteTransformer3DModel")
    return assemble("latte", diffusers.LattePipeline, transformer=made, vae=image_vae(), scheduler=_ddim)


def _latte_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    size = {"height": 24, "width": 16, "video_length": 3}
    call = {**text(batch), **VIDEO, **size, "guidance_scale": 4.0, "negative_prompt": None, "clean_caption": False}
    del call["num_frames"]
    return call


def _allegro() -> Any:
    return assemble(
        "allegro",
        diffusers.AllegroPipeline,
        transformer=network("AllegroTransformer3DModel"),
        vae=lambda: diffusers.AutoencoderKLAllegro(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2),
        scheduler=_ddim,
    )


def _allegro_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", dtype=torch.int64)
    return {**words, **VIDEO, "guidance_scale": 4.0, "negative_prompt": None, "clean_caption": False}


def _easy_animate(pipeline: type, **over: Any) -> Any:
    return assemble(
        "easy_animate",
        pipeline,
        transformer=network("EasyAnimateTransformer3DModel", **over),
        vae=lambda: diffusers.AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=flow_euler(shift=3.0),
    )


def _easy_animate_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **VIDEO, "guidance_scale": 4.0}


def _easy_animate_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """All of every frame is to be made anew: with a part of it the pipeline asks its autoencoder for a setting that
    there is no longer."""
    video = torch.stack([picture(f"frame {i}", HEIGHT, WIDTH, batch) for i in range(FRAMES)], dim=2)
    mask = torch.full((batch, 1, FRAMES, HEIGHT, WIDTH), 255.0)
    return {**_easy_animate_call(pipe, batch), "video": video, "mask_video": mask, "strength": 0.7}


# --- Kandinsky 5 -----------------------------------------------------------------------------------------------------


def _kandinsky5(pipeline: type, vae: Callable[[], Any] = hunyuan_vae, **over: Any) -> Any:
    return assemble(
        "kandinsky5",
        pipeline,
        transformer=network("Kandinsky5Transformer3DModel", **over),
        vae=vae,
        scheduler=flow_euler(shift=5.0),
    )


def _kandinsky5_image() -> Any:
    pipe = _kandinsky5(diffusers.Kandinsky5T2IPipeline, visual_cond=False)
    pipe.resolutions = [(WIDTH, HEIGHT)]  # it would take the nearest of those that it was trained with
    return pipe


def _kandinsky5_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    call: dict[str, Any] = {**VIDEO, "guidance_scale": 4.0}
    for sign, tag in (("", "prompt"), ("negative_", "negative")):
        call[f"{sign}prompt_embeds_qwen"] = prompt(tag, batch)
        call[f"{sign}prompt_embeds_clip"] = normal(f"{tag} pooled", POOLED, batch=batch)
        call[f"{sign}prompt_cu_seqlens"] = TOKENS * torch.arange(batch + 1, dtype=torch.int32)
    return call


def _kandinsky5_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """The first four latent frames are given the mean and deviation of those after them, so there must be some."""
    return {**_kandinsky5_call(pipe, batch), "image": frames("image", 1)[0], "num_frames": 21}


def _kandinsky5_edit() -> Any:
    pipe = _kandinsky5(diffusers.Kandinsky5I2IPipeline, image_vae(levels=4))
    pipe.resolutions = [(WIDTH, HEIGHT)]
    return pipe


def _kandinsky5_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_kandinsky5_image_call(pipe, batch), "image": frames("image", batch)}


def _kandinsky5_image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = _kandinsky5_call(pipe, batch)
    del call["num_frames"]
    return call


# --- Cosmos ----------------------------------------------------------------------------------------------------------


class Permissive(nn.Module):
    """Stands for the safety checker, which the pipelines refuse to be without; of latents it is not asked."""

    device, dtype = torch.device("cpu"), torch.float32  # the pipelines take theirs from the first part that has one


def _cosmos(pipeline: type, in_channels: int, vae: Callable[[], Any], scheduler: Callable[[], Any]) -> Any:
    made = network("CosmosTransformer3DModel", in_channels=in_channels)
    return assemble("cosmos", pipeline, transformer=made, vae=vae, scheduler=scheduler, safety_checker=Permissive)


def _cosmos_vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )


def _edm_euler() -> Any:
    return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")


def _cosmos2(pipeline: type, in_channels: int) -> Any:
    return _cosmos(pipeline, in_channels, wan_vae, flow_euler(use_karras_sigmas=True))


def _cosmos_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **VIDEO, "guidance_scale": 4.0}


def _cosmos_image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = _cosmos_call(pipe, batch)
    del call["num_frames"]
    return call


def _cosmos_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_cosmos_call(pipe, batch), "video": frames("video", FRAMES), "num_latent_conditional_frames": 2}


def _cosmos_video_to_world_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_cosmos_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH)}


# --- Sana, Helios, Motif ---------------------------------------------------------------------------------------------


def _sana_video(pipeline: type) -> Any:
    made = network("SanaVideoTransformer3DModel")
    return assemble("sana_video", pipeline, transformer=made, vae=wan_vae, scheduler=flow_euler(shift=7.0))


def _sana_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", dtype=torch.int64)
    call = {**words, **VIDEO, "height": 64, "frames": FRAMES, "guidance_scale": 4.0, "negative_prompt": None}
    del call["num_frames"]
    return {**call, "use_resolution_binning": False}


def _sana_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sana_video_call(pipe, batch), "image": picture("image", 64, WIDTH)}


def _helios() -> Any:
    return assemble(
        "helios",
        diffusers.HeliosPipeline,
        transformer=network("HeliosTransformer3DModel"),
        vae=wan_vae,
        scheduler=lambda: diffusers.HeliosScheduler(stages=1),
    )


def helios_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two chunks, each with a separate loop."""
    size = {"height": 64, "width": 64, "num_frames": 10, "num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1]}
    return {**text(batch), **VIDEO, **size, "guidance_scale": 4.0}


def _guided() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0)


def _without_a_block() -> Any:
    """The branch to lead away from is the same prompt without the second block, by a hook there for one call."""
    return AutoGuidance(guidance_scale=4.0, auto_guidance_config=LayerSkipConfig([1], fqn="transformer_blocks"))


def _also_without_a_block() -> Any:
    return SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig([1], fqn="transformer_blocks"),
    )


def _motif_video(pipeline: type, guider: Callable[[], Any] = _guided) -> Any:
    return assemble(
        "motif_video",
        pipeline,
        transformer=network("MotifVideoTransformer3DModel"),
        vae=wan_vae,
        scheduler=flow_euler(),
        guider=guider,
    )


def _motif_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **VIDEO}


def _motif_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_motif_video_call(pipe, batch), "prompt": None, "image": picture("image", HEIGHT, WIDTH)}


PIPELINES = (
    one_batch("latte", _latte, _latte_call, modality="video"),
    one_batch("allegro", _allegro, _allegro_call, modality="video"),
    one_batch(
        "easy_animate", lambda: _easy_animate(diffusers.EasyAnimatePipeline), _easy_animate_call, modality="video"
    ),
    one_batch(
        "easy_animate_inpaint",
        lambda: _easy_animate(diffusers.EasyAnimateInpaintPipeline, in_channels=4 + 1 + 4),
        _easy_animate_inpaint_call,
        modality="video",
        steps=4,
    ),
    two_calls("kandinsky5", lambda: _kandinsky5(diffusers.Kandinsky5T2VPipeline), _kandinsky5_call, modality="video"),
    two_calls(
        "kandinsky5_image_to_video",
        lambda: _kandinsky5(diffusers.Kandinsky5I2VPipeline),
        _kandinsky5_image_to_video_call,
        modality="video",
    ),
    two_calls("kandinsky5_image", _kandinsky5_image, _kandinsky5_image_call),
    two_calls("kandinsky5_edit", _kandinsky5_edit, _kandinsky5_edit_call),
    two_calls(
        "cosmos",
        lambda: _cosmos(diffusers.CosmosTextToWorldPipeline, 4, _cosmos_vae, _edm_euler),
        _cosmos_call,
        modality="video",
    ),
    two_calls(
        "cosmos_video_to_world",
        lambda: _cosmos(diffusers.CosmosVideoToWorldPipeline, 5, _cosmos_vae, _edm_euler),
        _cosmos_video_to_world_call,
        modality="video",
    ),
    two_calls("cosmos2_image", lambda: _cosmos2(diffusers.Cosmos2TextToImagePipeline, 4), _cosmos_image_call),
    two_calls(
        "cosmos2_video_to_world",
        lambda: _cosmos2(diffusers.Cosmos2VideoToWorldPipeline, 5),
        _cosmos_video_to_world_call,
        modality="video",
    ),
    two_calls(
        "cosmos25",
        lambda: _cosmos(diffusers.Cosmos2_5_PredictBasePipeline, 5, wan_vae, flow_unipc),
        _cosmos_call,
        modality="video",
    ),
    two_calls(
        "cosmos25_video_to_world",
        lambda: _cosmos(diffusers.Cosmos2_5_PredictBasePipeline, 5, wan_vae, flow_unipc),
        _cosmos_video_call,
        modality="video",
    ),
    one_batch("sana_video", lambda: _sana_video(diffusers.SanaVideoPipeline), _sana_video_call, modality="video"),
    one_batch(
        "sana_image_to_video",
        lambda: _sana_video(diffusers.SanaImageToVideoPipeline),
        _sana_image_to_video_call,
        modality="video",
    ),
    two_calls("helios", _helios, helios_call, modality="video", steps=2 * STEPS),
    two_calls("motif_video", lambda: _motif_video(diffusers.MotifVideoPipeline), _motif_video_call, modality="video"),
    two_calls(
        "motif_video_without_a_block",
        lambda: _motif_video(diffusers.MotifVideoPipeline, _without_a_block),
        _motif_video_call,
        modality="video",
    ),
    two_calls(
        "motif_video_also_without_a_block",
        lambda: _motif_video(diffusers.MotifVideoPipeline, _also_without_a_block),
        _motif_video_call,
        modality="video",
        guidance="separate, a third branch from the third step on",
    ),
    two_calls(
        "motif_image_to_video",
        lambda: _motif_video(diffusers.MotifVideoImage2VideoPipeline),
        _motif_image_to_video_call,
        modality="video",
    ),
)
