"""U-Nets."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.parts import BETAS, HEIGHT, IMAGE, POOLED, STEPS, TEXT, WIDTH, assemble, image_vae, picture, text
from pipelines.tiny import TWICE, unet, with_scheduler

_SD15_BETAS: dict[str, Any] = {**BETAS, "beta_schedule": "scaled_linear"}
_SD15_SIZE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def _sd15(scheduler: str, *, controlnet: bool = False) -> Any:
    parts: dict[str, Any] = {
        "unet": lambda: diffusers.UNet2DConditionModel(
            sample_size=16, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_SD15_SIZE
        ),
        "vae": image_vae(shift_factor=None, force_upcast=False),
        "scheduler": lambda: diffusers.PNDMScheduler(
            skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **_SD15_BETAS
        ),
        "requires_safety_checker": False,
    }
    if controlnet:
        # The picture reaches the network at an eighth of its size and the U-Net at a half: two strides fewer.
        parts["controlnet"] = lambda: diffusers.ControlNetModel(
            conditioning_embedding_out_channels=(4, 8), **_SD15_SIZE
        )
    pipeline = diffusers.StableDiffusionControlNetPipeline if controlnet else diffusers.StableDiffusionPipeline
    pipe = assemble("sd15", pipeline, **parts)
    return pipe if scheduler == "pndm" else with_scheduler(pipe, scheduler)


def _sd15_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "guidance_scale": 4.0}


def _sd15_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd15_call(pipe, batch), "image": picture("control", HEIGHT, WIDTH, batch)}


def _sdxl(pipeline: type) -> Any:
    return assemble(
        "sdxl",
        pipeline,
        unet=lambda: diffusers.UNet2DConditionModel(
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
        vae=image_vae(shift_factor=None, force_upcast=False),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **_SD15_BETAS),
    )


def _sdxl_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, pooled=True), **IMAGE, "guidance_scale": 4.0}


def _sdxl_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**_sdxl_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}
    del call["height"], call["width"]
    return call


def _pixels(pipeline: type) -> Any:
    return assemble(
        "pixels",
        pipeline,
        unet=lambda: diffusers.UNet2DModel(
            sample_size=(16, 12),
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=lambda: diffusers.DDPMScheduler(**BETAS),  # DDIMPipeline makes its own of it
    )


def _pixels_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {"batch_size": batch, "num_inference_steps": STEPS, "output_type": "pt"}


PIPELINES = (
    unet("sdxl", lambda: _sdxl(diffusers.StableDiffusionXLPipeline), _sdxl_call),
    unet("sdxl_img2img", lambda: _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), _sdxl_img2img_call, steps=3),
    unet("sd15", lambda: _sd15("pndm"), _sd15_call, steps=STEPS + 1),  # PNDM visits its second timestep twice
    unet("sd15_ddim", lambda: _sd15("ddim"), _sd15_call),
    unet("sd15_heun", lambda: _sd15("heun"), _sd15_call, steps=TWICE),
    unet("sd15_controlnet", lambda: _sd15("ddim", controlnet=True), _sd15_controlnet_call),
    unet("ddpm", lambda: _pixels(diffusers.DDPMPipeline), _pixels_call, guidance="none"),
    unet("ddim", lambda: _pixels(diffusers.DDIMPipeline), _pixels_call, guidance="none"),
)
