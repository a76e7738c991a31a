"""More U-Nets, of other makes than Stable Diffusion's: for videos, in pixels, behind a prior, in two stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import diffusers
import torch

from pipelines.more.stand_ins import Words, reader, viewer
from pipelines.more.unets import SD15, SD_BETAS, ddim, image, sdxl, sdxl_call, unsized
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
    network,
    normal,
    prompt,
    text,
)
from pipelines.tiny import Tiny


def movq(channels: int = 4) -> Any:
    return diffusers.VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        num_vq_embeddings=8,
    )


def variance_learned() -> Any:
    return diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, **BETAS)


def simple_attention(**over: Any) -> Callable[[], Any]:
    """The U-Nets of Kandinsky 2 and of DeepFloyd: blocks that also halve and double the size by residual blocks."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
    }
    return lambda: diffusers.UNet2DConditionModel(**{**settings, **over})


def tiny(
    name: str,
    pipeline: str,
    call: Callable[..., dict[str, Any]],
    *,
    denoiser: str = "unet",
    guidance: str = "batched",
    modality: Literal["image", "video"] = "image",
    steps: int = STEPS,
    then: Callable[[Any], Any] = lambda pipe: pipe,
    **parts: Any,
) -> Tiny:
    """``then`` changes what was built."""

    def build() -> Any:
        return then(assemble(f"other unets, {name}", getattr(diffusers, pipeline), **parts))

    return Tiny(name, build, call, (denoiser,), guidance, modality, steps)


def unclip_scheduler() -> Any:
    return diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)


def stable_unet(**over: Any) -> Callable[[], Any]:
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    return lambda: diffusers.UNet2DConditionModel(**{**SD15, "sample_size": 16, "up_block_types": up, **over})


def lcm() -> Any:
    return diffusers.LCMScheduler(clip_sample=False, **SD_BETAS)


def normalizer(channels: int = POOLED) -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(channels)


def cascade_decoder() -> Any:
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(0, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=POOLED,
        effnet_in_channels=4,
        timestep_conditioning_type=("sca",),
    )


def wuerstchen() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    return WuerstchenPrior(c_in=4, c=16, c_cond=TEXT, c_r=8, depth=3, nhead=2)


def from_noise() -> Any:
    """Sees three channels of noise and those of a small picture."""
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def faint(pipe: Any) -> Any:
    """What is not the noise in the latents, this noise scheduler makes a hundredfold: there is little of it."""
    network = pipe.components.get("prior") or pipe.decoder
    (network.clf if hasattr(network, "clf") else network.out)[1].weight.mul_(0.05)
    return pipe


def knows_empty_prompt(pipe: Any) -> Any:
    """It encodes the empty prompt once, and keeps it."""
    pipe.empty_text_embedding = prompt("empty prompt", 1)
    return pipe


def lcm_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, negative=False), **IMAGE}


def lcm_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**unsized(lcm_call(pipe, batch)), "image": image(batch), "strength": 0.6}


def kandinsky_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    embeds = {f"{sign}image_embeds": normal(f"{sign}image", POOLED, batch=batch) for sign in ("", "negative_")}
    return {**IMAGE, **embeds, "guidance_scale": 4.0}


def kandinsky_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """The pipeline itself takes the height for the width, and the width for the height."""
    return {**kandinsky_call(pipe, batch), "image": 2 * image(batch) - 1, "strength": 0.6}


def prior_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    texts = {"prompt": [f"thing {i}" for i in range(batch)], "negative_prompt": [f"other {i}" for i in range(batch)]}
    return {**texts, "num_inference_steps": STEPS, "guidance_scale": 4.0}


def kandinsky3_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="attention_mask", dtype=torch.int64)
    return {**IMAGE, **words, "height": 128, "width": 64, "guidance_scale": 3.0}


def kandinsky3_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**unsized(kandinsky3_call(pipe, batch)), "image": image(batch, 32, 16), "strength": 0.6}


