"""More transformers for videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from pipelines import videos
from pipelines.more.wan import ImageProcessor, frames, image_encoder, like
from pipelines.parts import (
    POOLED,
    STEPS,
    VIDEO,
    assemble,
    flow_euler,
    network,
    normal,
    picture,
    text,
)
from pipelines.tiny import one_batch, plain, two_calls

HEIGHT, WIDTH, FRAMES = VIDEO["height"], VIDEO["width"], VIDEO["num_frames"]
_PLAIN = {tiny.name: tiny for tiny in videos.PIPELINES}


def _like(name: str, pipeline: type, **over: dict[str, Any]) -> Any:
    return like(name, _PLAIN[name].build(), pipeline, **over)


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
    return _as(
        "cogvideox", pipe, batch, "num_frames", control_video=[frames(f"control {i}", FRAMES) for i in range(batch)]
    )


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


def hunyuan_vae() -> Any:
    vae = _PLAIN["hunyuan_video"].build().vae
    return type(vae).from_config(vae.config)


def _framepack() -> Any:
    return assemble(
        "framepack",
        diffusers.HunyuanVideoFramepackPipeline,
        transformer=network("HunyuanVideoFramepackTransformer3DModel"),
        vae=hunyuan_vae,
        image_encoder=image_encoder,
        feature_extractor=ImageProcessor,
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _framepack_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """One section; its latents would come back as a list."""
    size = {"height": 64, "width": 48, "num_frames": 9, "latent_window_size": 3, "output_type": "pt"}
    return _as("hunyuan_video", pipe, batch, image=picture("image", 64, 48, batch), **size)


def _framepack_sections_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two sections, each with a separate loop."""
    return {**_framepack_call(pipe, batch), "num_frames": 18}


def _framepack_forward_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_framepack_sections_call(pipe, batch), "sampling_type": "vanilla"}


def _hunyuan15(pipeline: type, guider: Callable[[], Any], **extra: Any) -> Any:
    pipe = assemble(
        "hunyuan_video15",
        pipeline,
        transformer=network("HunyuanVideo15Transformer3DModel", target_size=64),
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


def _ltx2_condition_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition  # not in older ones

    first, last = (picture(tag, 64, WIDTH) for tag in ("first", "last"))
    conditions = [LTX2VideoCondition(first, crf=0), LTX2VideoCondition(last, index=1, strength=0.8, crf=0)]
    return _as("ltx2", pipe, batch, conditions=conditions)


def _ltx2_all_guidance_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Every form of guidance that there is: a call with a block left out, and one without the other stream."""
    scales = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 2.0, "audio_modality_scale": 2.0}
    return _as("ltx2", pipe, batch, **scales, spatio_temporal_guidance_blocks=[1])


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
    two_calls(
        "hunyuan_sky_reels",
        lambda: _like(
            "hunyuan_video", diffusers.HunyuanSkyreelsImageToVideoPipeline, transformer={"in_channels": 4 + 4}
        ),
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
        "hunyuan_video15_projected",
        lambda: _hunyuan15(
            diffusers.HunyuanVideo15Pipeline, lambda: AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.0)
        ),
        _hunyuan15_call,
        modality="video",
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
        "ltx2_condition", lambda: _like("ltx2", diffusers.LTX2ConditionPipeline), _ltx2_condition_call, modality="video"
    ),
    one_batch(
        "ltx2_all_guidance",
        _PLAIN["ltx2"].build,
        _ltx2_all_guidance_call,
        modality="video",
        guidance="batched, two more branches in separate calls",
    ),
)
