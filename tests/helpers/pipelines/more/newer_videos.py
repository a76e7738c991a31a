"""Newer transformers for videos, those of Kandinsky 5 and Cosmos for pictures as well."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch import nn

from pipelines.more.videos import hunyuan_vae
from pipelines.more.wan import film, frames, one_picture
from pipelines.parts import (
    BETAS,
    LEFT_OUT,
    POOLED,
    STEPS,
    TOKENS,
    VIDEO,
    Parts,
    called,
    flow_euler,
    image_vae,
    network,
    normal,
    part,
    picture,
    prompt,
    words,
)
from pipelines.tiny import two_calls, video_one_batch, video_two_calls
from pipelines.videos import flow_unipc, wan_call, wan_vae

HEIGHT, WIDTH, FRAMES = VIDEO["height"], VIDEO["width"], VIDEO["num_frames"]


# --- Latte, Allegro, EasyAnimate -------------------------------------------------------------------------------------


_ddim = part("DDIMScheduler", **BETAS, clip_sample=False)
_NOT_CLEANED = {"negative_prompt": None, "clean_caption": False}
_LATTE = Parts("latte", {"transformer": network("LatteTransformer3DModel"), "vae": image_vae(), "scheduler": _ddim})
_ALLEGRO = Parts(
    "allegro",
    {
        "transformer": network("AllegroTransformer3DModel"),
        "vae": part("AutoencoderKLAllegro", block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2),
        "scheduler": _ddim,
    },
)
_EASY_ANIMATE = Parts(
    "easy_animate",
    {
        "transformer": network("EasyAnimateTransformer3DModel"),
        "vae": part(
            "AutoencoderKLMagvit",
            latent_channels=4,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "scheduler": flow_euler(shift=3.0),
    },
)
_easy_animate_call = called(words(mask="prompt_attention_mask"), VIDEO, guidance_scale=4.0)
# All of every frame is to be made anew: with a part of it the pipeline asks its autoencoder for a setting that there is
# no longer.
_ANEW = {
    "video": lambda batch: torch.stack([picture(f"frame {i}", HEIGHT, WIDTH, batch) for i in range(FRAMES)], dim=2),
    "mask_video": lambda batch: torch.full((batch, 1, FRAMES, HEIGHT, WIDTH), 255.0),
}


# --- Kandinsky 5 -----------------------------------------------------------------------------------------------------


_KANDINSKY5 = Parts(
    "kandinsky5",
    {
        "transformer": network("Kandinsky5Transformer3DModel"),
        "vae": hunyuan_vae,
        "scheduler": flow_euler(shift=5.0),
    },
)


def _in_this_size(pipe: Any) -> Any:
    pipe.resolutions = [(WIDTH, HEIGHT)]  # it would take the nearest of those that it was trained with
    return pipe


def _kandinsky5_words(_pipe: Any, batch: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for sign, tag in (("", "prompt"), ("negative_", "negative")):
        made[f"{sign}prompt_embeds_qwen"] = prompt(tag, batch)
        made[f"{sign}prompt_embeds_clip"] = normal(f"{tag} pooled", POOLED, batch=batch)
        made[f"{sign}prompt_cu_seqlens"] = TOKENS * torch.arange(batch + 1, dtype=torch.int32)
    return made


_kandinsky5_call = called(VIDEO, _kandinsky5_words, guidance_scale=4.0)


# --- Cosmos ----------------------------------------------------------------------------------------------------------


class Permissive(nn.Module):
    """Stands for the safety checker, which the pipelines refuse to be without; of latents it is not asked."""

    device, dtype = torch.device("cpu"), torch.float32  # the pipelines take theirs from the first part that has one


_COSMOS = Parts(
    "cosmos",
    {
        "transformer": network("CosmosTransformer3DModel", in_channels=4),
        "vae": part(
            "AutoencoderKLCosmos",
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            latents_mean=None,
            latents_std=None,
        ),
        "scheduler": part(
            "EDMEulerScheduler", sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        "safety_checker": Permissive,
    },
)
_COSMOS2 = {"vae": wan_vae, "scheduler": flow_euler(use_karras_sigmas=True)}
_COSMOS25 = {"transformer": {"in_channels": 5}, "vae": wan_vae, "scheduler": flow_unipc}
_cosmos_from_image_call = called(wan_call, image=one_picture("image"))


# --- Sana, Helios, Motif ---------------------------------------------------------------------------------------------


_SANA_VIDEO = Parts(
    "sana_video",
    {
        "transformer": network("SanaVideoTransformer3DModel"),
        "vae": wan_vae,
        "scheduler": flow_euler(shift=7.0),
    },
)
_sana_video_call = called(
    words(mask="prompt_attention_mask", dtype=torch.int64),
    VIDEO,
    height=64,
    num_frames=LEFT_OUT,
    frames=FRAMES,
    guidance_scale=4.0,
    negative_prompt=None,
    use_resolution_binning=False,
)
HELIOS = Parts(
    "helios",
    {
        "transformer": network("HeliosTransformer3DModel"),
        "vae": wan_vae,
        "scheduler": part("HeliosScheduler", stages=1),
    },
)
helios_call = called(
    wan_call,
    height=64,
    width=64,
    num_frames=10,  # two chunks, each with a separate loop
    num_latent_frames_per_chunk=2,
    history_sizes=[4, 2, 1],
)


def _guided() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0)


def _without_a_block() -> Any:
    """The branch to lead away from is the same prompt without the second block, by a hook there for one call."""
    return AutoGuidance(guidance_scale=4.0, auto_guidance_config=LayerSkipConfig([1], fqn="transformer_blocks"))


def _also_without_a_block() -> Any:
    return SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig([1], fqn="transformer_blocks"),
    )


_MOTIF_VIDEO = Parts(
    "motif_video",
    {
        "transformer": network("MotifVideoTransformer3DModel"),
        "vae": wan_vae,
        "scheduler": flow_euler(),
        "guider": _guided,
    },
)
_motif_video_call = called(words(mask="prompt_attention_mask"), VIDEO)

PIPELINES = (
    video_one_batch(
        "latte",
        _LATTE.within("LattePipeline"),
        called(wan_call, _NOT_CLEANED, num_frames=LEFT_OUT, height=24, width=16, video_length=3),
    ),
    video_one_batch(
        "allegro",
        _ALLEGRO.within("AllegroPipeline"),
        called(words(mask="prompt_attention_mask", dtype=torch.int64), VIDEO, _NOT_CLEANED, guidance_scale=4.0),
    ),
    video_one_batch("easy_animate", _EASY_ANIMATE.within("EasyAnimatePipeline"), _easy_animate_call),
    video_one_batch(
        "easy_animate_inpaint",
        _EASY_ANIMATE.within("EasyAnimateInpaintPipeline", transformer={"in_channels": 4 + 1 + 4}),
        called(_easy_animate_call, _ANEW, strength=0.7),
        steps=4,
    ),
    video_two_calls("kandinsky5", _KANDINSKY5.within("Kandinsky5T2VPipeline"), _kandinsky5_call),
    video_two_calls(
        "kandinsky5_image_to_video",
        _KANDINSKY5.within("Kandinsky5I2VPipeline"),
        # The first four latent frames are given the mean and deviation of those after them, so there must be some.
        called(_kandinsky5_call, image=lambda _batch: frames("image", 1)[0], num_frames=21),
    ),
    two_calls(
        "kandinsky5_image",
        _KANDINSKY5.within("Kandinsky5T2IPipeline", transformer={"visual_cond": False}, then=_in_this_size),
        called(_kandinsky5_call, num_frames=LEFT_OUT),
    ),
    two_calls(
        "kandinsky5_edit",
        _KANDINSKY5.within("Kandinsky5I2IPipeline", vae=image_vae(levels=4), then=_in_this_size),
        called(_kandinsky5_call, num_frames=LEFT_OUT, image=lambda batch: frames("image", batch)),
    ),
    video_two_calls("cosmos", _COSMOS.within("CosmosTextToWorldPipeline"), wan_call),
    video_two_calls(
        "cosmos_video_to_world",
        _COSMOS.within("CosmosVideoToWorldPipeline", transformer={"in_channels": 5}),
        _cosmos_from_image_call,
    ),
    two_calls(
        "cosmos2_image",
        _COSMOS.within("Cosmos2TextToImagePipeline", **_COSMOS2),
        called(wan_call, num_frames=LEFT_OUT),
    ),
    video_two_calls(
        "cosmos2_video_to_world",
        _COSMOS.within("Cosmos2VideoToWorldPipeline", transformer={"in_channels": 5}, **_COSMOS2),
        _cosmos_from_image_call,
    ),
    video_two_calls("cosmos25", _COSMOS.within("Cosmos2_5_PredictBasePipeline", **_COSMOS25), wan_call),
    video_two_calls(
        "cosmos25_video_to_world",
        _COSMOS.within("Cosmos2_5_PredictBasePipeline", **_COSMOS25),
        called(wan_call, video=film("video"), num_latent_conditional_frames=2),
    ),
    video_one_batch("sana_video", _SANA_VIDEO.within("SanaVideoPipeline"), _sana_video_call),
    video_one_batch(
        "sana_image_to_video",
        _SANA_VIDEO.within("SanaImageToVideoPipeline"),
        called(_sana_video_call, image=one_picture("image", 64, WIDTH)),
    ),
    video_two_calls("helios", HELIOS.within("HeliosPipeline"), helios_call, steps=2 * STEPS),
    video_two_calls("motif_video", _MOTIF_VIDEO.within("MotifVideoPipeline"), _motif_video_call),
    video_two_calls(
        "motif_video_without_a_block",
        _MOTIF_VIDEO.within("MotifVideoPipeline", guider=_without_a_block),
        _motif_video_call,
    ),
    video_two_calls(
        "motif_video_also_without_a_block",
        _MOTIF_VIDEO.within("MotifVideoPipeline", guider=_also_without_a_block),
        _motif_video_call,
        guidance="separate, a third branch from the third step on",
    ),
    video_two_calls(
        "motif_image_to_video",
        _MOTIF_VIDEO.within("MotifVideoImage2VideoPipeline"),
        called(_motif_video_call, prompt=None, image=one_picture("image")),
    ),
)
