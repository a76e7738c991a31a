"""More U-Nets for pictures, and what is put into them: Stable Diffusion 1.5 and XL."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    image_vae,
    normal,
    picture,
    seeded,
    text,
)
from pipelines.tiny import Tiny, unet

SD_BETAS: dict[str, Any] = {**BETAS, "beta_schedule": "scaled_linear"}
SD15: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL: dict[str, Any] = {
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
CONTROLNET_XL = "StableDiffusionXLControlNetPipeline"


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD_BETAS)


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD_BETAS)


def sd15(pipeline: type, size: dict[str, Any] | None = None, **parts: Any) -> Any:
    """``size``: options of the U-Net."""
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    return assemble(
        "sd15 more",
        pipeline,
        **{
            "unet": lambda: diffusers.UNet2DConditionModel(
                **{**SD15, "sample_size": 16, "up_block_types": up, **(size or {})}
            ),
            "vae": image_vae(shift_factor=None, force_upcast=False),
            "scheduler": ddim,
            **parts,
        },
    )


def sd15_plain(pipeline: type, size: dict[str, Any] | None = None, **parts: Any) -> Any:
    return sd15(pipeline, size, requires_safety_checker=False, **parts)


def sdxl(pipeline: type, size: dict[str, Any] | None = None, **parts: Any) -> Any:
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return assemble(
        "sdxl more",
        pipeline,
        **{
            "unet": lambda: diffusers.UNet2DConditionModel(
                **{**SDXL, "sample_size": 16, "up_block_types": up, **(size or {})}
            ),
            "vae": image_vae(shift_factor=None, force_upcast=False),
            "scheduler": euler,
            **parts,
        },
    )


def tiny(
    name: str,
    base: Callable[..., Any],
    pipeline: str,
    call: Callable[..., dict[str, Any]],
    *,
    guidance: str = "batched",
    steps: int = STEPS,
    then: Callable[[Any], Any] = lambda pipe: pipe,
    **parts: Any,
) -> Tiny:
    """``base`` makes the pipeline of its class and parts, ``then`` changes it."""
    return unet(name, lambda: then(base(getattr(diffusers, pipeline), **parts)), call, guidance=guidance, steps=steps)


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


def image_embeds(batch: int, count: int = 1) -> list[torch.Tensor]:
    """One tensor for each adapter: of no picture, then of the picture."""
    return [
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


def sd15_control(**over: Any) -> Any:
    # The picture reaches the network at an eighth of its size and the U-Net at a half: two strides fewer.
    return diffusers.ControlNetModel(conditioning_embedding_out_channels=(4, 8), **{**SD15, **over})


def sdxl_control() -> Any:
    return sd15_control(**SDXL)


def two_sdxl_controls() -> Any:
    return diffusers.MultiControlNetModel([sdxl_control(), sdxl_control()])


def union() -> Any:
    return diffusers.ControlNetUnionModel(
        conditioning_embedding_out_channels=(4, 8),
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
        **SDXL,
    )


def adapter() -> Any:
    return diffusers.T2IAdapter(channels=[8, 16, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")


def adapter_xl() -> Any:
    return diffusers.T2IAdapter(
        channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )


def two_adapters() -> Any:
    return diffusers.MultiAdapter([adapter(), adapter()])


def upscaler() -> Any:
    """The four channels of noise, the four of the small picture; one more comes out, the variance."""
    return diffusers.UNet2DConditionModel(
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


def sd15_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "guidance_scale": 4.0}


def sdxl_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, pooled=True), **IMAGE, "guidance_scale": 4.0}


def unsized(call: dict[str, Any]) -> dict[str, Any]:
    """Pipelines that take the size from the picture."""
    return {name: value for name, value in call.items() if name not in ("height", "width")}


def image(batch: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return picture("image", height, width, batch)


def upper_half(batch: int) -> torch.Tensor:
    mask = torch.zeros(batch, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return mask


def sd15_ip_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_call(pipe, batch), "ip_adapter_image_embeds": image_embeds(batch)}


def sdxl_ip_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "ip_adapter_image_embeds": image_embeds(batch)}


def sdxl_two_ips_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "ip_adapter_image_embeds": image_embeds(batch, 2)}


def sdxl_half_lora_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "cross_attention_kwargs": {"scale": 0.5}}


def sd15_image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**unsized(sd15_call(pipe, batch)), "image": image(batch)}


def sd15_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_image_call(pipe, batch), "strength": 0.6}


def sd15_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_call(pipe, batch), "image": image(batch), "mask_image": upper_half(batch), "strength": 1.0}


def sdxl_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "image": image(batch), "mask_image": upper_half(batch), "strength": 0.6}


def sdxl_control_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "image": image(batch)}


def sdxl_control_half_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_control_call(pipe, batch), "control_guidance_end": 0.5, "guess_mode": True}


def sdxl_two_controls_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_control_call(pipe, batch), "image": [image(batch), picture("control", HEIGHT, WIDTH, batch)]}


def sdxl_union_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    controls = [image(batch), picture("control", HEIGHT, WIDTH, batch)]
    return {**sdxl_call(pipe, batch), "control_image": controls, "control_mode": [1, 3]}


def sd15_adapter_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_call(pipe, batch), "image": image(batch)}


def sd15_adapters_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    pictures = [image(batch), picture("control", HEIGHT, WIDTH, batch)]
    return {**sd15_call(pipe, batch), "image": pictures, "adapter_conditioning_scale": [0.7, 0.5]}


def sdxl_adapter_half_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_control_call(pipe, batch), "adapter_conditioning_factor": 0.5}


def unguided_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "guidance_scale": 0.0}


def sd15_control_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    control = picture("control", HEIGHT, WIDTH, batch)
    return {**sd15_call(pipe, batch), "image": image(batch), "control_image": control, "strength": 0.6}


def sd15_control_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_control_img2img_call(pipe, batch), "mask_image": upper_half(batch)}


def small_image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Of the size that the latents are to have."""
    return {**sd15_image_call(pipe, batch), "image": image(batch, HEIGHT // 2, WIDTH // 2)}


def small_latents_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    small = normal("image latents", 4, HEIGHT // 4, WIDTH // 4, batch=batch)
    return {**unsized(sdxl_call(pipe, batch)), "image": small}


def depth_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sd15_img2img_call(pipe, batch), "depth_map": picture("depth", HEIGHT // 2, WIDTH // 2, batch)[:, 0]}


def sdxl_ends_early_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**sdxl_call(pipe, batch), "denoising_end": 0.7}


def sdxl_refiner_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    latents = normal("image latents", 4, HEIGHT // 2, WIDTH // 2, batch=batch)
    return {**unsized(sdxl_call(pipe, batch)), "image": latents, "denoising_start": 0.4}


PIPELINES = (
    tiny("sdxl_ip_adapter", sdxl, "StableDiffusionXLPipeline", sdxl_ip_call, then=with_ip_adapters),
    tiny("sdxl_two_ip_adapters", sdxl, "StableDiffusionXLPipeline", sdxl_two_ips_call, then=with_two_ip_adapters),
    tiny("sd15_ip_adapter", sd15_plain, "StableDiffusionPipeline", sd15_ip_call, then=with_ip_adapters),
    tiny("sdxl_lora", sdxl, "StableDiffusionXLPipeline", sdxl_call, then=with_lora),
    tiny("sdxl_lora_scaled", sdxl, "StableDiffusionXLPipeline", sdxl_half_lora_call, then=with_lora),
    tiny("sdxl_lora_fused", sdxl, "StableDiffusionXLPipeline", sdxl_call, then=with_fused_lora),
    tiny("sd15_lora", sd15_plain, "StableDiffusionPipeline", sd15_call, then=with_lora),
    tiny("sd15_lora_fused", sd15_plain, "StableDiffusionPipeline", sd15_call, then=with_fused_lora),
    tiny("sdxl_freeu", sdxl, "StableDiffusionXLPipeline", sdxl_call, then=with_freeu),
    tiny("sdxl_ends_early", sdxl, "StableDiffusionXLPipeline", sdxl_ends_early_call, steps=4),
    tiny(
        "sdxl_refiner",
        sdxl,
        "StableDiffusionXLImg2ImgPipeline",
        sdxl_refiner_call,
        steps=4,
        size={"projection_class_embeddings_input_dim": 5 * 8 + POOLED},  # a score stands for two of the sizes
        requires_aesthetics_score=True,
    ),
    tiny("sdxl_controlnet", sdxl, CONTROLNET_XL, sdxl_control_call, controlnet=sdxl_control),
    tiny("sdxl_controlnet_half_way", sdxl, CONTROLNET_XL, sdxl_control_half_call, controlnet=sdxl_control),
    tiny("sdxl_two_controlnets", sdxl, CONTROLNET_XL, sdxl_two_controls_call, controlnet=two_sdxl_controls),
    tiny("sdxl_union", sdxl, "StableDiffusionXLControlNetUnionPipeline", sdxl_union_call, controlnet=union),
    tiny("sdxl_t2i_adapter", sdxl, "StableDiffusionXLAdapterPipeline", sdxl_control_call, adapter=adapter_xl),
    tiny("sdxl_t2i_half_way", sdxl, "StableDiffusionXLAdapterPipeline", sdxl_adapter_half_call, adapter=adapter_xl),
    tiny("sd15_t2i_adapter", sd15_plain, "StableDiffusionAdapterPipeline", sd15_adapter_call, adapter=adapter),
    tiny(
        "sd15_two_t2i_adapters", sd15_plain, "StableDiffusionAdapterPipeline", sd15_adapters_call, adapter=two_adapters
    ),
    perturbed("sdxl_pag", sdxl, "StableDiffusionXLPAGPipeline", sdxl_call, pag_applied_layers=EVERYWHERE),
    tiny(
        "sdxl_pag_unguided",
        sdxl,
        "StableDiffusionXLPAGPipeline",
        unguided_pag_call,
        guidance="perturbed, both branches in the batch",
        pag_applied_layers=EVERYWHERE,
    ),
    perturbed("sd15_pag", sd15_plain, "StableDiffusionPAGPipeline", sd15_call, pag_applied_layers=EVERYWHERE),
    perturbed(
        "sdxl_controlnet_pag",
        sdxl,
        "StableDiffusionXLControlNetPAGPipeline",
        sdxl_control_call,
        controlnet=sdxl_control,
    ),
    tiny("sdxl_inpaint", sdxl, "StableDiffusionXLInpaintPipeline", sdxl_inpaint_call, steps=3),
    tiny("sdxl_inpaint_nine", sdxl, "StableDiffusionXLInpaintPipeline", sdxl_inpaint_call, steps=3, size=NINE),
    tiny("sd15_inpaint_nine", sd15_plain, "StableDiffusionInpaintPipeline", sd15_inpaint_call, size=NINE),
    tiny("sd15_img2img", sd15_plain, "StableDiffusionImg2ImgPipeline", sd15_img2img_call, steps=3),
    tiny(
        "sd15_instruct_pix2pix",
        sd15_plain,
        "StableDiffusionInstructPix2PixPipeline",
        sd15_image_call,
        guidance="batched, three branches",
        size={"in_channels": 8},
    ),
    tiny(
        "sdxl_instruct_pix2pix",
        sdxl,
        "StableDiffusionXLInstructPix2PixPipeline",
        sdxl_control_call,
        guidance="batched, three branches",
        size={"in_channels": 8},
    ),
    tiny(
        "sd15_controlnet_img2img",
        sd15_plain,
        "StableDiffusionControlNetImg2ImgPipeline",
        sd15_control_img2img_call,
        steps=3,
        controlnet=sd15_control,
    ),
    tiny(
        "sd15_controlnet_inpaint",
        sd15_plain,
        "StableDiffusionControlNetInpaintPipeline",
        sd15_control_inpaint_call,
        steps=3,
        controlnet=sd15_control,
    ),
    tiny(
        "sd15_upscale",
        sd15,
        "StableDiffusionUpscalePipeline",
        small_image_call,
        size={"in_channels": 7, "num_class_embeds": 1000},
        low_res_scheduler=lambda: diffusers.DDPMScheduler(**SD_BETAS),
    ),
    tiny(
        "sd15_latent_upscale",
        sd15,
        "StableDiffusionLatentUpscalePipeline",
        small_latents_call,
        unet=upscaler,
        scheduler=euler,
    ),
    tiny("sd15_depth2img", sd15, "StableDiffusionDepth2ImgPipeline", depth_call, steps=3, size={"in_channels": 5}),
)
