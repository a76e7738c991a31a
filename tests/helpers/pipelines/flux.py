"""Flux and its relatives."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.parts import (
    CONTROL,
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    INPAINT,
    POOLED,
    TEXT,
    WIDTH,
    Parts,
    called,
    flow_euler,
    image_vae,
    part,
    pictured,
    words,
)
from pipelines.tiny import plain, two_calls

_FLUX_SIZE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
FLUX = Parts(
    "flux",
    {
        "transformer": part("FluxTransformer2DModel", num_layers=2, num_single_layers=3, **_FLUX_SIZE),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0, use_dynamic_shifting=True),
    },
)
NOT_DISTILLED = {"guidance_embeds": False}
WITH_CONTROL = {"in_channels": 32, "out_channels": 16}  # of the transformer
flux_controlnet = part("FluxControlNetModel", num_layers=1, num_single_layers=1, **_FLUX_SIZE)

flux_call = called(words(pooled=True, negative=False), IMAGE, guidance_scale=3.5)
flux_true_cfg_call = called(words(pooled=True), IMAGE, guidance_scale=3.5, true_cfg_scale=3.0)
flux_img2img_call = called(flux_call, IMAGE_TO_IMAGE)
flux_inpaint_call = called(flux_call, INPAINT)
flux_control_call = called(flux_call, CONTROL)
KONTEXT = {"image": pictured("image"), "max_area": HEIGHT * WIDTH, "_auto_resize": False}

FLUX2 = Parts(
    "flux2",
    {
        "transformer": part(
            "Flux2Transformer2DModel",
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        "vae": part(
            "AutoencoderKLFlux2",
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        "scheduler": flow_euler(use_dynamic_shifting=True),
    },
)
flux2_call = called(words(negative=False), IMAGE)

CHROMA = Parts(
    "chroma",
    {
        "transformer": part(
            "ChromaTransformer2DModel",
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        "vae": image_vae(),
        "scheduler": flow_euler(),
    },
)
chroma_call = called(words(mask="prompt_attention_mask"), IMAGE, guidance_scale=4.0)

QWEN_SIZE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (8, 4, 4),
}
QWEN_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.2, 1.0],
}
QWEN_IMAGE = Parts(
    "qwen_image",
    {
        "transformer": part("QwenImageTransformer2DModel", num_layers=3, **QWEN_SIZE),
        "vae": part("AutoencoderKLQwenImage", dim_mult=[1, 1], temperal_downsample=[False], **QWEN_VAE),
        "scheduler": flow_euler(use_dynamic_shifting=True, shift_terminal=0.02),
    },
)
qwen_image_call = called(words(mask="prompt_embeds_mask", dtype=torch.int64), IMAGE, true_cfg_scale=4.0)

PIPELINES = (
    plain("flux", FLUX.within("FluxPipeline"), flux_call),
    two_calls("flux_true_cfg", FLUX.within("FluxPipeline", transformer=NOT_DISTILLED), flux_true_cfg_call),
    plain("flux_img2img", FLUX.within("FluxImg2ImgPipeline"), flux_img2img_call, steps=4),
    plain("flux_inpaint", FLUX.within("FluxInpaintPipeline"), flux_inpaint_call, steps=4),
    plain(
        "flux_control",
        FLUX.within("FluxControlPipeline", "flux_control", transformer=WITH_CONTROL),
        flux_control_call,
    ),
    plain("flux_kontext", FLUX.within("FluxKontextPipeline"), called(flux_call, KONTEXT)),
    plain("flux_controlnet", FLUX.within("FluxControlNetPipeline", controlnet=flux_controlnet), flux_control_call),
    plain("flux2", FLUX2.within("Flux2Pipeline"), flux2_call),
    two_calls("chroma", CHROMA.within("ChromaPipeline"), chroma_call),
    two_calls("qwen_image", QWEN_IMAGE.within("QwenImagePipeline"), qwen_image_call),
)
