"""More U-Nets, of other makes than Stable Diffusion's: for videos, in pixels, behind a prior, in two stages."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pipelines.more.stand_ins import Words, reader, viewer
from pipelines.more.unets import SD_BETAS, SDXL, SHOWN, ddim, stable_unet, vae
from pipelines.parts import (
    BETAS,
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    POOLED,
    STEPS,
    TEXT,
    UNSIZED,
    WIDTH,
    Parts,
    called,
    network,
    normal,
    part,
    picture,
    pictured,
    prompt,
    words,
)
from pipelines.tiny import Tiny
from pipelines.unets import sdxl_call

movq = part(
    "VQModel",
    block_out_channels=(4, 4),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
    norm_num_groups=2,
    num_vq_embeddings=8,
)
ddpm = part("DDPMScheduler", clip_sample=False, **BETAS)
variance_learned = ddpm.but(variance_type="learned_range")
image_noising = part("DDPMScheduler", **BETAS)
# The U-Nets of Kandinsky 2 and of DeepFloyd: blocks that also halve and double the size by residual blocks.
simple_attention = part(
    "UNet2DConditionModel",
    sample_size=16,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    attention_head_dim=4,
    cross_attention_dim=16,
    resnet_time_scale_shift="scale_shift",
)


def tiny(
    name: str,
    pipeline: str,
    call: Any,
    *,
    denoiser: str = "unet",
    guidance: str = "batched",
    modality: Literal["image", "video"] = "image",
    steps: int = STEPS,
    **parts: Any,
) -> Tiny:
    """``parts``: what the pipeline is made of, and ``then``, as ``Parts.within`` takes them."""
    build = Parts(f"other unets, {name}", {}).within(pipeline, **parts)
    return Tiny(name, build, call, (denoiser,), guidance, modality, steps)


unclip_scheduler = part(
    "UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
)
lcm = part("LCMScheduler", clip_sample=False, **SD_BETAS)


def normalizer(channels: int = POOLED) -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(channels)


cascade_decoder = part(
    "StableCascadeUNet",
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


# Sees three channels of noise and those of a small picture.
from_noise = part(
    "UNet2DModel",
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


def texts(name: str, each: str = "thing") -> Any:
    """A text of its number for each sample."""
    return {name: lambda batch: [f"{each} {i}" for i in range(batch)]}


lcm_call = called(words(negative=False), IMAGE)
kandinsky_call = called(
    IMAGE,
    image_embeds=lambda batch: normal("image", POOLED, batch=batch),
    negative_image_embeds=lambda batch: normal("negative_image", POOLED, batch=batch),
    guidance_scale=4.0,
)
kandinsky3_call = called(
    IMAGE, words(mask="attention_mask", dtype=torch.int64), height=128, width=64, guidance_scale=3.0
)


def faint_noise(batch: int) -> torch.Tensor:
    return 0.02 * normal("noise", 4, HEIGHT // 2, WIDTH // 2, batch=batch)


def cascade_words(_pipe: Any, batch: int) -> dict[str, Any]:
    embeds = {f"{sign}prompt_embeds": prompt(f"{sign}prompt", batch) for sign in ("", "negative_")}
    return embeds | {f"{name}_pooled": normal(f"{name} pooled", 1, POOLED, batch=batch) for name in embeds}


cascade_call = called(cascade_words, IMAGE, latents=faint_noise, output_type="pt", guidance_scale=4.0)
pixels_call = called(words(), IMAGE, height=16, width=12, output_type="pt", guidance_scale=4.0)
depth_call = called(
    SHOWN,
    processing_resolution=0,
    output_latent=True,
    output_type="pt",
    num_inference_steps=STEPS,
    batch_size=lambda batch: batch,
)
A_THING: dict[str, Any] = {
    "prompt": lambda batch: ["a thing"] * batch,
    "negative_prompt": lambda batch: ["no thing"] * batch,
    "guidance_scale": 4.0,
}


SD: dict[str, Any] = {"vae": vae, "scheduler": ddim}
LCM: dict[str, Any] = {"vae": vae, "scheduler": lcm, "requires_safety_checker": False}
KANDINSKY = simple_attention.but(
    out_channels=8,
    encoder_hid_dim=POOLED,
    encoder_hid_dim_type="image_proj",
    addition_embed_type="image",
)
DISTILLED = {"time_cond_proj_dim": 16}
PIPELINES = (
    tiny("lcm", "LatentConsistencyModelPipeline", lcm_call, guidance="none", unet=stable_unet.but(**DISTILLED), **LCM),
    tiny(
        "lcm_img2img",
        "LatentConsistencyModelImg2ImgPipeline",
        called(lcm_call, UNSIZED, IMAGE_TO_IMAGE),
        guidance="none",
        unet=stable_unet.but(**DISTILLED),
        **LCM,
    ),
    Tiny(
        "sdxl_lcm",
        SDXL.within("StableDiffusionXLPipeline", unet=DISTILLED, scheduler=lcm),
        sdxl_call,
        ("unet",),
        "none",
        "image",
    ),
    tiny("kandinsky22", "KandinskyV22Pipeline", kandinsky_call, unet=KANDINSKY, movq=movq, scheduler=variance_learned),
    tiny(
        "kandinsky22_img2img",
        "KandinskyV22Img2ImgPipeline",
        # The pipeline itself takes the height for the width, and the width for the height.
        called(kandinsky_call, image=lambda batch: 2 * picture("image", HEIGHT, WIDTH, batch) - 1, strength=0.6),
        steps=3,
        unet=KANDINSKY,
        movq=movq,
        scheduler=variance_learned,
    ),
    tiny(
        "kandinsky22_prior",
        "KandinskyV22PriorPipeline",
        called(texts("prompt"), texts("negative_prompt", "other"), num_inference_steps=STEPS, guidance_scale=4.0),
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
        scheduler=ddpm,
    ),
    tiny(
        "kandinsky3_img2img",
        "Kandinsky3Img2ImgPipeline",
        called(kandinsky3_call, UNSIZED, image=pictured("image", 32, 16), strength=0.6),
        steps=3,
        unet=network("Kandinsky3UNet"),
        movq=movq,
        scheduler=ddpm,
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
        scheduler=part("DDPMWuerstchenScheduler"),
    ),
    tiny(
        "stable_cascade_decoder",
        "StableCascadeDecoderPipeline",
        called(
            cascade_call,
            UNSIZED,
            image_embeddings=lambda batch: normal("image latents", 4, HEIGHT // 4, WIDTH // 4, batch=batch),
            output_type="latent",
        ),
        denoiser="decoder",
        then=faint,
        decoder=cascade_decoder,
        latent_dim_scale=2.0,
        scheduler=part("DDPMWuerstchenScheduler"),
    ),
    tiny(
        "wuerstchen_prior",
        "WuerstchenPriorPipeline",
        called(words(), IMAGE, latents=faint_noise, output_type="pt", guidance_scale=4.0),
        denoiser="prior",
        then=faint,
        prior=wuerstchen,
        text_encoder=reader(),
        resolution_multiple=2,
        latent_mean=1.0,
        latent_std=0.0,
        scheduler=part("DDPMWuerstchenScheduler"),
    ),
    tiny(
        "deepfloyd",
        "IFPipeline",
        pixels_call,
        unet=simple_attention.but(
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
        called(pixels_call, image=pictured("image", 8, 6), noise_level=100),
        unet=simple_attention.but(
            in_channels=6,
            out_channels=6,
            encoder_hid_dim=TEXT,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            class_embed_type="timestep",
        ),
        scheduler=variance_learned,
        image_noising_scheduler=image_noising,
        requires_safety_checker=False,
    ),
    tiny(
        "ldm",
        "LDMTextToImagePipeline",
        # An eighth of the size are the latents.
        called(IMAGE, texts("prompt"), output_type="pt", guidance_scale=4.0, height=128, width=96),
        unet=stable_unet,
        vqvae=vae,
        bert=reader(),
        tokenizer=Words,
        scheduler=ddim,
    ),
    tiny(
        "ldm_larger",
        "LDMSuperResolutionPipeline",
        called(
            image=lambda batch: 2 * picture("image", HEIGHT // 2, WIDTH // 2, batch) - 1,
            num_inference_steps=STEPS,
            output_type="pt",
        ),
        guidance="none",
        unet=from_noise,
        vqvae=movq.but(latent_channels=3),
        scheduler=ddim,
    ),
    tiny(
        "marigold_depth",
        "MarigoldDepthPipeline",
        depth_call,
        guidance="none",
        then=knows_empty_prompt,
        unet=stable_unet.but(in_channels=8),
        **SD,
    ),
    tiny(
        "marigold_depth_of_two",
        "MarigoldDepthPipeline",
        # One after another.
        called(depth_call, image=lambda batch: picture("image", HEIGHT, WIDTH, 2 * batch)),
        guidance="none",
        steps=2 * STEPS,
        then=knows_empty_prompt,
        unet=stable_unet.but(in_channels=8),
        **SD,
    ),
    tiny(
        "semantic_guidance",
        "SemanticStableDiffusionPipeline",
        called(IMAGE, A_THING, editing_prompt=["large", "red"], edit_warmup_steps=1),
        guidance="batched, four branches",
        unet=stable_unet,
        tokenizer=Words,
        text_encoder=reader(),
        requires_safety_checker=False,
        **SD,
    ),
    tiny(
        "stable_unclip",  # the loop of the prior, with another noise scheduler, comes first
        "StableUnCLIPPipeline",
        called(IMAGE, A_THING, noise_level=100, prior_num_inference_steps=4),
        unet=stable_unet.but(class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT),
        tokenizer=Words,
        text_encoder=reader(),
        prior=network("PriorTransformer"),
        prior_tokenizer=Words,
        prior_text_encoder=reader("CLIPTextModelWithProjection"),
        prior_scheduler=unclip_scheduler,
        image_normalizer=lambda: normalizer(TEXT),
        image_noising_scheduler=image_noising,
        **SD,
    ),
    tiny(
        "stable_unclip_img2img",
        "StableUnCLIPImg2ImgPipeline",
        called(
            words(),
            IMAGE,
            image_embeds=lambda batch: normal("image", POOLED, batch=batch),
            noise_level=100,
            guidance_scale=4.0,
        ),
        unet=stable_unet.but(class_embed_type="projection", projection_class_embeddings_input_dim=2 * POOLED),
        image_encoder=viewer,
        image_normalizer=normalizer,
        image_noising_scheduler=image_noising,
        **SD,
    ),
)
