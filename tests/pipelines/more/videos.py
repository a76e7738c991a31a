"""More transformers for videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from torch import nn

from pipelines import videos
from pipelines.more.wan import ImageProcessor, frames, image_encoder, wan_vae
from pipelines.parts import (
    BETAS,
    POOLED,
    STEPS,
    TOKENS,
    VIDEO,
    assemble,
    flow_euler,
    image_vae,
    normal,
    picture,
    prompt,
    text,
)
from pipelines.tiny import one_batch, plain, two_calls

HEIGHT, WIDTH, FRAMES = VIDEO["height"], VIDEO["width"], VIDEO["num_frames"]
_PLAIN = {tiny.name: tiny for tiny in videos.PIPELINES}


def _network(name: str, **over: Any) -> Callable[[], Any]:
    def make() -> Any:
        from denoisers import TINY as NETWORKS

        network = NETWORKS[name].make()
        return type(network).from_config(network.config, **over) if over else network

    return make


def _like(name: str, pipeline: type, **over: dict[str, Any]) -> Any:
    """Another pipeline, of parts like those of one in `pipelines.videos`; `over`: other settings, by part."""
    parts = {
        key: lambda part=part, key=key: type(part).from_config(part.config, **over.get(key, {}))
        for key, part in _PLAIN[name].build().components.items()
        if part is not None
    }
    return assemble(name, pipeline, **parts)


def _as(name: str, pipe: Any, batch: int, *without: str, **over: Any) -> dict[str, Any]:
    """What one in `pipelines.videos` is called with, but for some of it, and this as well."""
    call = {**_PLAIN[name].call(pipe, batch), **over}
    return {key: value for key, value in call.items() if key not in without}


# --- CogVideoX -------------------------------------------------------------------------------------------------------


def _cogvideox_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("cogvideox", pipe, batch, image=picture("image", HEIGHT, WIDTH, batch))


def _cogvideox_video_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("cogvideox", pipe, batch, "num_frames", video=frames("video", FRAMES), strength=0.7)


def _cogvideox_control_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("cogvideox", pipe, batch, "num_frames", control_video=frames("control", FRAMES))


# --- HunyuanVideo ----------------------------------------------------------------------------------------------------


def _hunyuan_image_to_video(kind: str) -> Any:
    channels = 4 + 4 + 1 if kind == "latent_concat" else 4
    return _like(
        "hunyuan_video",
        diffusers.HunyuanVideoImageToVideoPipeline,
        transformer={"in_channels": channels, "image_condition_type": kind},
    )


def _hunyuan_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("hunyuan_video", pipe, batch, image=picture("image", HEIGHT, WIDTH, batch), num_frames=FRAMES)


def _hunyuan_image_to_video_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("hunyuan_video_true_cfg", pipe, batch, image=picture("image", HEIGHT, WIDTH, batch), num_frames=FRAMES)


def _framepack() -> Any:
    vae = _PLAIN["hunyuan_video"].build().vae
    return assemble(
        "framepack",
        diffusers.HunyuanVideoFramepackPipeline,
        transformer=_network("HunyuanVideoFramepackTransformer3DModel"),
        vae=lambda: type(vae).from_config(vae.config),
        image_encoder=image_encoder,
        feature_extractor=ImageProcessor,
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _framepack_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """One section; its latents would come back as a list."""
    size = {"height": 64, "width": 48, "num_frames": 9, "latent_window_size": 3, "output_type": "pt"}
    return _as("hunyuan_video", pipe, batch, image=picture("image", 64, 48, batch), **size)


def _framepack_sections_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two sections, each with a loop of its own."""
    return {**_framepack_call(pipe, batch), "num_frames": 18}


def _framepack_forward_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_framepack_sections_call(pipe, batch), "sampling_type": "vanilla"}


def _hunyuan15(pipeline: type, guider: Callable[[], Any], **extra: Any) -> Any:
    pipe = assemble(
        "hunyuan_video15",
        pipeline,
        transformer=_network("HunyuanVideo15Transformer3DModel", target_size=64),
        vae=lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ),
        scheduler=flow_euler(shift=5.0),
        guider=guider,
        **extra,
    )
    pipe.vision_num_semantic_tokens = 5
    return pipe


def _hunyuan15_text(batch: int) -> dict[str, Any]:
    """Two kinds of text; where the second has none, as here in the negative prompt, it is masked altogether."""
    words = text(batch, mask="prompt_embeds_mask", dtype=torch.int64)
    for sign, length in (("", 3), ("negative_", 0)):
        words[f"{sign}prompt_embeds_2"] = normal(f"{sign}glyphs", 4, POOLED, batch=batch)
        words[f"{sign}prompt_embeds_mask_2"] = (torch.arange(4) < length).long().repeat(batch, 1)
    return words


