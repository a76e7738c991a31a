"""More of Flux, Flux 2, Chroma and what is made in their likeness."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from pipelines.flux import (
    chroma,
    chroma_call,
    flux,
    flux2,
    flux2_call,
    flux_call,
    flux_img2img_call,
    flux_inpaint_call,
    flux_kontext_call,
    flux_true_cfg_call,
)
from pipelines.parts import (
    HEIGHT,
    IMAGE,
    POOLED,
    STEPS,
    TEXT,
    TOKENS,
    WIDTH,
    assemble,
    flow_euler,
    image_vae,
    normal,
    picture,
    prompt,
    seeded,
)
from pipelines.tiny import one_batch, plain, two_calls

_IMAGE_CHANNELS = 10  # of the image embedding that an IP-Adapter takes
_IMAGE_TOKENS = 4  # the number that diffusers makes of it


def _reference() -> Any:
    """Not smaller than the pipelines of Flux 2 allow."""
    return Image.fromarray((picture("reference", 64, 80)[0].movedim(0, -1) * 255).byte().numpy())


@contextmanager
def _seed(tag: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(tag).initial_seed())
        yield


def around(pipeline: type, pipe: Any, **over: Any) -> Any:
    """Another pipeline around the parts of this one."""
    made: Any = pipeline(**{**pipe.components, **over})
    made.set_progress_bar_config(disable=True)
    return made


def _control(pipeline: type) -> Any:
    return flux("flux_control", pipeline, in_channels=32, out_channels=16)


def _control_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_img2img_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def _control_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_inpaint_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def _fill() -> Any:
    """The transformer sees the noisy latents, the picture without what the mask covers, and the mask in full size."""
    return flux("flux_fill", diffusers.FluxFillPipeline, in_channels=48, out_channels=16)


def _fill_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_inpaint_call(pipe, batch), "guidance_scale": 30.0, "strength": 1.0}


def _kontext_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**flux_inpaint_call(pipe, batch), "image_reference": picture("reference", HEIGHT, WIDTH, batch)}
    return {**call, "max_area": HEIGHT * WIDTH, "_auto_resize": False}


def _two_controlnets() -> Any:
    pipe = flux("flux", diffusers.FluxControlNetPipeline, controlnet=True)
    both = diffusers.FluxMultiControlNetModel([pipe.controlnet, flux("two", type(pipe), controlnet=True).controlnet])
    pipe.register_modules(controlnet=both)
    return pipe


def _two_controlnets_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    images = [picture("control", HEIGHT, WIDTH, batch), picture("depth", HEIGHT, WIDTH, batch)]
    scales = {"controlnet_conditioning_scale": [0.7, 0.4], "control_guidance_end": [1.0, 0.5]}
    return {**flux_true_cfg_call(pipe, batch), "control_image": images, "control_mode": [None, None], **scales}


def _ip_adapter() -> Any:
    pipe = flux("flux", diffusers.FluxPipeline, distilled=False)
    width, blocks = pipe.transformer.inner_dim, range(len(pipe.transformer.transformer_blocks))
    adapter = {
        f"{block}.to_{part}_ip.{kind}": normal(f"ip adapter {block} {part}", width, *shape)
        for block in blocks
        for part in "kv"
        for kind, shape in (("weight", (TEXT,)), ("bias", ()))
    }
    projection = {
        "proj.weight": normal("image projection", _IMAGE_TOKENS * TEXT, _IMAGE_CHANNELS),
        "proj.bias": normal("image projection", _IMAGE_TOKENS * TEXT),
        "norm.weight": torch.ones(TEXT),
        "norm.bias": torch.zeros(TEXT),
    }
    states = {
        "ip_adapter": {key: value[0] for key, value in adapter.items()},
        "image_proj": {key: value[0] if value.ndim > 1 else value for key, value in projection.items()},
    }
    pipe.transformer._load_ip_adapter_weights([states], low_cpu_mem_usage=False)  # what pipe.load_ip_adapter does
    pipe.transformer.requires_grad_(False)
    return pipe


def _ip_adapter_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    embeds = {
        f"{sign}ip_adapter_image_embeds": [normal(f"{sign}image", 1, _IMAGE_CHANNELS, batch=batch)]
        for sign in ("", "negative_")
    }
    return {**flux_true_cfg_call(pipe, batch), **embeds}


def with_lora(pipe: Any, *more: str, fused: bool = False) -> Any:
    """A LoRA at the attentions, and at layers of more names."""
    from peft import LoraConfig

    with _seed("lora"):
        layers = ["to_q", "to_k", "to_v", "to_out.0", *more]
        # "False": not at the zeros of a fresh one.
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    pipe.transformer.eval().requires_grad_(False)
    if fused:
        pipe.fuse_lora(components=["transformer"])
    return pipe


def _lora(*, fused: bool = False) -> Any:
    return with_lora(flux("flux", diffusers.FluxPipeline, distilled=False), "proj_mlp", fused=fused)


def _lora_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_true_cfg_call(pipe, batch), "joint_attention_kwargs": {"scale": 0.7}}


def _klein_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux2_call(pipe, batch), "negative_prompt_embeds": prompt("negative", batch), "guidance_scale": 4.0}


def _klein_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_klein_call(pipe, batch), "image": _reference()}


def _klein_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    images = flux_inpaint_call(pipe, batch)
    pictures = {key: images[key] for key in ("image", "mask_image", "strength")}
    return {**_klein_call(pipe, batch), **pictures, "image_reference": picture("reference", HEIGHT, WIDTH, batch)}


def _own_sigmas_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_call(pipe, batch), "sigmas": [1.0, 0.95, 0.8, 0.6, 0.3, 0.1]}


def _img2img_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_img2img_call(pipe, batch), **flux_true_cfg_call(pipe, batch)}


def _inpaint_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_inpaint_call(pipe, batch), **flux_true_cfg_call(pipe, batch)}


def _kontext_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux_kontext_call(pipe, batch), **flux_true_cfg_call(pipe, batch)}


def _klein_distilled() -> Any:
    return around(diffusers.Flux2KleinPipeline, flux2(), is_distilled=True)


def flux2_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**flux2_call(pipe, batch), "image": _reference()}


def _chroma_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**chroma_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _chroma_inpaint() -> Any:
    pipe = around(diffusers.ChromaInpaintPipeline, chroma())
    pipe.transformer.register_to_config(guidance_embeds=False)  # the pipeline asks; only a file of the original has it
    return pipe


def _chroma_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    mask = flux_inpaint_call(pipe, batch)["mask_image"]
    return {**_chroma_img2img_call(pipe, batch), "mask_image": mask, "true_cfg_scale": 4.0}


def letters(**over: Any) -> Any:
    """A tokenizer that needs no file: one token for each letter."""
    vocabulary = ["<pad>", "<unknown>", *map(chr, range(32, 127))]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    model = Tokenizer(BPE(vocab=numbered, merges=[], unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unknown>", **over)


def _visual_cloze() -> Any:
    """As Flux Fill, whose picture is a grid of examples; it always makes its own embeddings."""
    sizes: dict[str, Any] = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(hidden_size=POOLED, intermediate_size=16, **sizes)
    t5 = T5Config(vocab_size=128, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with _seed("visual cloze"):
        encoders = {"text_encoder": CLIPTextModel(clip).eval(), "text_encoder_2": T5EncoderModel(t5).eval()}
    tokenizers = {"tokenizer": letters(model_max_length=TOKENS), "tokenizer_2": letters()}
    return around(diffusers.VisualClozeGenerationPipeline, _fill(), **encoders, **tokenizers, resolution=HEIGHT)


def _visual_cloze_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = {"task_prompt": ["turn it upside down"] * batch, "content_prompt": [f"figure {i}" for i in range(batch)]}
    grids = [[[_reference(), _reference()], [_reference(), None]]] * batch
    return {
        **prompts,
        "image": grids,
        "max_sequence_length": 2 * TOKENS,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


def _language(layers: int, width: int) -> Any:
    size: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    return LlamaModel(LlamaConfig(vocab_size=128, num_key_value_heads=1, **size))


def _longcat(pipeline: type, **parts: Any) -> Any:
    """It takes embeddings and yet asks for the prompt's length, so it has to make them."""
    made: dict[str, Any] = {"vae": image_vae(), **parts}
    pipe = assemble(
        "longcat_image",
        pipeline,
        transformer=lambda: diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=[8, 4, 4],
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        text_encoder=lambda: _language(layers=1, width=TEXT),
        tokenizer=lambda: letters(additional_special_tokens=["<|vision_start|>"]),
        **made,
    )
    pipe.tokenizer_max_length = 2 * TOKENS
    return pipe


