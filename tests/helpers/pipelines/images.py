"""Other transformers for pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from pipelines.parts import (
    BETAS,
    HEIGHT,
    IMAGE,
    POOLED,
    STEPS,
    TEXT,
    WIDTH,
    assemble,
    flow_euler,
    image_vae,
    picture,
    prompt,
    text,
)
from pipelines.tiny import TWICE, one_batch, two_calls, with_scheduler

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


def _sd3(scheduler: str, *, controlnet: bool = False) -> Any:
    parts: dict[str, Any] = {
        "transformer": lambda: diffusers.SD3Transformer2DModel(
            num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm", **_SD3_SIZE
        ),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0),
    }
    if controlnet:
        parts["controlnet"] = lambda: diffusers.SD3ControlNetModel(num_layers=1, **_SD3_SIZE)
    pipeline = diffusers.StableDiffusion3ControlNetPipeline if controlnet else diffusers.StableDiffusion3Pipeline
    pipe = assemble("sd3", pipeline, **parts)
    return pipe if scheduler == "euler" else with_scheduler(pipe, scheduler)


def _sd3_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, pooled=True), **IMAGE, "guidance_scale": 4.0}


def _sd3_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def _pixart_sigma() -> Any:
    return assemble(
        "pixart_sigma",
        diffusers.PixArtSigmaPipeline,
        transformer=lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=16,
        ),
        vae=image_vae(),
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
    )


def _pixart_sigma_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **text(batch, mask="prompt_attention_mask", dtype=torch.int64),
        **IMAGE,
        "negative_prompt": None,  # its default is the empty string, which may not meet embeddings
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }


def _dit() -> Any:
    return assemble(
        "dit",
        diffusers.DiTPipeline,
        transformer=lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8
        ),
        vae=image_vae(),
        scheduler=lambda: diffusers.DDIMScheduler(clip_sample=False, **BETAS),
    )


def _dit_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    labels = [7 + 100 * i for i in range(batch)]
    return {"class_labels": labels, "guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt"}


def _z_image() -> Any:
    return assemble(
        "z_image",
        diffusers.ZImagePipeline,
        transformer=lambda: diffusers.ZImageTransformer2DModel(
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
        vae=image_vae(),
        scheduler=flow_euler(shift=3.0, use_dynamic_shifting=True),
    )


def _z_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": list(prompt("prompt", batch)),
        "negative_prompt_embeds": list(prompt("negative", batch)[:, 3:]),  # shorter: samples have different lengths
        **IMAGE,
        "guidance_scale": 3.0,
    }


def _sana() -> Any:
    return assemble(
        "sana",
        diffusers.SanaPipeline,
        transformer=lambda: diffusers.SanaTransformer2DModel(
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
        vae=lambda: diffusers.AutoencoderDC(
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
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _sana_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **text(batch, mask="prompt_attention_mask", dtype=torch.int64),
        **IMAGE,
        "negative_prompt": None,  # its default is the empty string, which may not meet embeddings
        "guidance_scale": 4.0,
        "height": 64,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }


def _lumina2() -> Any:
    return assemble(
        "lumina2",
        diffusers.Lumina2Pipeline,
        transformer=lambda: diffusers.Lumina2Transformer2DModel(
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
        vae=image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        scheduler=flow_euler(shift=6.0),
    )


def _lumina2_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    sizes = {"height": 96, "width": 64}
    return {**text(batch, mask="prompt_attention_mask"), **IMAGE, **sizes, "guidance_scale": 4.0}


def _auraflow() -> Any:
    return assemble(
        "auraflow",
        diffusers.AuraFlowPipeline,
        gain=2.0,  # text passes two gates in a row here
        transformer=lambda: diffusers.AuraFlowTransformer2DModel(
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
        vae=image_vae(),
        scheduler=flow_euler(shift=1.73),
    )


def _auraflow_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **IMAGE, "guidance_scale": 3.5}


PIPELINES = (
    one_batch("sd3", lambda: _sd3("euler"), _sd3_call),
    one_batch("sd3_heun", lambda: _sd3("heun"), _sd3_call, steps=TWICE),
    one_batch("sd3_controlnet", lambda: _sd3("euler", controlnet=True), _sd3_controlnet_call),
    one_batch("pixart_sigma", _pixart_sigma, _pixart_sigma_call),
    one_batch("dit", _dit, _dit_call),
    one_batch("z_image", _z_image, _z_image_call),
    one_batch("sana", _sana, _sana_call),
    two_calls("lumina2", _lumina2, _lumina2_call),
    one_batch("auraflow", _auraflow, _auraflow_call),
)
