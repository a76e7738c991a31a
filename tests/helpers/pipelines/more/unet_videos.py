"""U-Nets for videos."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from pipelines.more.other_unets import SD, VAE, tiny
from pipelines.more.stand_ins import Words, reader, view, viewer
from pipelines.more.unets import euler, sd15_control
from pipelines.parts import HEIGHT, POOLED, STEPS, TEXT, WIDTH, network, picture, text

FRAMES = 3
CLIP: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
XL = {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}


def motion(**over: Any) -> Callable[[], Any]:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT,
        "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    }
    return lambda: diffusers.UNetMotionModel(**{**settings, **over})


def with_free_init(pipe: Any) -> Any:
    pipe.enable_free_init(num_iters=2)
    return pipe


def with_free_noise(pipe: Any) -> Any:
    pipe.enable_free_noise(context_length=4, context_stride=2)
    return pipe


def clip_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **CLIP, "num_frames": FRAMES, "guidance_scale": 4.0}


def clip_xl_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**clip_call(pipe, batch), **text(batch, pooled=True)}


def clip_of_words_call(_pipe: Any, _batch: int = 1) -> dict[str, Any]:
    """One clip only, of words that can change from frame to frame."""
    return {**CLIP, "prompt": "one thing", "negative_prompt": "another", "num_frames": 6, "guidance_scale": 4.0}


def film(batch: int) -> torch.Tensor:
    return torch.stack([picture(f"film {i}", HEIGHT, WIDTH, FRAMES) for i in range(batch)])


def controlled_clip_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """The pipeline takes the frames of one clip only."""
    return {**clip_call(pipe, batch), "conditioning_frames": list(film(1)[0])}


def clip_to_clip_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**clip_call(pipe, batch), "video": film(batch), "strength": 0.6}
    del call["num_frames"]
    return call


def picture_to_clip_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**clip_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch)}


def stable_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**CLIP, "image": picture("image", HEIGHT, HEIGHT, batch), "num_frames": FRAMES}


video = functools.partial(tiny, modality="video")
PIPELINES = (
    video("animatediff", "AnimateDiffPipeline", clip_call, unet=motion(), **SD),
    video(
        "animatediff_free_init",
        "AnimateDiffPipeline",
        clip_call,
        steps=2 * STEPS,
        then=with_free_init,
        unet=motion(),
        **SD,
    ),
    video(
        "animatediff_free_noise",
        "AnimateDiffPipeline",
        clip_of_words_call,
        then=with_free_noise,
        unet=motion(),
        motion_adapter=lambda: diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_layers_per_block=1,
            motion_max_seq_length=8,
        ),
        tokenizer=Words,
        text_encoder=reader(),
        **SD,
    ),
    video("animatediff_sdxl", "AnimateDiffSDXLPipeline", clip_xl_call, unet=motion(**XL), vae=VAE, scheduler=euler),
    video(
        "animatediff_controlnet",
        "AnimateDiffControlNetPipeline",
        controlled_clip_call,
        unet=motion(),
        controlnet=lambda: sd15_control(layers_per_block=1),
        **SD,
    ),
    video(
        "animatediff_video2video", "AnimateDiffVideoToVideoPipeline", clip_to_clip_call, steps=3, unet=motion(), **SD
    ),
    video(
        "animatediff_pag",
        "AnimateDiffPAGPipeline",
        clip_call,
        guidance="batched, and a perturbed branch",
        unet=motion(),
        **SD,
    ),
    video("pia", "PIAPipeline", picture_to_clip_call, unet=motion(in_channels=9), **SD),
    video(
        "stable_video",
        "StableVideoDiffusionPipeline",
        stable_video_call,
        unet=network("UNetSpatioTemporalConditionModel"),
        vae=lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        ),
        image_encoder=viewer,
        feature_extractor=view,
        scheduler=lambda: diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.02,
            sigma_max=20.0,
            interpolation_type="linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ),
    video(
        "i2vgen_xl",
        "I2VGenXLPipeline",
        picture_to_clip_call,
        unet=network("I2VGenXLUNet"),
        image_encoder=viewer,
        feature_extractor=view,
        **SD,
    ),
    video("text_to_video", "TextToVideoSDPipeline", clip_call, unet=network("UNet3DConditionModel"), **SD),
)
