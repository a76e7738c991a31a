"""More U-Nets for pictures, and what is put into them: Stable Diffusion 1.5 and XL."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch

from pipelines.parts import (
    BETAS,
    CONTROL,
    HEIGHT,
    IMAGE_TO_IMAGE,
    INPAINT,
    POOLED,
    STEPS,
    TEXT,
    UNSIZED,
    WIDTH,
    Parts,
    called,
    image_vae,
    normal,
    part,
    picture,
    pictured,
    seeded,
    upper_half,
)
from pipelines.tiny import Tiny, unet
from pipelines.unets import sd15_call, sdxl_call

SD_BETAS: dict[str, Any] = {**BETAS, "beta_schedule": "scaled_linear"}
SD15_SIZE: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL_SIZE: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "cross_attention_dim": TEXT,
    "norm_num_groups": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,  # six numbers of size and crop
}
NINE = {"in_channels": 9}  # of noise, of the picture, of the mask
EVERYWHERE = ["down", "mid", "up"]  # attention is perturbed; left alone, in the middle only

ddim = part("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD_BETAS)
euler = part("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1, **SD_BETAS)
vae = image_vae(shift_factor=None, force_upcast=False)
stable_unet = part(
    "UNet2DConditionModel",
    sample_size=16,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    **SD15_SIZE,
)
SD15 = Parts("sd15 more", {"unet": stable_unet, "vae": vae, "scheduler": ddim, "requires_safety_checker": False})
SD15_UNCHECKED = Parts("sd15 more", {"unet": stable_unet, "vae": vae, "scheduler": ddim})  # no such argument
SDXL = Parts(
    "sdxl more",
    {
        "unet": part(
            "UNet2DConditionModel",
            sample_size=16,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            **SDXL_SIZE,
        ),
        "vae": vae,
        "scheduler": euler,
    },
)


def tiny(
    name: str, base: Parts, pipeline: str, call: Any, *, guidance: str = "batched", steps: int = STEPS, **over: Any
) -> Tiny:
    """``over``: what differs, and ``then``, as ``Parts.within`` takes them."""
    return unet(name, base.within(pipeline, **over), call, guidance=guidance, steps=steps)


perturbed = functools.partial(tiny, guidance="batched, and a perturbed branch")


def with_ip_adapters(pipe: Any, count: int = 1) -> Any:
    """As ``load_ip_adapter`` does it, of random weights: four tokens from each picture."""
    layers = [pipe.unet.get_submodule(name.removesuffix(".processor")) for name in pipe.unet.attn_processors]
    shapes = [layer.to_k.weight.shape for layer in layers if layer.is_cross_attention]

    def weights(generator: torch.Generator) -> dict[str, dict[str, torch.Tensor]]:
        projection = {"proj.weight": (4 * TEXT, POOLED), "proj.bias": (4 * TEXT,), "norm.bias": (TEXT,)}
        drawn = {name: torch.randn(shape, generator=generator) / 4 for name, shape in projection.items()}
        keys = {
            f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(shape, generator=generator) / 4
            for i, shape in enumerate(shapes)
            for part in "kv"
        }
        return {"image_proj": {**drawn, "norm.weight": torch.ones(TEXT)}, "ip_adapter": keys}

    states = [weights(seeded(f"ip adapter {i}")) for i in range(count)]
    pipe.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    pipe.unet.requires_grad_(False)
    return pipe


def image_embeds(count: int = 1) -> Any:
    """One tensor for each adapter: of no picture, then of the picture."""
    return lambda batch: [
        torch.cat([normal(f"{tag} {i}", 1, POOLED, batch=batch) for tag in ("no image", "image")]) for i in range(count)
    ]


def with_lora(pipe: Any, *, fused: bool = False) -> Any:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets), "tiny")
    if fused:
        pipe.fuse_lora(components=["unet"])
    pipe.unet.eval().requires_grad_(False)
    return pipe


def with_two_ip_adapters(pipe: Any) -> Any:
    return with_ip_adapters(pipe, 2)


def with_fused_lora(pipe: Any) -> Any:
    return with_lora(pipe, fused=True)


def with_freeu(pipe: Any) -> Any:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    return pipe


# The picture reaches the network at an eighth of its size and the U-Net at a half: two strides fewer.
sd15_control = part("ControlNetModel", conditioning_embedding_out_channels=(4, 8), **SD15_SIZE)
sdxl_control = part("ControlNetModel", conditioning_embedding_out_channels=(4, 8), **SDXL_SIZE)


def two_sdxl_controls() -> Any:
    return diffusers.MultiControlNetModel([sdxl_control(), sdxl_control()])


union = part(
    "ControlNetUnionModel",
    conditioning_embedding_out_channels=(4, 8),
    num_trans_channel=8,
    num_trans_head=2,
    num_proj_channel=8,
    **SDXL_SIZE,
)
adapter = part("T2IAdapter", channels=[8, 16, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
adapter_xl = adapter.but(channels=[8, 16, 16, 16], downscale_factor=4, adapter_type="full_adapter_xl")


def two_adapters() -> Any:
    return diffusers.MultiAdapter([adapter(), adapter()])


# The four channels of noise, the four of the small picture; one more comes out, the variance.
upscaler = part(
    "UNet2DConditionModel",
    in_channels=8,
    out_channels=5,
    conv_in_kernel=1,
    conv_out_kernel=1,
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    mid_block_type=None,
    up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    cross_attention_dim=TEXT,
    attention_head_dim=16,
    norm_num_groups=None,
    act_fn="gelu",
    resnet_time_scale_shift="scale_shift",
    time_embedding_type="fourier",
    timestep_post_act="gelu",
    time_cond_proj_dim=128 + POOLED,
    cross_attention_norm="group_norm",
)

SHOWN = {"image": pictured("image")}
_two_pictures = {"image": lambda batch: [picture(tag, HEIGHT, WIDTH, batch) for tag in ("image", "control")]}
sdxl_ip_call = called(sdxl_call, ip_adapter_image_embeds=image_embeds())
sd15_image_call = called(sd15_call, UNSIZED, SHOWN)
sd15_img2img_call = called(sd15_image_call, strength=0.6)
_inpaint = {**INPAINT, "mask_image": upper_half}
sd15_inpaint_call = called(sd15_call, _inpaint, strength=1.0)
sdxl_inpaint_call = called(sdxl_call, _inpaint)
sdxl_control_call = called(sdxl_call, SHOWN)
sd15_control_img2img_call = called(sd15_call, IMAGE_TO_IMAGE, CONTROL)


SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
PIPELINES = (
    tiny("sdxl_ip_adapter", SDXL, XL, sdxl_ip_call, then=with_ip_adapters),
    tiny(
        "sdxl_two_ip_adapters",
        SDXL,
        XL,
        called(sdxl_call, ip_adapter_image_embeds=image_embeds(2)),
        then=with_two_ip_adapters,
    ),
    tiny("sd15_ip_adapter", SD15, SD, called(sd15_call, ip_adapter_image_embeds=image_embeds()), then=with_ip_adapters),
    tiny("sdxl_lora", SDXL, XL, sdxl_call, then=with_lora),
    tiny("sdxl_lora_scaled", SDXL, XL, called(sdxl_call, cross_attention_kwargs={"scale": 0.5}), then=with_lora),
    tiny("sdxl_lora_fused", SDXL, XL, sdxl_call, then=with_fused_lora),
    tiny("sd15_lora", SD15, SD, sd15_call, then=with_lora),
    tiny("sd15_lora_fused", SD15, SD, sd15_call, then=with_fused_lora),
    tiny("sdxl_freeu", SDXL, XL, sdxl_call, then=with_freeu),
    tiny("sdxl_ends_early", SDXL, XL, called(sdxl_call, denoising_end=0.7), steps=4),
    tiny(
        "sdxl_refiner",
        SDXL,
        "StableDiffusionXLImg2ImgPipeline",
        called(
            sdxl_call,
            UNSIZED,
            image=lambda batch: normal("image latents", 4, HEIGHT // 2, WIDTH // 2, batch=batch),
            denoising_start=0.4,
        ),
        steps=4,
        unet={"projection_class_embeddings_input_dim": 5 * 8 + POOLED},  # a score stands for two of the sizes
        requires_aesthetics_score=True,
    ),
    tiny("sdxl_controlnet", SDXL, "StableDiffusionXLControlNetPipeline", sdxl_control_call, controlnet=sdxl_control),
    tiny(
        "sdxl_controlnet_half_way",
        SDXL,
        "StableDiffusionXLControlNetPipeline",
        called(sdxl_control_call, control_guidance_end=0.5, guess_mode=True),
        controlnet=sdxl_control,
    ),
    tiny(
        "sdxl_two_controlnets",
        SDXL,
        "StableDiffusionXLControlNetPipeline",
        called(sdxl_call, _two_pictures),
        controlnet=two_sdxl_controls,
    ),
    tiny(
        "sdxl_union",
        SDXL,
        "StableDiffusionXLControlNetUnionPipeline",
        called(sdxl_call, control_image=_two_pictures["image"], control_mode=[1, 3]),
        controlnet=union,
    ),
    tiny("sdxl_t2i_adapter", SDXL, "StableDiffusionXLAdapterPipeline", sdxl_control_call, adapter=adapter_xl),
    tiny(
        "sdxl_t2i_half_way",
        SDXL,
        "StableDiffusionXLAdapterPipeline",
        called(sdxl_control_call, adapter_conditioning_factor=0.5),
        adapter=adapter_xl,
    ),
    tiny("sd15_t2i_adapter", SD15, "StableDiffusionAdapterPipeline", called(sd15_call, SHOWN), adapter=adapter),
    tiny(
        "sd15_two_t2i_adapters",
        SD15,
        "StableDiffusionAdapterPipeline",
        called(sd15_call, _two_pictures, adapter_conditioning_scale=[0.7, 0.5]),
        adapter=two_adapters,
    ),
    perturbed("sdxl_pag", SDXL, "StableDiffusionXLPAGPipeline", sdxl_call, pag_applied_layers=EVERYWHERE),
    tiny(
        "sdxl_pag_unguided",
        SDXL,
        "StableDiffusionXLPAGPipeline",
        called(sdxl_call, guidance_scale=0.0),
        guidance="perturbed, both branches in the batch",
        pag_applied_layers=EVERYWHERE,
    ),
    perturbed("sd15_pag", SD15, "StableDiffusionPAGPipeline", sd15_call, pag_applied_layers=EVERYWHERE),
    perturbed(
        "sdxl_controlnet_pag",
        SDXL,
        "StableDiffusionXLControlNetPAGPipeline",
        sdxl_control_call,
        controlnet=sdxl_control,
    ),
    tiny("sdxl_inpaint", SDXL, "StableDiffusionXLInpaintPipeline", sdxl_inpaint_call, steps=3),
    tiny("sdxl_inpaint_nine", SDXL, "StableDiffusionXLInpaintPipeline", sdxl_inpaint_call, steps=3, unet=NINE),
    tiny("sd15_inpaint_nine", SD15, "StableDiffusionInpaintPipeline", sd15_inpaint_call, unet=NINE),
    tiny("sd15_img2img", SD15, "StableDiffusionImg2ImgPipeline", sd15_img2img_call, steps=3),
    tiny(
        "sd15_instruct_pix2pix",
        SD15,
        "StableDiffusionInstructPix2PixPipeline",
        sd15_image_call,
        guidance="batched, three branches",
        unet={"in_channels": 8},
    ),
    tiny(
        "sdxl_instruct_pix2pix",
        SDXL,
        "StableDiffusionXLInstructPix2PixPipeline",
        sdxl_control_call,
        guidance="batched, three branches",
        unet={"in_channels": 8},
    ),
    tiny(
        "sd15_controlnet_img2img",
        SD15,
        "StableDiffusionControlNetImg2ImgPipeline",
        sd15_control_img2img_call,
        steps=3,
        controlnet=sd15_control,
    ),
    tiny(
        "sd15_controlnet_inpaint",
        SD15,
        "StableDiffusionControlNetInpaintPipeline",
        called(sd15_control_img2img_call, mask_image=upper_half),
        steps=3,
        controlnet=sd15_control,
    ),
    tiny(
        "sd15_upscale",
        SD15_UNCHECKED,
        "StableDiffusionUpscalePipeline",
        called(sd15_call, UNSIZED, image=pictured("image", HEIGHT // 2, WIDTH // 2)),
        unet={"in_channels": 7, "num_class_embeds": 1000},
        low_res_scheduler=part("DDPMScheduler", **SD_BETAS),
    ),
    tiny(
        "sd15_latent_upscale",
        SD15_UNCHECKED,
        "StableDiffusionLatentUpscalePipeline",
        called(
            sdxl_call, UNSIZED, image=lambda batch: normal("image latents", 4, HEIGHT // 4, WIDTH // 4, batch=batch)
        ),
        unet=upscaler,
        scheduler=euler,
    ),
    tiny(
        "sd15_depth2img",
        SD15_UNCHECKED,
        "StableDiffusionDepth2ImgPipeline",
        called(sd15_img2img_call, depth_map=lambda batch: picture("depth", HEIGHT // 2, WIDTH // 2, batch)[:, 0]),
        steps=3,
        unet={"in_channels": 5},
    ),
)