def _longcat_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = {"prompt": [f"figure {i}" for i in range(batch)], "negative_prompt": ["a blur"] * batch}
    return {**prompts, **IMAGE, "guidance_scale": 4.0, "enable_prompt_rewrite": False}


class _Squares(diffusers.AutoencoderKL):
    """For a pipeline that brings every picture to a million pixels: means over squares, for speed."""

    def _encode(self, x: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(x, 64).repeat(1, 6, 1, 1)[:, :16]
        return torch.cat([means, torch.full_like(means, -8.0)], dim=1)


class _Eye:
    """Stands for the processor of a text encoder that also looks at pictures; here it gets none of them."""

    merge_size = 1

    def __init__(self) -> None:
        self.image_processor = self

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(4, 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def _longcat_edit() -> Any:
    levels = ("DownEncoderBlock2D",) * 7, ("UpDecoderBlock2D",) * 7
    vae = {"down_block_types": levels[0], "up_block_types": levels[1], "block_out_channels": (4,) * 7}
    return _longcat(
        diffusers.LongCatImageEditPipeline,
        vae=lambda: _Squares(**vae, latent_channels=16, norm_num_groups=2, shift_factor=0.05, scaling_factor=0.9),
        text_processor=_Eye,
    )


def _longcat_edit_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = {"prompt": ["turn it upside down"] * batch, "negative_prompt": ["a blur"] * batch}
    steps = {"num_inference_steps": STEPS, "output_type": "latent"}
    return {**prompts, **steps, "image": _reference(), "guidance_scale": 4.0}


def _bria_fibo(pipeline: type) -> Any:
    """Each of its blocks reads another layer of the text encoder."""
    return assemble(
        "bria_fibo",
        pipeline,
        transformer=lambda: diffusers.BriaFiboTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT,
            text_encoder_dim=TEXT,
            axes_dims_rope=[8, 4, 4],
        ),
        vae=lambda: diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=8,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            temperal_downsample=[False] * 4,
            latents_mean=[0.1] * 8,
            latents_std=[1.1] * 8,
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        text_encoder=lambda: _language(layers=5, width=TEXT),
        tokenizer=letters,
    )


def _bria_fibo_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = {"prompt": [f"figure {i}" for i in range(batch)], "negative_prompt": ["a blur, a smear"] * batch}
    return {**prompts, **IMAGE, "height": 96, "width": 64, "guidance_scale": 4.0}


def _bria_fibo_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**_bria_fibo_call(pipe, batch), "prompt": json.dumps({"edit_instruction": "turn it upside down"})}
    return {**call, "negative_prompt": "a blur, a smear", "image": _reference()}


