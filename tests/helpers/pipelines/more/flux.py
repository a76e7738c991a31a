"""More of Flux, Flux 2, Chroma and what is made in their likeness."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
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
    CHROMA,
    FLUX,
    FLUX2,
    KONTEXT,
    NOT_DISTILLED,
    WITH_CONTROL,
    chroma_call,
    flux2_call,
    flux_call,
    flux_controlnet,
    flux_img2img_call,
    flux_inpaint_call,
    flux_true_cfg_call,
)
from pipelines.parts import (
    CONTROL,
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    INPAINT,
    POOLED,
    STEPS,
    TEXT,
    TOKENS,
    WIDTH,
    Parts,
    called,
    flow_euler,
    image_vae,
    normal,
    part,
    picture,
    pictured,
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


def _with_two_controlnets(pipe: Any) -> Any:
    other = FLUX.within("FluxControlNetPipeline", "two", controlnet=flux_controlnet)()
    pipe.register_modules(controlnet=diffusers.FluxMultiControlNetModel([pipe.controlnet, other.controlnet]))
    return pipe


def _with_ip_adapter(pipe: Any) -> Any:
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


def _image_embeds(tag: str) -> Any:
    return lambda batch: [normal(tag, 1, _IMAGE_CHANNELS, batch=batch)]


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


def _asked_for_guidance(pipe: Any) -> Any:
    pipe.transformer.register_to_config(guidance_embeds=False)  # the pipeline asks; only a file of the original has it
    return pipe


def letters(**over: Any) -> Any:
    """A tokenizer that needs no file: one token for each letter."""
    vocabulary = ["<pad>", "<unknown>", *map(chr, range(32, 127))]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    model = Tokenizer(BPE(vocab=numbered, merges=[], unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unknown>", **over)


def _with_encoders(pipe: Any) -> Any:
    """As Flux Fill, whose picture is a grid of examples; it always makes its own embeddings."""
    sizes: dict[str, Any] = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(hidden_size=POOLED, intermediate_size=16, **sizes)
    t5 = T5Config(vocab_size=128, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with _seed("visual cloze"):
        encoders = {"text_encoder": CLIPTextModel(clip).eval(), "text_encoder_2": T5EncoderModel(t5).eval()}
    tokenizers = {"tokenizer": letters(model_max_length=TOKENS), "tokenizer_2": letters()}
    made = diffusers.VisualClozeGenerationPipeline(**{**pipe.components, **encoders, **tokenizers}, resolution=HEIGHT)
    made.set_progress_bar_config(disable=True)
    return made


def _language(layers: int, width: int) -> Any:
    size: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    return LlamaModel(LlamaConfig(vocab_size=128, num_key_value_heads=1, **size))


LONGCAT = Parts(
    "longcat_image",
    {
        "transformer": part(
            "LongCatImageTransformer2DModel",
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=[8, 4, 4],
        ),
        "scheduler": flow_euler(use_dynamic_shifting=True),
        # It takes embeddings and yet asks for the prompt's length, so it has to make them.
        "text_encoder": lambda: _language(layers=1, width=TEXT),
        "tokenizer": lambda: letters(additional_special_tokens=["<|vision_start|>"]),
        "vae": image_vae(),
    },
)


def _reads_twice_as_much(pipe: Any) -> Any:
    pipe.tokenizer_max_length = 2 * TOKENS
    return pipe


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


def _squares() -> Any:
    levels = ("DownEncoderBlock2D",) * 7, ("UpDecoderBlock2D",) * 7
    vae = {"down_block_types": levels[0], "up_block_types": levels[1], "block_out_channels": (4,) * 7}
    return _Squares(**vae, latent_channels=16, norm_num_groups=2, shift_factor=0.05, scaling_factor=0.9)


BRIA_FIBO = Parts(
    "bria_fibo",
    {
        # Each of its blocks reads another layer of the text encoder.
        "transformer": part(
            "BriaFiboTransformer2DModel",
            in_channels=8,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT,
            text_encoder_dim=TEXT,
            axes_dims_rope=[8, 4, 4],
        ),
        "vae": part(
            "AutoencoderKLWan",
            base_dim=4,
            z_dim=8,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            temperal_downsample=[False] * 4,
            latents_mean=[0.1] * 8,
            latents_std=[1.1] * 8,
        ),
        "scheduler": flow_euler(use_dynamic_shifting=True),
        "text_encoder": lambda: _language(layers=5, width=TEXT),
        "tokenizer": letters,
    },
)


def _figures(batch: int) -> list[str]:
    return [f"figure {i}" for i in range(batch)]


def _repeated(value: Any) -> Callable[[int], list[Any]]:
    """One for each sample."""
    return lambda batch: [value] * batch


_AS_LATENTS = {"num_inference_steps": STEPS, "output_type": "latent"}
_REFERENCE = {"image": lambda _batch: _reference()}
_fill_call = called(flux_inpaint_call, guidance_scale=30.0, strength=1.0)
_longcat_words = called(negative_prompt=_repeated("a blur"), guidance_scale=4.0)
_bria_fibo_call = called(
    IMAGE,
    prompt=_figures,
    negative_prompt=_repeated("a blur, a smear"),
    height=96,
    width=64,
    guidance_scale=4.0,
)
_klein_call = called(flux2_call, negative_prompt_embeds=functools.partial(prompt, "negative"), guidance_scale=4.0)
flux2_edit_call = called(flux2_call, _REFERENCE)
_chroma_img2img_call = called(chroma_call, IMAGE_TO_IMAGE)
_KLEIN = FLUX2.within("Flux2KleinPipeline")
_FILL = {"in_channels": 48, "out_channels": 16}  # the noisy latents, the picture without what is masked, the mask

_LORAS = (
    two_calls(
        "flux_lora",
        FLUX.within("FluxPipeline", transformer=NOT_DISTILLED, then=lambda pipe: with_lora(pipe, "proj_mlp")),
        called(flux_true_cfg_call, joint_attention_kwargs={"scale": 0.7}),
    ),
    two_calls(
        "flux_lora_fused",
        FLUX.within(
            "FluxPipeline", transformer=NOT_DISTILLED, then=lambda pipe: with_lora(pipe, "proj_mlp", fused=True)
        ),
        flux_true_cfg_call,
    ),
)

PIPELINES = (
    plain("flux_schnell", FLUX.within("FluxPipeline", transformer=NOT_DISTILLED), flux_call),
    plain("flux_own_sigmas", FLUX.within("FluxPipeline"), called(flux_call, sigmas=[1.0, 0.95, 0.8, 0.6, 0.3, 0.1])),
    two_calls(
        "flux_img2img_true_cfg",
        FLUX.within("FluxImg2ImgPipeline"),
        called(flux_true_cfg_call, IMAGE_TO_IMAGE),
        steps=4,
    ),
    two_calls(
        "flux_inpaint_true_cfg", FLUX.within("FluxInpaintPipeline"), called(flux_true_cfg_call, INPAINT), steps=4
    ),
    two_calls("flux_kontext_true_cfg", FLUX.within("FluxKontextPipeline"), called(flux_true_cfg_call, KONTEXT)),
    plain(
        "visual_cloze",
        FLUX.within("FluxFillPipeline", "flux_fill", transformer=_FILL, then=_with_encoders),
        called(
            _AS_LATENTS,
            task_prompt=_repeated("turn it upside down"),
            content_prompt=_figures,
            image=lambda batch: [[[_reference(), _reference()], [_reference(), None]]] * batch,
            max_sequence_length=2 * TOKENS,
        ),
    ),
    plain("flux_fill", FLUX.within("FluxFillPipeline", "flux_fill", transformer=_FILL), _fill_call),
    plain(
        "flux_control_img2img",
        FLUX.within("FluxControlImg2ImgPipeline", "flux_control", transformer=WITH_CONTROL),
        called(flux_img2img_call, CONTROL),
        steps=4,
    ),
    plain(
        "flux_control_inpaint",
        FLUX.within("FluxControlInpaintPipeline", "flux_control", transformer=WITH_CONTROL),
        called(flux_inpaint_call, CONTROL),
        steps=4,
    ),
    plain(
        "flux_controlnet_img2img",
        FLUX.within("FluxControlNetImg2ImgPipeline", controlnet=flux_controlnet),
        called(flux_img2img_call, CONTROL),
        steps=4,
    ),
    plain(
        "flux_controlnet_inpaint",
        FLUX.within("FluxControlNetInpaintPipeline", controlnet=flux_controlnet),
        called(flux_inpaint_call, CONTROL),
        steps=4,
    ),
    two_calls(
        "flux_two_controlnets",
        FLUX.within("FluxControlNetPipeline", controlnet=flux_controlnet, then=_with_two_controlnets),
        called(
            flux_true_cfg_call,
            control_image=lambda batch: [picture(tag, HEIGHT, WIDTH, batch) for tag in ("control", "depth")],
            control_mode=[None, None],
            controlnet_conditioning_scale=[0.7, 0.4],
            control_guidance_end=[1.0, 0.5],
        ),
    ),
    plain(
        "flux_kontext_inpaint",
        FLUX.within("FluxKontextInpaintPipeline"),
        called(flux_inpaint_call, {**KONTEXT, "image_reference": pictured("reference")}),
        steps=4,
    ),
    two_calls(
        "flux_ip_adapter",
        FLUX.within("FluxPipeline", transformer=NOT_DISTILLED, then=_with_ip_adapter),
        called(
            flux_true_cfg_call,
            ip_adapter_image_embeds=_image_embeds("image"),
            negative_ip_adapter_image_embeds=_image_embeds("negative_image"),
        ),
    ),
    one_batch("bria_fibo", BRIA_FIBO.within("BriaFiboPipeline"), _bria_fibo_call),
    one_batch(
        "bria_fibo_edit",
        BRIA_FIBO.within("BriaFiboEditPipeline"),
        called(
            _bria_fibo_call,
            _REFERENCE,
            prompt=json.dumps({"edit_instruction": "turn it upside down"}),
            negative_prompt="a blur, a smear",
        ),
    ),
    two_calls(
        "longcat_image",
        LONGCAT.within("LongCatImagePipeline", then=_reads_twice_as_much),
        called(_longcat_words, IMAGE, prompt=_figures, enable_prompt_rewrite=False),
    ),
    two_calls(
        "longcat_image_edit",
        LONGCAT.within("LongCatImageEditPipeline", vae=_squares, text_processor=_Eye, then=_reads_twice_as_much),
        called(_longcat_words, _AS_LATENTS, _REFERENCE, prompt=_repeated("turn it upside down")),
    ),
    plain("flux2_edit", FLUX2.within("Flux2Pipeline"), flux2_edit_call),
    plain("flux2_klein_distilled", FLUX2.within("Flux2KleinPipeline", is_distilled=True), flux2_call),
    two_calls("flux2_klein", _KLEIN, _klein_call),
    two_calls("flux2_klein_edit", _KLEIN, called(_klein_call, _REFERENCE)),
    plain("flux2_klein_kv_from_text", FLUX2.within("Flux2KleinKVPipeline"), flux2_call),
    two_calls(
        "flux2_klein_inpaint",
        FLUX2.within("Flux2KleinInpaintPipeline"),
        called(_klein_call, INPAINT, image_reference=pictured("reference")),
        steps=4,
    ),
    two_calls("chroma_img2img", CHROMA.within("ChromaImg2ImgPipeline"), _chroma_img2img_call, steps=4),
    two_calls(
        "chroma_inpaint",
        CHROMA.within("ChromaInpaintPipeline", then=_asked_for_guidance),
        called(chroma_call, INPAINT, true_cfg_scale=4.0),
        steps=4,
    ),
    *_LORAS,
)