def _hunyuan15_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**VIDEO, **_hunyuan15_text(batch), "height": 64, "width": 48}


def _hunyuan15_image_to_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**VIDEO, **_hunyuan15_text(batch), "image": frames("image", 1, 80, 48)[0]}
    del call["height"], call["width"]
    return call


# --- LTX -------------------------------------------------------------------------------------------------------------


def _ltx_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("ltx", pipe, batch, image=picture("image", 64, WIDTH, batch))


def _ltx_condition_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """The first frame is given and, a little less strictly, the last, which is more tokens than the video has."""
    first, last = frames("condition", 2, 64)
    conditions = [LTXVideoCondition(image=first), LTXVideoCondition(image=last, frame_index=8, strength=0.8)]
    return _as("ltx", pipe, batch, conditions=conditions)


def _ltx2_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _as("ltx2", pipe, batch, image=picture("image", 64, WIDTH, batch), image_crf=0)


def _ltx2_all_guidance_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Every form of guidance that there is: a call with a block left out, and one without the other stream."""
    scales = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 2.0, "audio_modality_scale": 2.0}
    return _as("ltx2", pipe, batch, **scales, spatio_temporal_guidance_blocks=[1])


# --- Latte, Allegro, EasyAnimate -------------------------------------------------------------------------------------


def _ddim() -> Any:
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False)


def _latte() -> Any:
    network = _network("LatteTransformer3DModel")
    return assemble("latte", diffusers.LattePipeline, transformer=network, vae=image_vae(), scheduler=_ddim)


def _latte_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    size = {"height": 24, "width": 16, "video_length": 3}
    call = {**text(batch), **VIDEO, **size, "guidance_scale": 4.0, "negative_prompt": None, "clean_caption": False}
    del call["num_frames"]
    return call


def _allegro() -> Any:
    return assemble(
        "allegro",
        diffusers.AllegroPipeline,
        transformer=_network("AllegroTransformer3DModel"),
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
        transformer=_network("EasyAnimateTransformer3DModel", **over),
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


def _kandinsky5(pipeline: type, **over: Any) -> Any:
    vae = _PLAIN["hunyuan_video"].build().vae
    return assemble(
        "kandinsky5",
        pipeline,
        transformer=_network("Kandinsky5Transformer3DModel", **over),
        vae=lambda: type(vae).from_config(vae.config),
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


def _kandinsky5_image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = _kandinsky5_call(pipe, batch)
    del call["num_frames"]
    return call


# --- Cosmos ----------------------------------------------------------------------------------------------------------


class Permissive(nn.Module):
    """Stands for the safety checker, which the pipelines refuse to be without; of latents it is not asked."""

    device, dtype = torch.device("cpu"), torch.float32  # the pipelines take theirs from the first part that has one


def _cosmos(pipeline: type, in_channels: int, vae: Callable[[], Any], scheduler: Callable[[], Any]) -> Any:
    network = _network("CosmosTransformer3DModel", in_channels=in_channels)
    return assemble("cosmos", pipeline, transformer=network, vae=vae, scheduler=scheduler, safety_checker=Permissive)


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


def _cosmos_video_to_world_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_cosmos_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH)}


# --- Sana, Helios, Motif ---------------------------------------------------------------------------------------------


def _sana_video(pipeline: type) -> Any:
    network = _network("SanaVideoTransformer3DModel")
    return assemble("sana_video", pipeline, transformer=network, vae=wan_vae, scheduler=flow_euler(shift=7.0))


def _sana_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", dtype=torch.int64)
    call = {**words, **VIDEO, "height": 64, "frames": FRAMES, "guidance_scale": 4.0, "negative_prompt": None}
    del call["num_frames"]
    return {**call, "use_resolution_binning": False}


def _sana_image_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sana_video_call(pipe, batch), "image": picture("image", 64, WIDTH, batch)}


def _helios() -> Any:
    return assemble(
        "helios",
        diffusers.HeliosPipeline,
        transformer=_network("HeliosTransformer3DModel"),
        vae=wan_vae,
        scheduler=lambda: diffusers.HeliosScheduler(stages=1),
    )


def _helios_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two chunks, each with a loop of its own."""
    size = {"height": 64, "width": 64, "num_frames": 10, "num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1]}
    return {**text(batch), **VIDEO, **size, "guidance_scale": 4.0}


def _motif_video() -> Any:
    return assemble(
        "motif_video",
        diffusers.MotifVideoPipeline,
        transformer=_network("MotifVideoTransformer3DModel"),
        vae=wan_vae,
        scheduler=flow_euler(),
        guider=lambda: ClassifierFreeGuidance(guidance_scale=4.0),
    )


def _motif_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **VIDEO}