def faint_noise(batch: int) -> torch.Tensor:
    return 0.02 * normal("noise", 4, HEIGHT // 2, WIDTH // 2, batch=batch)


def cascade_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = {f"{sign}prompt_embeds": prompt(f"{sign}prompt", batch) for sign in ("", "negative_")}
    pooled = {f"{name}_pooled": normal(f"{name} pooled", 1, POOLED, batch=batch) for name in words}
    rest = {"latents": faint_noise(batch), "output_type": "pt", "guidance_scale": 4.0}
    return {**words, **pooled, **IMAGE, **rest}


def cascade_decoder_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    small = normal("image latents", 4, HEIGHT // 4, WIDTH // 4, batch=batch)
    return {**unsized(cascade_call(pipe, batch)), "image_embeddings": small, "output_type": "latent"}


def wuerstchen_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "latents": faint_noise(batch), "output_type": "pt", "guidance_scale": 4.0}


def pixels_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "height": 16, "width": 12, "output_type": "pt", "guidance_scale": 4.0}


def larger_pixels_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**pixels_call(pipe, batch), "image": image(batch, 8, 6), "noise_level": 100}


def words_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    texts = {"prompt": [f"thing {i}" for i in range(batch)], "output_type": "pt", "guidance_scale": 4.0}
    return {**IMAGE, **texts, "height": 128, "width": 96}  # an eighth of it are the latents


