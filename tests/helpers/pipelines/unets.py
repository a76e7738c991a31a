"""U-Nets."""

from __future__ import annotations

from typing import Any

from pipelines.parts import (
    BETAS,
    IMAGE,
    IMAGE_TO_IMAGE,
    POOLED,
    STEPS,
    TEXT,
    UNSIZED,
    Parts,
    called,
    image_vae,
    part,
    pictured,
    words,
)
from pipelines.tiny import TWICE, stepped_by, unet

_SD15_BETAS: dict[str, Any] = {**BETAS, "beta_schedule": "scaled_linear"}
_SD15_SIZE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SD15 = Parts(
    "sd15",
    {
        "unet": part(
            "UNet2DConditionModel", sample_size=16, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_SD15_SIZE
        ),
        "vae": image_vae(shift_factor=None, force_upcast=False),
        "scheduler": part("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **_SD15_BETAS),
        "requires_safety_checker": False,
    },
)
# The picture reaches the network at an eighth of its size and the U-Net at a half: two strides fewer.
_sd15_controlnet = part("ControlNetModel", conditioning_embedding_out_channels=(4, 8), **_SD15_SIZE)
sd15_call = called(words(), IMAGE, guidance_scale=4.0)

SDXL = Parts(
    "sdxl",
    {
        "unet": part(
            "UNet2DConditionModel",
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=TEXT,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,  # six numbers of size and crop
        ),
        "vae": image_vae(shift_factor=None, force_upcast=False),
        "scheduler": part("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1, **_SD15_BETAS),
    },
)
sdxl_call = called(words(pooled=True), IMAGE, guidance_scale=4.0)

PIXELS = Parts(
    "pixels",
    {
        "unet": part(
            "UNet2DModel",
            sample_size=(16, 12),
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        "scheduler": part("DDPMScheduler", **BETAS),  # DDIMPipeline makes its own of it
    },
)
_pixels_call = called(batch_size=lambda batch: batch, num_inference_steps=STEPS, output_type="pt")

_SD15 = "StableDiffusionPipeline"
PIPELINES = (
    unet("sdxl", SDXL.within("StableDiffusionXLPipeline"), sdxl_call),
    unet(
        "sdxl_img2img",
        SDXL.within("StableDiffusionXLImg2ImgPipeline"),
        called(sdxl_call, IMAGE_TO_IMAGE, UNSIZED),
        steps=3,
    ),
    unet("sd15", SD15.within(_SD15), sd15_call, steps=STEPS + 1),  # PNDM visits its second timestep twice
    unet("sd15_ddim", SD15.within(_SD15, then=stepped_by("ddim")), sd15_call),
    unet("sd15_heun", SD15.within(_SD15, then=stepped_by("heun")), sd15_call, steps=TWICE),
    unet(
        "sd15_controlnet",
        SD15.within("StableDiffusionControlNetPipeline", then=stepped_by("ddim"), controlnet=_sd15_controlnet),
        called(sd15_call, image=pictured("control")),
    ),
    unet("ddpm", PIXELS.within("DDPMPipeline"), _pixels_call, guidance="none"),
    unet("ddim", PIXELS.within("DDIMPipeline"), _pixels_call, guidance="none"),
)