_LORAS = (
    two_calls("flux_lora", _lora, _lora_call),
    two_calls("flux_lora_fused", lambda: _lora(fused=True), flux_true_cfg_call),
)

PIPELINES = (
    plain("flux_schnell", lambda: flux("flux", diffusers.FluxPipeline, distilled=False), flux_call),
    plain("flux_own_sigmas", lambda: flux("flux", diffusers.FluxPipeline), _own_sigmas_call),
    two_calls(
        "flux_img2img_true_cfg", lambda: flux("flux", diffusers.FluxImg2ImgPipeline), _img2img_true_cfg_call, steps=4
    ),
    two_calls(
        "flux_inpaint_true_cfg", lambda: flux("flux", diffusers.FluxInpaintPipeline), _inpaint_true_cfg_call, steps=4
    ),
    two_calls("flux_kontext_true_cfg", lambda: flux("flux", diffusers.FluxKontextPipeline), _kontext_true_cfg_call),
    plain("visual_cloze", _visual_cloze, _visual_cloze_call),
    plain("flux_fill", _fill, _fill_call),
    plain(
        "flux_control_img2img", lambda: _control(diffusers.FluxControlImg2ImgPipeline), _control_img2img_call, steps=4
    ),
    plain(
        "flux_control_inpaint", lambda: _control(diffusers.FluxControlInpaintPipeline), _control_inpaint_call, steps=4
    ),
    plain(
        "flux_controlnet_img2img",
        lambda: flux("flux", diffusers.FluxControlNetImg2ImgPipeline, controlnet=True),
        _control_img2img_call,
        steps=4,
    ),
    plain(
        "flux_controlnet_inpaint",
        lambda: flux("flux", diffusers.FluxControlNetInpaintPipeline, controlnet=True),
        _control_inpaint_call,
        steps=4,
    ),
    two_calls("flux_two_controlnets", _two_controlnets, _two_controlnets_call),
    plain(
        "flux_kontext_inpaint",
        lambda: flux("flux", diffusers.FluxKontextInpaintPipeline),
        _kontext_inpaint_call,
        steps=4,
    ),
    two_calls("flux_ip_adapter", _ip_adapter, _ip_adapter_call),
    one_batch("bria_fibo", lambda: _bria_fibo(diffusers.BriaFiboPipeline), _bria_fibo_call),
    one_batch("bria_fibo_edit", lambda: _bria_fibo(diffusers.BriaFiboEditPipeline), _bria_fibo_edit_call),
    two_calls("longcat_image", lambda: _longcat(diffusers.LongCatImagePipeline), _longcat_call),
    two_calls("longcat_image_edit", _longcat_edit, _longcat_edit_call),
    plain("flux2_edit", flux2, flux2_edit_call),
    plain("flux2_klein_distilled", _klein_distilled, flux2_call),
    two_calls("flux2_klein", lambda: around(diffusers.Flux2KleinPipeline, flux2()), _klein_call),
    two_calls("flux2_klein_edit", lambda: around(diffusers.Flux2KleinPipeline, flux2()), _klein_edit_call),
    plain("flux2_klein_kv_from_text", lambda: around(diffusers.Flux2KleinKVPipeline, flux2()), flux2_call),
    two_calls(
        "flux2_klein_inpaint",
        lambda: around(diffusers.Flux2KleinInpaintPipeline, flux2()),
        _klein_inpaint_call,
        steps=4,
    ),
    two_calls(
        "chroma_img2img", lambda: around(diffusers.ChromaImg2ImgPipeline, chroma()), _chroma_img2img_call, steps=4
    ),
    two_calls("chroma_inpaint", _chroma_inpaint, _chroma_inpaint_call, steps=4),
    *_LORAS,
)