def larger_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    small = 2 * image(batch, HEIGHT // 2, WIDTH // 2) - 1
    return {"image": small, "num_inference_steps": STEPS, "output_type": "pt"}


def depth_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    settings = {"processing_resolution": 0, "output_latent": True, "output_type": "pt"}
    return {**settings, "image": image(batch), "num_inference_steps": STEPS, "batch_size": batch}


def depth_of_two_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """One after another."""
    return {**depth_call(pipe, 2 * batch), "batch_size": batch}


def edited_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    texts = {"prompt": ["a thing"] * batch, "negative_prompt": ["no thing"] * batch, "editing_prompt": ["large", "red"]}
    return {**IMAGE, **texts, "edit_warmup_steps": 1, "guidance_scale": 4.0}


def unclip_of_words_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    texts = {"prompt": ["a thing"] * batch, "negative_prompt": ["no thing"] * batch, "guidance_scale": 4.0}
    return {**IMAGE, **texts, "noise_level": 100, "prior_num_inference_steps": 4}


def unclip_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    embeds = normal("image", POOLED, batch=batch)
    return {**text(batch), **IMAGE, "image_embeds": embeds, "noise_level": 100, "guidance_scale": 4.0}


VAE = image_vae(shift_factor=None, force_upcast=False)
SD = {"vae": VAE, "scheduler": ddim}
LCM = {"vae": VAE, "scheduler": lcm, "requires_safety_checker": False}
KANDINSKY = simple_attention(
    out_channels=8,
    encoder_hid_dim=POOLED,
    encoder_hid_dim_type="image_proj",
    addition_embed_type="image",
)
DISTILLED = {"time_cond_proj_dim": 16}
PIPELINES = (
    tiny("lcm", "LatentConsistencyModelPipeline", lcm_call, guidance="none", unet=stable_unet(**DISTILLED), **LCM),
    tiny(
        "lcm_img2img",
        "LatentConsistencyModelImg2ImgPipeline",
        lcm_img2img_call,
        guidance="none",
        unet=stable_unet(**DISTILLED),
        **LCM,
    ),
    Tiny(
        "sdxl_lcm",
        lambda: sdxl(diffusers.StableDiffusionXLPipeline, DISTILLED, scheduler=lcm),
        sdxl_call,
        ("unet",),
        "none",
        "image",
    ),
    tiny("kandinsky22", "KandinskyV22Pipeline", kandinsky_call, unet=KANDINSKY, movq=movq, scheduler=variance_learned),
    tiny(
        "kandinsky22_img2img",
        "KandinskyV22Img2ImgPipeline",
        kandinsky_img2img_call,
        steps=3,
        unet=KANDINSKY,
        movq=movq,
        scheduler=variance_learned,
    ),
    tiny(
        "kandinsky22_prior",
        "KandinskyV22PriorPipeline",
        prior_call,
        denoiser="prior",
        prior=network("PriorTransformer"),
        tokenizer=Words,
        text_encoder=reader("CLIPTextModelWithProjection"),
        scheduler=unclip_scheduler,
    ),
    tiny(
        "kandinsky3",
        "Kandinsky3Pipeline",
        kandinsky3_call,
        unet=network("Kandinsky3UNet"),
        movq=movq,
        scheduler=lambda: diffusers.DDPMScheduler(clip_sample=False, **BETAS),
    ),
    tiny(
        "kandinsky3_img2img",
        "Kandinsky3Img2ImgPipeline",
        kandinsky3_img2img_call,
        steps=3,
        unet=network("Kandinsky3UNet"),
        movq=movq,
        scheduler=lambda: diffusers.DDPMScheduler(clip_sample=False, **BETAS),
    ),
    tiny(
        "stable_cascade_prior",
        "StableCascadePriorPipeline",
        cascade_call,
        denoiser="prior",
        then=faint,
        prior=network("StableCascadeUNet"),
        text_encoder=reader(),  # asked for its type of numbers
        resolution_multiple=2,
        scheduler=diffusers.DDPMWuerstchenScheduler,
    ),
    tiny(
        "stable_cascade_decoder",
        "StableCascadeDecoderPipeline",
        cascade_decoder_call,
        denoiser="decoder",
        then=faint,
        decoder=cascade_decoder,
        latent_dim_scale=2.0,
        scheduler=diffusers.DDPMWuerstchenScheduler,
    ),
    tiny(
        "wuerstchen_prior",
        "WuerstchenPriorPipeline",
        wuerstchen_call,
        denoiser="prior",
        then=faint,
        prior=wuerstchen,
        text_encoder=reader(),
        resolution_multiple=2,
        latent_mean=1.0,
        latent_std=0.0,
        scheduler=diffusers.DDPMWuerstchenScheduler,
    ),
    tiny(
        "deepfloyd",
        "IFPipeline",
        pixels_call,
        unet=simple_attention(
            in_channels=3,
            out_channels=6,
            encoder_hid_dim=TEXT,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
        ),
        scheduler=variance_learned,
        requires_safety_checker=False,
    ),
    tiny(
        "deepfloyd_larger",
        "IFSuperResolutionPipeline",
        larger_pixels_call,
        unet=simple_attention(
            in_channels=6,
            out_channels=6,
            encoder_hid_dim=TEXT,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            class_embed_type="timestep",
        ),
        scheduler=variance_learned,
        image_noising_scheduler=lambda: diffusers.DDPMScheduler(**BETAS),
        requires_safety_checker=False,
    ),
    tiny(
        "ldm",
        "LDMTextToImagePipeline",
        words_call,
        unet=stable_unet(),
        vqvae=VAE,
        bert=reader(),
        tokenizer=Words,
        scheduler=ddim,
    ),
    tiny(
        "ldm_larger",
        "LDMSuperResolutionPipeline",
        larger_call,
        guidance="none",
        unet=from_noise,
        vqvae=lambda: movq(3),
        scheduler=ddim,
    ),
    tiny(
        "marigold_depth",
        "MarigoldDepthPipeline",
        depth_call,
        guidance="none",
        then=knows_empty_prompt,
        unet=stable_unet(in_channels=8),
        **SD,
    ),
    tiny(
        "marigold_depth_of_two",
        "MarigoldDepthPipeline",
        depth_of_two_call,
        guidance="none",
        steps=2 * STEPS,
        then=knows_empty_prompt,
        unet=stable_unet(in_channels=8),
        **SD,
    ),
    tiny(
        "semantic_guidance",
        "SemanticStableDiffusionPipeline",
        edited_call,
        guidance="batched, four branches",
        unet=stable_unet(),
        tokenizer=Words,
        text_encoder=reader(),
        requires_safety_checker=False,
        **SD,
    ),
    tiny(
        "stable_unclip",  # the loop of the prior, with another noise scheduler, comes first
        "StableUnCLIPPipeline",
        unclip_of_words_call,
        unet=stable_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT),
        tokenizer=Words,
        text_encoder=reader(),
        prior=network("PriorTransformer"),
        prior_tokenizer=Words,
        prior_text_encoder=reader("CLIPTextModelWithProjection"),
        prior_scheduler=unclip_scheduler,
        image_normalizer=lambda: normalizer(TEXT),
        image_noising_scheduler=lambda: diffusers.DDPMScheduler(**BETAS),
        **SD,
    ),
    tiny(
        "stable_unclip_img2img",
        "StableUnCLIPImg2ImgPipeline",
        unclip_call,
        unet=stable_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * POOLED),
        image_encoder=viewer,
        image_normalizer=normalizer,
        image_noising_scheduler=lambda: diffusers.DDPMScheduler(**BETAS),
        **SD,
    ),
)
