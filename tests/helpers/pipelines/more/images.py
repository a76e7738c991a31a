"""More transformers for pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

from pipelines.images import (
    AURAFLOW,
    PIXART_SIGMA,
    SANA,
    SD3,
    auraflow_call,
    pixart_sigma_call,
    sana_call,
    sd3_call,
)
from pipelines.parts import (
    BETAS,
    CONTROL,
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    INPAINT,
    LEFT_OUT,
    POOLED,
    TEXT,
    TOKENS,
    Part,
    Parts,
    called,
    flow_euler,
    image_vae,
    network,
    normal,
    part,
    pictured,
    prompt,
    upper_half,
    words,
)
from pipelines.tiny import Tiny, one_batch, plain, two_calls

PERTURBED = "perturbed, a third branch in the batch"
PAG = {"pag_scale": 3.0}


def _changed(network: Part, change: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    """Return a function that makes a network and changes it, before every parameter is given a say."""

    def make() -> nn.Module:
        module: nn.Module = network()
        change(module)
        return module

    return make


def _add_lora(module: Any) -> None:
    from peft import LoraConfig

    # Not the usual start, where one matrix is zero.
    config = LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    module.add_adapter(config)


def _with_image_prompts(module: Any) -> None:
    """What loading an IP-Adapter does to the network."""
    size = {"hidden_size": 32, "ip_hidden_states_dim": 32, "head_dim": 8, "timesteps_emb_dim": 16}
    module.set_attn_processor({name: SD3IPAdapterJointAttnProcessor2_0(**size) for name in module.attn_processors})
    module.image_proj = IPAdapterTimeImageProjection(
        embed_dim=TEXT, output_dim=32, hidden_dim=16, dim_head=8, heads=2, depth=1, num_queries=4, timestep_in_dim=8
    )


# --- Stable Diffusion 3 ----------------------------------------------------------------------------------------------

_NO_DUAL = {"dual_attention_layers": ()}
_SD3_CONTROLNET = part(
    "SD3ControlNetModel",
    **{**SD3.parts["transformer"].settings, "num_layers": 1},
    extra_conditioning_channels=1,  # the mask
)
_SD3_NETWORK = SD3.parts["transformer"].but(**_NO_DUAL)
_SD3_STEPS_2_AND_3 = {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}


def _one_picture_for_all(_batch: int) -> torch.Tensor:
    picture = normal("picture", 6, TEXT)
    return torch.cat([torch.zeros_like(picture), picture])


_SD3 = (
    one_batch("sd3_img2img", SD3.within("StableDiffusion3Img2ImgPipeline"), called(sd3_call, IMAGE_TO_IMAGE), steps=4),
    one_batch(
        "sd3_inpaint",
        # Sixteen channels: the pipeline knows by them that the mask is not part of the network's input.
        SD3.within(
            "StableDiffusion3InpaintPipeline",
            "sd3_inpaint",
            transformer={"in_channels": 16, "out_channels": 16, **_NO_DUAL},
            vae={"latent_channels": 16},
        ),
        called(sd3_call, INPAINT),
        steps=4,
    ),
    one_batch(
        "sd3_controlnet_inpaint",
        SD3.within(
            "StableDiffusion3ControlNetInpaintingPipeline",
            "sd3_controlnet_inpaint",
            transformer=_NO_DUAL,
            controlnet=_SD3_CONTROLNET,
        ),
        called(sd3_call, CONTROL, control_mask=upper_half),
    ),
    one_batch(
        "sd3_skipped_layers",
        SD3.within("StableDiffusion3Pipeline"),
        called(sd3_call, _SD3_STEPS_2_AND_3, skip_guidance_layers=[1]),
        guidance="batched, a half more at times",
    ),
    one_batch(
        "sd3_lora",
        SD3.within("StableDiffusion3Pipeline", "sd3_lora", transformer=_changed(_SD3_NETWORK, _add_lora)),
        called(sd3_call, joint_attention_kwargs={"scale": 0.7}),
    ),
    one_batch(
        "sd3_ip_adapter",
        SD3.within(
            "StableDiffusion3Pipeline", "sd3_ip_adapter", transformer=_changed(_SD3_NETWORK, _with_image_prompts)
        ),
        called(sd3_call, ip_adapter_image_embeds=_one_picture_for_all),
    ),
    one_batch("sd3_pag", SD3.within("StableDiffusion3PAGPipeline"), called(sd3_call, PAG), guidance=PERTURBED),
    one_batch(
        "sd3_pag_img2img",
        SD3.within("StableDiffusion3PAGImg2ImgPipeline"),
        called(sd3_call, IMAGE_TO_IMAGE, PAG, pag_adaptive_scale=0.004),
        guidance=PERTURBED,
        steps=4,
    ),
)


# --- PixArt, HunyuanDiT ----------------------------------------------------------------------------------------------

_HUNYUAN_DIT = Parts(
    "hunyuan_dit",
    {
        "transformer": network("HunyuanDiT2DModel"),
        "vae": image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        "scheduler": part("DDPMScheduler", prediction_type="v_prediction", clip_sample=False, **BETAS),
        "requires_safety_checker": False,
    },
)
_HUNYUAN_DIT_CONTROLNET = part(
    "HunyuanDiT2DControlNetModel",
    **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8},
    **{"hidden_size": 16, "transformer_num_layers": 6, "text_len": TOKENS, "text_len_t5": TOKENS},
    **{"cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": POOLED},
)
_HUNYUAN_DIT_WORDS = words(mask="prompt_attention_mask", dtype=torch.int64)


def _hunyuan_dit_words_of_t5(pipe: Any, batch: int) -> dict[str, Any]:
    return {f"{name}_2": tensor.roll(1, -1) for name, tensor in _HUNYUAN_DIT_WORDS(pipe, batch).items()}


_hunyuan_dit_call = called(
    *(_HUNYUAN_DIT_WORDS, _hunyuan_dit_words_of_t5, IMAGE),
    height=64,
    width=48,
    use_resolution_binning=False,
    guidance_scale=4.0,
    guidance_rescale=0.3,
)

_PIXART_AND_HUNYUAN_DIT = (
    one_batch(
        "pixart_alpha",
        PIXART_SIGMA.within(
            "PixArtAlphaPipeline",
            "pixart_alpha",
            # A sample size of 128: only then the pipeline passes the size of the picture to the network.
            transformer={
                **{"sample_size": 128, "use_additional_conditions": True},
                **{"num_attention_heads": 3, "cross_attention_dim": 24},
            },
        ),
        pixart_sigma_call,
    ),
    one_batch(
        "pixart_sigma_pag",
        PIXART_SIGMA.within("PixArtSigmaPAGPipeline"),
        called(pixart_sigma_call, PAG),
        guidance=PERTURBED,
    ),
    one_batch("hunyuan_dit", _HUNYUAN_DIT.within("HunyuanDiTPipeline"), _hunyuan_dit_call),
    one_batch(
        "hunyuan_dit_controlnet",
        _HUNYUAN_DIT.within("HunyuanDiTControlNetPipeline", controlnet=_HUNYUAN_DIT_CONTROLNET),
        called(_hunyuan_dit_call, control_image=pictured("control", 64, 48)),
    ),
    one_batch(
        "hunyuan_dit_pag",
        _HUNYUAN_DIT.within("HunyuanDiTPAGPipeline"),
        called(_hunyuan_dit_call, PAG),
        guidance=PERTURBED,
    ),
)

# --- CogView ---------------------------------------------------------------------------------------------------------

_COGVIEW3_NOISE: dict[str, Any] = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", **BETAS}
_COGVIEW3 = Parts(
    "cogview3",
    {
        "transformer": network("CogView3PlusTransformer2DModel"),
        "vae": image_vae(),
        "scheduler": part("CogVideoXDDIMScheduler", **_COGVIEW3_NOISE),
    },
)
_COGVIEW4 = Parts(
    "cogview4 of 4",
    {
        "transformer": network("CogView4Transformer2DModel", in_channels=4),
        "vae": image_vae(shift_factor=None),
        "scheduler": flow_euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    },
)
_cogview3_call = called(words(), IMAGE, guidance_scale=4.0)

_COGVIEW = (
    one_batch("cogview3", _COGVIEW3.within("CogView3PlusPipeline"), _cogview3_call),
    one_batch(
        "cogview3_dpm",
        _COGVIEW3.within("CogView3PlusPipeline", scheduler=part("CogVideoXDPMScheduler", **_COGVIEW3_NOISE)),
        _cogview3_call,
    ),
    two_calls(
        "cogview4",
        _COGVIEW4.within("CogView4Pipeline"),
        # Branches have different lengths.
        called(_cogview3_call, width=48, negative_prompt_embeds=lambda batch: prompt("negative", batch)[:, 4:]),
    ),
    two_calls(
        "cogview4_control",
        _COGVIEW4.within("CogView4ControlPipeline", "cogview4 of 8", transformer={"in_channels": 8}),
        called(_cogview3_call, width=48, control_image=pictured("control", HEIGHT, 48)),
    ),
)

# --- Sana ------------------------------------------------------------------------------------------------------------

_SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
_SCM = part("SCMScheduler")
_sana_sprint_call = called(
    sana_call,
    {f"negative_prompt{of}": LEFT_OUT for of in ("", "_embeds", "_attention_mask")},
    intermediate_timesteps=None,  # those are for a run of two steps
)

_SANA = (
    plain(
        "sana_sprint",
        SANA.within("SanaSprintPipeline", "sana_sprint", transformer=_SPRINT, scheduler=_SCM),
        _sana_sprint_call,
    ),
    plain(
        "sana_sprint_img2img",
        SANA.within("SanaSprintImg2ImgPipeline", "sana_sprint", transformer=_SPRINT, scheduler=_SCM),
        called(_sana_sprint_call, image=pictured("image", 64, 32), strength=0.6),
        steps=4,
    ),
    one_batch(
        "sana_controlnet",
        SANA.within(
            "SanaControlNetPipeline",
            "sana_controlnet",
            controlnet=part("SanaControlNetModel", **{**SANA.parts["transformer"].settings, "num_layers": 2}),
        ),
        called(sana_call, control_image=pictured("control", 64, 32)),
    ),
    one_batch("sana_pag", SANA.within("SanaPAGPipeline"), called(sana_call, PAG), guidance=PERTURBED),
)


# --- Lumina, AuraFlow, HiDream ---------------------------------------------------------------------------------------

_LUMINA = Parts(
    "lumina",
    {
        "transformer": network("LuminaNextDiT2DModel"),
        "vae": image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        "scheduler": flow_euler(shift=1.0),
    },
)
_HIDREAM = Parts(
    "hidream",
    {
        "transformer": network("HiDreamImageTransformer2DModel"),
        "vae": image_vae(),
        "scheduler": flow_euler(shift=3.0),
    },
)


def _small(pipe: Any) -> Any:
    pipe.default_sample_size = 8  # every picture is brought to this area
    return pipe


def _hidream_words(_pipe: Any, batch: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for sign, tag in (("", "prompt"), ("negative_", "negative")):
        made[f"{sign}prompt_embeds_t5"] = prompt(tag, batch)
        made[f"{sign}prompt_embeds_llama3"] = torch.stack([prompt(f"layer {i} of {tag}", batch) for i in range(6)])
        made[f"{sign}pooled_prompt_embeds"] = normal(f"{tag} pooled", POOLED, batch=batch)
    return made


_OTHERS = (
    one_batch(
        "lumina",
        _LUMINA.within("LuminaPipeline"),
        called(
            words(mask="prompt_attention_mask", dtype=torch.int64),
            IMAGE,
            height=96,
            width=64,
            guidance_scale=4.0,
            scaling_watershed=0.4,  # the positions are scaled one way in the first steps, and another way later
        ),
    ),
    one_batch(
        "hidream",
        _HIDREAM.within("HiDreamImagePipeline", then=_small),
        called(_hidream_words, IMAGE, guidance_scale=4.0),
    ),
    one_batch(
        "auraflow_lora",
        AURAFLOW.within(
            "AuraFlowPipeline", "auraflow_lora", transformer=_changed(AURAFLOW.parts["transformer"], _add_lora)
        ),
        auraflow_call,
    ),
)


PIPELINES: tuple[Tiny, ...] = (*_SD3, *_PIXART_AND_HUNYUAN_DIT, *_COGVIEW, *_SANA, *_OTHERS)
