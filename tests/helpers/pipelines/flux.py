"""Flux and its relatives."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from pipelines.parts import HEIGHT, IMAGE, POOLED, TEXT, WIDTH, assemble, flow_euler, image_vae, picture, text
from pipelines.tiny import plain, two_calls

_FLUX_SIZE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 4, 8),
}


def flux(name: str, pipeline: type, *, distilled: bool = True, controlnet: bool = False, **over: Any) -> Any:
    size = {**_FLUX_SIZE, "guidance_embeds": distilled, **over}
    parts: dict[str, Any] = {
        "transformer": lambda: diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=3, **size),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0, use_dynamic_shifting=True),
    }
    if controlnet:
        parts["controlnet"] = lambda: diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1, **size)
    return assemble(name, pipeline, **parts)


def _flux_control() -> Any:
    return flux("flux_control", diffusers.FluxControlPipeline, in_channels=32, out_channels=16)


def _flux_controlnet() -> Any:
    return flux("flux", diffusers.FluxControlNetPipeline, controlnet=True)


def flux_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, pooled=True, negative=False), **IMAGE, "guidance_scale": 3.5}


def flux_true_cfg_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, pooled=True), **IMAGE, "guidance_scale": 3.5, "true_cfg_scale": 3.0}


def flux_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def flux_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return {**flux_img2img_call(pipe, batch), "mask_image": mask}


def flux_control_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def flux_kontext_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    image = picture("image", HEIGHT, WIDTH, batch)
    return {**flux_call(pipe, batch), "image": image, "max_area": HEIGHT * WIDTH, "_auto_resize": False}


def flux2() -> Any:
    return assemble(
        "flux2",
        diffusers.Flux2Pipeline,
        transformer=lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def flux2_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, negative=False), **IMAGE}


def chroma() -> Any:
    return assemble(
        "chroma",
        diffusers.ChromaPipeline,
        transformer=lambda: diffusers.ChromaTransformer2DModel(
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
        vae=image_vae(),
        scheduler=flow_euler(),
    )


def chroma_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **IMAGE, "guidance_scale": 4.0}


def _qwen_image() -> Any:
    return assemble(
        "qwen_image",
        diffusers.QwenImagePipeline,
        transformer=lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
        ),
        scheduler=flow_euler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def qwen_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_embeds_mask", dtype=torch.int64), **IMAGE, "true_cfg_scale": 4.0}


PIPELINES = (
    plain("flux", lambda: flux("flux", diffusers.FluxPipeline), flux_call),
    two_calls("flux_true_cfg", lambda: flux("flux", diffusers.FluxPipeline, distilled=False), flux_true_cfg_call),
    plain("flux_img2img", lambda: flux("flux", diffusers.FluxImg2ImgPipeline), flux_img2img_call, steps=4),
    plain("flux_inpaint", lambda: flux("flux", diffusers.FluxInpaintPipeline), flux_inpaint_call, steps=4),
    plain("flux_control", _flux_control, flux_control_call),
    plain("flux_kontext", lambda: flux("flux", diffusers.FluxKontextPipeline), flux_kontext_call),
    plain("flux_controlnet", _flux_controlnet, flux_control_call),
    plain("flux2", flux2, flux2_call),
    two_calls("chroma", chroma, chroma_call),
    two_calls("qwen_image", _qwen_image, qwen_image_call),
)
