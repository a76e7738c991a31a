"""More transformers for pictures."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

from pipelines.images import PIPELINES as IMAGES
from pipelines.parts import (
    BETAS,
    HEIGHT,
    IMAGE,
    POOLED,
    TEXT,
    TOKENS,
    WIDTH,
    anew,
    assemble,
    flow_euler,
    image_vae,
    network,
    normal,
    picture,
    prompt,
    text,
)
from pipelines.tiny import Tiny, one_batch, plain, two_calls

_KNOWN = {tiny.name: tiny for tiny in IMAGES}
PERTURBED = "perturbed, a third branch in the batch"


def _in(pipeline: Any, pipe: Any) -> Any:
    """The parts of one pipeline in a relative of it."""
    taken = inspect.signature(pipeline).parameters
    relative = pipeline(**{name: part for name, part in pipe.components.items() if name in taken})
    relative.set_progress_bar_config(disable=True)
    return relative


def _known(name: str, pipeline: Any) -> Any:
    return _in(pipeline, _KNOWN[name].build())


def _half() -> torch.Tensor:
    """A mask whose upper half is to be painted anew."""
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return mask


# --- Stable Diffusion 3 ----------------------------------------------------------------------------------------------

_sd3_call = _KNOWN["sd3"].call


def _sd3(name: str, pipeline: Any, changed: Any = None, channels: int = 4, **more: Any) -> Any:
    known = _KNOWN["sd3"].build().transformer

    def transformer() -> nn.Module:
        module = anew(known, in_channels=channels, out_channels=channels, dual_attention_layers=())()
        if changed:
            changed(module)
        return module

    vae, scheduler = image_vae(latent_channels=channels), flow_euler(shift=3.0)
    return assemble(name, pipeline, transformer=transformer, vae=vae, scheduler=scheduler, **more)


def _sd3_inpaint() -> Any:
    # Sixteen channels: the pipeline knows by them that the mask is not part of the network's input.
    return _sd3("sd3_inpaint", diffusers.StableDiffusion3InpaintPipeline, channels=16)


def _sd3_controlnet_inpaint() -> Any:
    size = {**_KNOWN["sd3"].build().transformer.config, "num_layers": 1, "extra_conditioning_channels": 1}  # the mask
    return _sd3(
        "sd3_controlnet_inpaint",
        diffusers.StableDiffusion3ControlNetInpaintingPipeline,
        controlnet=lambda: diffusers.SD3ControlNetModel.from_config(size),
    )


def _add_lora(module: Any) -> None:
    from peft import LoraConfig

    # Not the usual start, where one matrix is zero.
    config = LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    module.add_adapter(config)


def _sd3_lora() -> Any:
    return _sd3("sd3_lora", diffusers.StableDiffusion3Pipeline, _add_lora)


def _with_image_prompts(module: Any) -> None:
    """What loading an IP-Adapter does to the network."""
    size = {"hidden_size": 32, "ip_hidden_states_dim": 32, "head_dim": 8, "timesteps_emb_dim": 16}
    module.set_attn_processor({name: SD3IPAdapterJointAttnProcessor2_0(**size) for name in module.attn_processors})
    module.image_proj = IPAdapterTimeImageProjection(
        embed_dim=TEXT, output_dim=32, hidden_dim=16, dim_head=8, heads=2, depth=1, num_queries=4, timestep_in_dim=8
    )


def _sd3_ip_adapter() -> Any:
    return _sd3("sd3_ip_adapter", diffusers.StableDiffusion3Pipeline, _with_image_prompts)


def _sd3_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _sd3_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_img2img_call(pipe, batch), "mask_image": _half()}


def _sd3_controlnet_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **_sd3_call(pipe, batch),
        "control_image": picture("control", HEIGHT, WIDTH, batch),
        "control_mask": _half().repeat(batch, 1, 1, 1),
    }


def _sd3_skipping_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    steps_2_and_3 = {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
    return {**_sd3_call(pipe, batch), "skip_guidance_layers": [1], **steps_2_and_3}


def _sd3_lora_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_call(pipe, batch), "joint_attention_kwargs": {"scale": 0.7}}


def _sd3_ip_adapter_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    picture = normal("picture", 6, TEXT)  # one for all prompts
    return {**_sd3_call(pipe, batch), "ip_adapter_image_embeds": torch.cat([torch.zeros_like(picture), picture])}


def _sd3_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_call(pipe, batch), "pag_scale": 3.0}


def _sd3_pag_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_img2img_call(pipe, batch), "pag_scale": 3.0, "pag_adaptive_scale": 0.004}


_SD3 = (
    one_batch(
        "sd3_img2img", lambda: _known("sd3", diffusers.StableDiffusion3Img2ImgPipeline), _sd3_img2img_call, steps=4
    ),
    one_batch("sd3_inpaint", _sd3_inpaint, _sd3_inpaint_call, steps=4),
    one_batch("sd3_controlnet_inpaint", _sd3_controlnet_inpaint, _sd3_controlnet_inpaint_call),
    one_batch("sd3_skipped_layers", _KNOWN["sd3"].build, _sd3_skipping_call, guidance="batched, a half more at times"),
    one_batch("sd3_lora", _sd3_lora, _sd3_lora_call),
    one_batch("sd3_ip_adapter", _sd3_ip_adapter, _sd3_ip_adapter_call),
    one_batch(
        "sd3_pag", lambda: _known("sd3", diffusers.StableDiffusion3PAGPipeline), _sd3_pag_call, guidance=PERTURBED
    ),
    one_batch(
        "sd3_pag_img2img",
        lambda: _known("sd3", diffusers.StableDiffusion3PAGImg2ImgPipeline),
        _sd3_pag_img2img_call,
        guidance=PERTURBED,
        steps=4,
    ),
)


# --- PixArt, HunyuanDiT ----------------------------------------------------------------------------------------------


def _pixart_alpha() -> Any:
    known = _KNOWN["pixart_sigma"].build()
    # A sample size of 128: only then the pipeline passes the size of the picture to the network.
    size = {"sample_size": 128, "use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24}
    return assemble(
        "pixart_alpha",
        diffusers.PixArtAlphaPipeline,
        transformer=anew(known.transformer, **size),
        vae=anew(known.vae),
        scheduler=known.scheduler,
    )


_pixart_call = _KNOWN["pixart_sigma"].call


def _pixart_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_pixart_call(pipe, batch), "pag_scale": 3.0}


def _hunyuan_dit(pipeline: type, **more: Any) -> Any:
    return assemble(
        "hunyuan_dit",
        pipeline,
        transformer=network("HunyuanDiT2DModel"),
        vae=image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        scheduler=lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False, **BETAS),
        requires_safety_checker=False,
        **more,
    )


def _hunyuan_dit_controlnet() -> Any:
    controlnet = lambda: diffusers.HunyuanDiT2DControlNetModel(  # noqa: E731
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        transformer_num_layers=6, cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT, pooled_projection_dim=POOLED,
        text_len=TOKENS, text_len_t5=TOKENS,
    )  # fmt: skip
    return _hunyuan_dit(diffusers.HunyuanDiTControlNetPipeline, controlnet=controlnet)


def _hunyuan_dit_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", dtype=torch.int64)
    of_t5 = {f"{name}_2": tensor.roll(1, -1) for name, tensor in words.items()}
    sizes = {"height": 64, "width": 48, "use_resolution_binning": False}
    return {**words, **of_t5, **IMAGE, **sizes, "guidance_scale": 4.0, "guidance_rescale": 0.3}


def _hunyuan_dit_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_hunyuan_dit_call(pipe, batch), "control_image": picture("control", 64, 48, batch)}


def _hunyuan_dit_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_hunyuan_dit_call(pipe, batch), "pag_scale": 3.0}


_PIXART_AND_HUNYUAN_DIT = (
    one_batch("pixart_alpha", _pixart_alpha, _pixart_call),
    one_batch(
        "pixart_sigma_pag",
        lambda: _known("pixart_sigma", diffusers.PixArtSigmaPAGPipeline),
        _pixart_pag_call,
        guidance=PERTURBED,
    ),
    one_batch("hunyuan_dit", lambda: _hunyuan_dit(diffusers.HunyuanDiTPipeline), _hunyuan_dit_call),
    one_batch("hunyuan_dit_controlnet", _hunyuan_dit_controlnet, _hunyuan_dit_controlnet_call),
    one_batch(
        "hunyuan_dit_pag",
        lambda: _hunyuan_dit(diffusers.HunyuanDiTPAGPipeline),
        _hunyuan_dit_pag_call,
        guidance=PERTURBED,
    ),
)

# --- CogView ---------------------------------------------------------------------------------------------------------


def _cogview3(scheduler: type) -> Any:
    return assemble(
        "cogview3",
        diffusers.CogView3PlusPipeline,
        transformer=network("CogView3PlusTransformer2DModel"),
        vae=image_vae(),
        scheduler=lambda: scheduler(prediction_type="v_prediction", timestep_spacing="trailing", **BETAS),
    )


def _cogview3_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "guidance_scale": 4.0}


def _cogview4(pipeline: type, channels: int = 4) -> Any:
    return assemble(
        f"cogview4 of {channels}",
        pipeline,
        transformer=network("CogView4Transformer2DModel", in_channels=channels),
        vae=image_vae(shift_factor=None),
        scheduler=flow_euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def _cogview4_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = _cogview3_call(pipe, batch)
    shorter = words["negative_prompt_embeds"][:, 4:]  # branches have different lengths
    return {**words, "negative_prompt_embeds": shorter, "width": 48}


def _cogview4_control_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    control = picture("control", HEIGHT, 48, batch)
    return {**_cogview3_call(pipe, batch), "width": 48, "control_image": control}


_COGVIEW = (
    one_batch("cogview3", lambda: _cogview3(diffusers.CogVideoXDDIMScheduler), _cogview3_call),
    one_batch("cogview3_dpm", lambda: _cogview3(diffusers.CogVideoXDPMScheduler), _cogview3_call),
    two_calls("cogview4", lambda: _cogview4(diffusers.CogView4Pipeline), _cogview4_call),
    two_calls("cogview4_control", lambda: _cogview4(diffusers.CogView4ControlPipeline, 8), _cogview4_control_call),
)

# --- Sana ------------------------------------------------------------------------------------------------------------

_sana_call = _KNOWN["sana"].call


def _sana_sprint(pipeline: type) -> Any:
    known = _KNOWN["sana"].build()
    return assemble(
        "sana_sprint",
        pipeline,
        transformer=anew(known.transformer, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        vae=anew(known.vae),
        scheduler=diffusers.SCMScheduler,
    )


def _sana_controlnet() -> Any:
    known = _KNOWN["sana"].build()
    return assemble(
        "sana_controlnet",
        diffusers.SanaControlNetPipeline,
        transformer=anew(known.transformer),
        controlnet=lambda: diffusers.SanaControlNetModel.from_config({**known.transformer.config, "num_layers": 2}),
        vae=anew(known.vae),
        scheduler=known.scheduler,
    )


def _sana_sprint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {name: value for name, value in _sana_call(pipe, batch).items() if not name.startswith("negative")}
    return {**call, "intermediate_timesteps": None}  # those are for a run of two steps


def _sana_sprint_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sana_sprint_call(pipe, batch), "image": picture("image", 64, 32, batch), "strength": 0.6}


def _sana_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sana_call(pipe, batch), "control_image": picture("control", 64, 32, batch)}


def _sana_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sana_call(pipe, batch), "pag_scale": 3.0}


_SANA = (
    plain("sana_sprint", lambda: _sana_sprint(diffusers.SanaSprintPipeline), _sana_sprint_call),
    plain(
        "sana_sprint_img2img",
        lambda: _sana_sprint(diffusers.SanaSprintImg2ImgPipeline),
        _sana_sprint_img2img_call,
        steps=4,
    ),
    one_batch("sana_controlnet", _sana_controlnet, _sana_controlnet_call),
    one_batch("sana_pag", lambda: _known("sana", diffusers.SanaPAGPipeline), _sana_pag_call, guidance=PERTURBED),
)


# --- Lumina, AuraFlow, HiDream ---------------------------------------------------------------------------------------


def _lumina() -> Any:
    return assemble(
        "lumina",
        diffusers.LuminaPipeline,
        transformer=network("LuminaNextDiT2DModel"),
        vae=image_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        scheduler=flow_euler(shift=1.0),
    )


def _lumina_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", dtype=torch.int64)
    # The positions are scaled one way in the first steps, and another way later.
    return {**words, **IMAGE, "height": 96, "width": 64, "guidance_scale": 4.0, "scaling_watershed": 0.4}


def _auraflow_lora() -> Any:
    known = _KNOWN["auraflow"].build()

    def transformer() -> nn.Module:
        module = anew(known.transformer)()
        _add_lora(module)
        return module

    return assemble(
        "auraflow_lora",
        diffusers.AuraFlowPipeline,
        gain=2.0,  # text passes two gates in a row here
        transformer=transformer,
        vae=anew(known.vae),
        scheduler=known.scheduler,
    )


def _hidream() -> Any:
    pipe = assemble(
        "hidream",
        diffusers.HiDreamImagePipeline,
        transformer=network("HiDreamImageTransformer2DModel"),
        vae=image_vae(),
        scheduler=flow_euler(shift=3.0),
    )
    pipe.default_sample_size = 8  # every picture is brought to this area
    return pipe


def _hidream_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words: dict[str, Any] = {}
    for sign, tag in (("", "prompt"), ("negative_", "negative")):
        words[f"{sign}prompt_embeds_t5"] = prompt(tag, batch)
        words[f"{sign}prompt_embeds_llama3"] = torch.stack([prompt(f"layer {i} of {tag}", batch) for i in range(6)])
        words[f"{sign}pooled_prompt_embeds"] = normal(f"{tag} pooled", POOLED, batch=batch)
    return {**words, **IMAGE, "guidance_scale": 4.0}


_OTHERS = (
    one_batch("lumina", _lumina, _lumina_call),
    one_batch("hidream", _hidream, _hidream_call),
    one_batch("auraflow_lora", _auraflow_lora, _KNOWN["auraflow"].call),
)


PIPELINES: tuple[Tiny, ...] = (*_SD3, *_PIXART_AND_HUNYUAN_DIT, *_COGVIEW, *_SANA, *_OTHERS)
