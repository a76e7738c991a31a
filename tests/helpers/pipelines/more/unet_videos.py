"""U-Nets for videos."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pipelines.more.other_unets import SD, tiny
from pipelines.more.stand_ins import Words, reader, view, viewer
from pipelines.more.unets import euler, sd15_control, vae
from pipelines.parts import (
    HEIGHT,
    LEFT_OUT,
    POOLED,
    STEPS,
    TEXT,
    WIDTH,
    called,
    network,
    part,
    picture,
    pictured,
    words,
)

FRAMES = 3
CLIP: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
XL: dict[str, Any] = {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}


motion = part(
    "UNetMotionModel",
    sample_size=16,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=TEXT,
    down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
    num_attention_heads=2,
    motion_num_attention_heads=2,
    motion_max_seq_length=8,
)


def with_free_init(pipe: Any) -> Any:
    pipe.enable_free_init(num_iters=2)
    return pipe


def with_free_noise(pipe: Any) -> Any:
    pipe.enable_free_noise(context_length=4, context_stride=2)
    return pipe


def film(batch: int) -> torch.Tensor:
    return torch.stack([picture(f"film {i}", HEIGHT, WIDTH, FRAMES) for i in range(batch)])


clip_call = called(words(), CLIP, num_frames=FRAMES, guidance_scale=4.0)
picture_to_clip_call = called(clip_call, image=pictured("image"))
# One clip only, of words that can change from frame to frame.
clip_of_words_call = called(CLIP, prompt="one thing", negative_prompt="another", num_frames=6, guidance_scale=4.0)

video = functools.partial(tiny, modality="video")
PIPELINES = (
    video("animatediff", "AnimateDiffPipeline", clip_call, unet=motion, **SD),
    video(
        "animatediff_free_init",
        "AnimateDiffPipeline",
        clip_call,
        steps=2 * STEPS,
        then=with_free_init,
        unet=motion,
        **SD,
    ),
    video(
        "animatediff_free_noise",
        "AnimateDiffPipeline",
        clip_of_words_call,
        then=with_free_noise,
        unet=motion,
        motion_adapter=part(
            "MotionAdapter",
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
    video(
        "animatediff_sdxl",
        "AnimateDiffSDXLPipeline",
        called(clip_call, words(pooled=True)),
        unet=motion.but(**XL),
        vae=vae,
        scheduler=euler,
    ),
    video(
        "animatediff_controlnet",
        "AnimateDiffControlNetPipeline",
        # The pipeline takes the frames of one clip only.
        called(clip_call, conditioning_frames=lambda _batch: list(film(1)[0])),
        unet=motion,
        controlnet=sd15_control.but(layers_per_block=1),
        **SD,
    ),
    video(
        "animatediff_video2video",
        "AnimateDiffVideoToVideoPipeline",
        called(clip_call, video=film, strength=0.6, num_frames=LEFT_OUT),
        steps=3,
        unet=motion,
        **SD,
    ),
    video(
        "animatediff_pag",
        "AnimateDiffPAGPipeline",
        clip_call,
        guidance="batched, and a perturbed branch",
        unet=motion,
        **SD,
    ),
    video("pia", "PIAPipeline", picture_to_clip_call, unet=motion.but(in_channels=9), **SD),
    video(
        "stable_video",
        "StableVideoDiffusionPipeline",
        called(CLIP, image=pictured("image", HEIGHT, HEIGHT), num_frames=FRAMES),
        unet=network("UNetSpatioTemporalConditionModel"),
        vae=part(
            "AutoencoderKLTemporalDecoder",
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
        ),
        image_encoder=viewer,
        feature_extractor=view,
        scheduler=part(
            "EulerDiscreteScheduler",
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
