"""Other transformers for pictures."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.parts import (
    BETAS,
    CONTROL,
    IMAGE,
    POOLED,
    STEPS,
    TEXT,
    Parts,
    called,
    flow_euler,
    image_vae,
    part,
    prompt,
    words,
)
from pipelines.tiny import TWICE, one_batch, stepped_by, two_calls

_SD3_SIZE: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 16,
}
SD3 = Parts(
    "sd3",
    {
        "transformer": part(
            "SD3Transformer2DModel", num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm", **_SD3_SIZE
        ),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0),
    },
)
_sd3_controlnet = part("SD3ControlNetModel", num_layers=1, **_SD3_SIZE)
sd3_call = called(words(pooled=True), IMAGE, guidance_scale=4.0)
PIXART_SIGMA = Parts(
    "pixart_sigma",
    {
        "transformer": part(
            "PixArtTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=16,
        ),
        "vae": image_vae(),
        "scheduler": part("DPMSolverMultistepScheduler", **BETAS),
    },
)

pixart_sigma_call = called(
    words(mask="prompt_attention_mask", dtype=torch.int64),
    IMAGE,
    negative_prompt=None,  # its default is the empty string, which may not meet embeddings
    guidance_scale=3.0,
    use_resolution_binning=False,
)
DIT = Parts(
    "dit",
    {
        "transformer": part(
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
        ),
        "vae": image_vae(),
        "scheduler": part("DDIMScheduler", clip_sample=False, **BETAS),
    },
)

Z_IMAGE = Parts(
    "z_image",
    {
        "transformer": part(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[8, 4, 4],
            axes_lens=[128, 32, 32],
        ),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0, use_dynamic_shifting=True),
    },
)

z_image_call = called(
    IMAGE,
    prompt_embeds=lambda batch: list(prompt("prompt", batch)),
    negative_prompt_embeds=lambda batch: list(
        prompt("negative", batch)[:, 3:]
    ),  # shorter: samples have different lengths
    guidance_scale=3.0,
)
SANA = Parts(
    "sana",
    {
        "transformer": part(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=8,
        ),
        "vae": part(
            "AutoencoderDC",
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        ),
        "scheduler": part(
            "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    },
)

sana_call = called(
    words(mask="prompt_attention_mask", dtype=torch.int64),
    IMAGE,
    negative_prompt=None,  # its default is the empty string, which may not meet embeddings
    guidance_scale=4.0,
    height=64,
    width=32,
    use_resolution_binning=False,
    complex_human_instruction=None,
)
LUMINA2 = Parts(
    "lumina2",
    {
        "transformer": part(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(64, 32, 32),
            cap_feat_dim=TEXT,
        ),
        "vae": image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        "scheduler": flow_euler(shift=6.0),
    },
)

AURAFLOW = Parts(
    "auraflow",
    {
        "transformer": part(
            "AuraFlowTransformer2DModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=TEXT,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=1.73),
    },
    gain=2.0,  # text passes two gates in a row here
)

auraflow_call = called(words(mask="prompt_attention_mask"), IMAGE, guidance_scale=3.5)

_dit_call = called(
    class_labels=lambda batch: [7 + 100 * i for i in range(batch)],
    guidance_scale=4.0,
    num_inference_steps=STEPS,
    output_type="pt",
)
lumina2_call = called(words(mask="prompt_attention_mask"), IMAGE, height=96, width=64, guidance_scale=4.0)

PIPELINES = (
    one_batch("sd3", SD3.within("StableDiffusion3Pipeline"), sd3_call),
    one_batch("sd3_heun", SD3.within("StableDiffusion3Pipeline", then=stepped_by("heun")), sd3_call, steps=TWICE),
    one_batch(
        "sd3_controlnet",
        SD3.within("StableDiffusion3ControlNetPipeline", controlnet=_sd3_controlnet),
        called(sd3_call, CONTROL),
    ),
    one_batch("pixart_sigma", PIXART_SIGMA.within("PixArtSigmaPipeline"), pixart_sigma_call),
    one_batch("dit", DIT.within("DiTPipeline"), _dit_call),
    one_batch("z_image", Z_IMAGE.within("ZImagePipeline"), z_image_call),
    one_batch("sana", SANA.within("SanaPipeline"), sana_call),
    two_calls("lumina2", LUMINA2.within("Lumina2Pipeline"), lumina2_call),
    one_batch("auraflow", AURAFLOW.within("AuraFlowPipeline"), auraflow_call),
)