def _guided() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0)


def _guided_at_first() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5)


PIPELINES = (
    one_batch(
        "cogvideox_image_to_video",
        lambda: _like("cogvideox", diffusers.CogVideoXImageToVideoPipeline, transformer={"in_channels": 8}),
        _cogvideox_image_to_video_call,
        modality="video",
    ),
    one_batch(
        "cogvideox_video_to_video",
        lambda: _like("cogvideox_dpm", diffusers.CogVideoXVideoToVideoPipeline),
        _cogvideox_video_to_video_call,
        modality="video",
        steps=4,
    ),
    one_batch(
        "cogvideox_fun_control",
        lambda: _like("cogvideox", diffusers.CogVideoXFunControlPipeline, transformer={"in_channels": 8}),
        _cogvideox_control_call,
        modality="video",
    ),
    plain(
        "hunyuan_video_beside_an_image",
        lambda: _hunyuan_image_to_video("latent_concat"),
        _hunyuan_image_to_video_call,
        modality="video",
    ),
    two_calls(
        "hunyuan_video_after_an_image",
        lambda: _hunyuan_image_to_video("token_replace"),
        _hunyuan_image_to_video_true_cfg_call,
        modality="video",
    ),
    plain("framepack", _framepack, _framepack_call, modality="video"),
    plain("framepack_sections", _framepack, _framepack_sections_call, modality="video", steps=2 * STEPS),
    plain("framepack_forward", _framepack, _framepack_forward_call, modality="video", steps=2 * STEPS),
    two_calls(
        "hunyuan_video15",
        lambda: _hunyuan15(diffusers.HunyuanVideo15Pipeline, _guided),
        _hunyuan15_call,
        modality="video",
    ),
    two_calls(
        "hunyuan_video15_guided_at_first",
        lambda: _hunyuan15(diffusers.HunyuanVideo15Pipeline, _guided_at_first),
        _hunyuan15_call,
        modality="video",
        guidance="separate, in the first half",
    ),
    two_calls(
        "hunyuan_video15_image_to_video",
        lambda: _hunyuan15(
            diffusers.HunyuanVideo15ImageToVideoPipeline,
            _guided,
            image_encoder=image_encoder,
            feature_extractor=ImageProcessor,
        ),
        _hunyuan15_image_to_video_call,
        modality="video",
    ),
    one_batch(
        "ltx_image_to_video",
        lambda: _like("ltx", diffusers.LTXImageToVideoPipeline),
        _ltx_image_to_video_call,
        modality="video",
    ),
    one_batch(
        "ltx_condition",
        lambda: _like("ltx", diffusers.LTXConditionPipeline, scheduler={"use_dynamic_shifting": False}),
        _ltx_condition_call,
        modality="video",
    ),
    one_batch(
        "ltx2_image_to_video",
        lambda: _like("ltx2", diffusers.LTX2ImageToVideoPipeline),
        _ltx2_image_to_video_call,
        modality="video",
    ),
    one_batch(
        "ltx2_all_guidance",
        _PLAIN["ltx2"].build,
        _ltx2_all_guidance_call,
        modality="video",
        guidance="batched, two more branches in calls of their own",
    ),
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
    two_calls(
        "cosmos",
        lambda: _cosmos(diffusers.CosmosTextToWorldPipeline, 4, _cosmos_vae, _edm_euler),
        _cosmos_call,
        modality="video",
    ),
    two_calls("cosmos2_image", lambda: _cosmos2(diffusers.Cosmos2TextToImagePipeline, 4), _cosmos_image_call),
    two_calls(
        "cosmos2_video_to_world",
        lambda: _cosmos2(diffusers.Cosmos2VideoToWorldPipeline, 5),
        _cosmos_video_to_world_call,
        modality="video",
    ),
    one_batch("sana_video", lambda: _sana_video(diffusers.SanaVideoPipeline), _sana_video_call, modality="video"),
    one_batch(
        "sana_image_to_video",
        lambda: _sana_video(diffusers.SanaImageToVideoPipeline),
        _sana_image_to_video_call,
        modality="video",
    ),
    two_calls("helios", _helios, _helios_call, modality="video", steps=2 * STEPS),
    two_calls("motif_video", _motif_video, _motif_video_call, modality="video"),
)
