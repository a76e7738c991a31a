"""Newer transformers for pictures, and U-Nets that read prompts as these do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pipelines.more.images import PAG, PERTURBED
from pipelines.parts import (
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    STEPS,
    TEXT,
    WIDTH,
    Parts,
    called,
    flow_euler,
    image_vae,
    network,
    normal,
    part,
    prompt,
    seeded,
    text,
    words,
)
from pipelines.tiny import one_batch, plain, two_calls, unet
from pipelines.unets import SDXL

THREE = "batched, three branches"


def _pil(tag: str, height: int, width: int) -> Any:
    from PIL import Image

    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=seeded(tag))
    return Image.fromarray(pixels.numpy())


# --- what stands for a language model ---------------------------------------------------------------------------------


class Words:
    """Stands for a tokenizer: a token is four characters, its number what they sum up to."""

    model_max_length = 256

    def __call__(
        self, text: str | list[str], return_tensors: str = "", padding: Any = True, max_length: int = 0, **_: Any
    ) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else text
        tokens = [[3 + sum(map(ord, one[i : i + 4])) % 60 for i in range(0, len(one), 4)] for one in texts]
        if not return_tensors:
            return BatchEncoding({"input_ids": tokens[0]})
        length = max_length if padding == "max_length" else max(map(len, tokens))
        padded = torch.tensor([one[:length] + [0] * (length - len(one)) for one in tokens])
        places = torch.arange(length).repeat(len(tokens), 1)
        return BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long(), "position_ids": places})

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(part["text"] for message in messages for part in message["content"])


class Reader(nn.Module):
    """Stands for a language model: what it makes of a token is the token's own."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, TEXT)
        # Where some pipelines look for the last layer.
        self.model = nn.Module()
        self.model.language_model = nn.Module()
        self.model.language_model.layers = nn.ModuleList([self.table])

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[self.table(input_ids)])


class LengthFirst(Reader):
    """The same, with its states as Kolors' has them: [length, batch, channels], the last but one for each token."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[self.table(input_ids).transpose(0, 1)] * 2)


# --- Kolors ----------------------------------------------------------------------------------------------------------

_KOLORS = Parts(
    "kolors",
    {
        "unet": SDXL.parts["unet"].but(
            encoder_hid_dim=TEXT,
            encoder_hid_dim_type="text_proj",
            cross_attention_dim=16,
            projection_class_embeddings_input_dim=6 * 8 + TEXT,
        ),
        "vae": SDXL.parts["vae"],
        "scheduler": SDXL.parts["scheduler"],
        "text_encoder": LengthFirst,
        "tokenizer": Words,
    },
)


def _in_the_middle(pipe: Any) -> Any:
    pipe.set_pag_applied_layers("mid")
    return pipe


def _pooled(_pipe: Any, batch: int) -> dict[str, Any]:
    return {name.replace("prompt", "pooled_prompt"): tensor[:, 0] for name, tensor in text(batch).items()}


def _houses(batch: int) -> list[str]:
    return [f"Picture {i} of a small house" for i in range(batch)]


_AS_LATENTS = {"num_inference_steps": STEPS, "output_type": "latent"}
_kolors_call = called(words(), _pooled, IMAGE, guidance_scale=4.0)


# --- HunyuanImage ----------------------------------------------------------------------------------------------------


def _guider() -> Any:
    return diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3)  # another kind before


_HUNYUAN_IMAGE = Parts(
    "hunyuan_image distilled=False",
    {
        "transformer": network("HunyuanImageTransformer2DModel", guidance_embeds=False, use_meanflow=False),
        "vae": None,  # a picture is then 32 times as large
        "scheduler": flow_euler(shift=4.0),
        "guider": _guider,
    },
)
_HUNYUAN_IMAGE_REFINER = Parts(
    "hunyuan_image_refiner",
    {
        "transformer": network(
            "HunyuanImageTransformer2DModel",
            out_channels=4,
            patch_size=(1, 1, 1),
            rope_axes_dim=(2, 4, 2),
            guidance_embeds=True,
            text_embed_2_dim=None,
        ),
        "vae": None,  # a picture is then 16 times as large
        "scheduler": flow_euler(shift=4.0),
        "guider": _guider,
    },
)
_masked_words = words(mask="prompt_embeds_mask", dtype=torch.int64)


def _glyphs(_pipe: Any, batch: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for sign, tag in (("", "glyphs"), ("negative_", "other glyphs")):
        made[f"{sign}prompt_embeds_2"] = normal(tag, 4, TEXT, batch=batch)
        made[f"{sign}prompt_embeds_mask_2"] = torch.ones(batch, 4, dtype=torch.int64)
    return made


_hunyuan_image_call = called(_masked_words, _glyphs, IMAGE, height=192, width=128)
_hunyuan_image_refiner_call = called(
    _masked_words,
    IMAGE,
    height=96,
    width=64,
    image=lambda batch: normal("image latents", 4, 1, 6, 4, batch=batch),
    distilled_guidance_scale=3.5,
)


# --- PRX, GLM, Ernie, Nucleus ----------------------------------------------------------------------------------------


_PRX = Parts(
    "prx",
    {"transformer": network("PRXTransformer2DModel"), "vae": image_vae(), "scheduler": flow_euler(shift=3.0)},
)


def _prx_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    assert batch == 1, "under guidance PRX gives the network the times of one picture"
    words = text(batch, mask="prompt_attention_mask")
    return {**words, **IMAGE, "guidance_scale": 4.0, "use_resolution_binning": False}


_GLM_IMAGE = Parts(
    "glm_image",
    {
        "transformer": network("GlmImageTransformer2DModel"),
        "vae": image_vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.2, 1.0]),
        "scheduler": flow_euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    },
)


def _kinds(tag: str, patches: int, batch: int) -> Tensor:
    """What a language model says of each patch."""
    return (8 * normal(tag, patches, batch=batch)).long() % 16


_glm_image_call = called(
    words(), IMAGE, prior_token_ids=lambda batch: _kinds("prior", HEIGHT // 4 * WIDTH // 4, batch), guidance_scale=3.0
)
# Each prompt has a picture of 4 x 4 patches. The network reads it before the loop, and keeps keys and values.
_glm_image_edit_call = called(
    _glm_image_call,
    image=lambda batch: [[_pil(f"image {i}", 16, 16)] for i in range(batch)],
    prior_token_image_ids=lambda batch: list(_kinds("prior of the picture", 16, batch)),
    source_image_grid_thw=lambda batch: [torch.tensor([[1, 4, 4]])] * batch,
)
_ERNIE_IMAGE = Parts(
    "ernie_image",
    {
        "transformer": network("ErnieImageTransformer2DModel"),
        "vae": None,  # a picture is then 16 times as large
        "scheduler": flow_euler(shift=3.0),
    },
)
_ernie_image_call = called(
    words(),
    IMAGE,
    negative_prompt_embeds=lambda batch: prompt("negative", batch)[:, 4:],  # prompts have different lengths
    height=96,
    width=64,
    guidance_scale=4.0,
)


def _mixture() -> nn.Module:
    module: nn.Module = network("NucleusMoEImageTransformer2DModel", patch_size=2, out_channels=2)()
    for name, parameter in module.named_parameters():
        if ".experts." in name:  # the class leaves them as memory happens to be
            torch.nn.init.normal_(parameter, std=0.15)
    return module


_NUCLEUS_IMAGE = Parts(
    "nucleus_image",
    {
        "transformer": _mixture,
        "vae": None,  # a picture is then 8 times as large
        "scheduler": flow_euler(use_dynamic_shifting=True),
    },
)


# --- JoyImage, OmniGen, DreamLite, Ideogram --------------------------------------------------------------------------


_JOY_IMAGE = Parts(
    "JoyImageEdit",
    {
        "transformer": network("JoyImageEditTransformer3DModel"),
        # Every picture that is read has about a million pixels: they are made few at once, 16 x 16 to one.
        "vae": part(
            "AutoencoderKLWan",
            base_dim=2,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=0,
            temperal_downsample=[False, False],
            patch_size=16,
            in_channels=3 * 16 * 16,
            out_channels=3 * 16 * 16,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
            scale_factor_spatial=64,
        ),
        "scheduler": flow_euler(shift=4.0),
        "text_encoder": Reader,
        "processor": Words,
    },
)
_OMNIGEN = Parts(
    "omnigen",
    {
        "transformer": network("OmniGenTransformer2DModel"),
        "vae": image_vae(levels=4, shift_factor=None),  # the pipeline takes a factor of 8 for granted
        "scheduler": flow_euler(invert_sigmas=True, num_train_timesteps=1),
        "tokenizer": Words,
    },
)
_omnigen_call = called(IMAGE, prompt=_houses, height=64, width=48, guidance_scale=3.0)
_DREAM_LITE = Parts(
    "dream_lite",
    {
        "unet": network("DreamLiteUNetModel"),
        "vae": part(
            "AutoencoderTiny",
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "scheduler": flow_euler(use_dynamic_shifting=True),
        "text_encoder": Reader,
        "tokenizer": Words,
        "processor": Words,
    },
)


def _dream_lite_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    assert batch == 1, "DreamLite makes one picture"
    return {**IMAGE, "prompt": "a small house", "guidance_scale": 3.5}


def _language_model() -> Any:
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    module: Any = nn.Module()
    module.language_model = Qwen3VLTextModel(
        Qwen3VLTextConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=36,  # the pipeline reads the last of them
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        )
    )
    module.device = torch.device("cpu")
    return module


_IDEOGRAM4_NETWORK = network("Ideogram4Transformer2DModel", llm_features_dim=13 * 8)  # 13 layers are read
_IDEOGRAM4 = Parts(
    "ideogram4",
    {
        "transformer": _IDEOGRAM4_NETWORK,
        "unconditional_transformer": _IDEOGRAM4_NETWORK,
        "text_encoder": _language_model,
        "tokenizer": Words,
        "vae": None,  # a picture is then 16 times as large
        "scheduler": flow_euler(),
    },
)


PIPELINES = (
    unet("kolors", _KOLORS.within("KolorsPipeline"), _kolors_call),
    unet(
        "kolors_img2img",
        _KOLORS.within("KolorsImg2ImgPipeline"),
        # In words: of embeddings the pipeline would lose the pooled ones.
        called(_AS_LATENTS, IMAGE_TO_IMAGE, guidance_scale=4.0, max_sequence_length=12, prompt=_houses),
        steps=3,
    ),
    unet(
        "kolors_pag",
        _KOLORS.within("KolorsPAGPipeline", then=_in_the_middle),
        called(_kolors_call, PAG),
        guidance=PERTURBED,
    ),
    two_calls("hunyuan_image", _HUNYUAN_IMAGE.within("HunyuanImagePipeline"), _hunyuan_image_call),
    plain(
        "hunyuan_image_distilled",
        _HUNYUAN_IMAGE.within(
            "HunyuanImagePipeline",
            "hunyuan_image distilled=True",
            transformer={"guidance_embeds": True, "use_meanflow": True},
            guider=None,
        ),
        called(_hunyuan_image_call, distilled_guidance_scale=3.5),
    ),
    two_calls(
        "hunyuan_image_refiner",
        _HUNYUAN_IMAGE_REFINER.within("HunyuanImageRefinerPipeline"),
        _hunyuan_image_refiner_call,
    ),
    one_batch("prx", _PRX.within("PRXPipeline"), _prx_call),
    two_calls("glm_image", _GLM_IMAGE.within("GlmImagePipeline"), _glm_image_call),
    two_calls("glm_image_edit", _GLM_IMAGE.within("GlmImagePipeline"), _glm_image_edit_call),
    one_batch("ernie_image", _ERNIE_IMAGE.within("ErnieImagePipeline"), _ernie_image_call),
    two_calls(
        "nucleus_image",
        _NUCLEUS_IMAGE.within("NucleusMoEImagePipeline"),
        called(words(mask="prompt_embeds_mask"), IMAGE, height=96, width=64, guidance_scale=4.0),
    ),
    two_calls(
        "joy_image",
        _JOY_IMAGE.within("JoyImageEditPipeline"),
        called(
            _masked_words,
            _AS_LATENTS,
            guidance_scale=4.0,
            image=lambda batch: [_pil(f"image {i}", 32, 24) for i in range(batch)],
        ),
    ),
    one_batch(
        "joy_image_plus",
        _JOY_IMAGE.within(
            "JoyImageEditPlusPipeline", "JoyImageEditPlus", transformer=network("JoyImageEditPlusTransformer3DModel")
        ),
        called(
            IMAGE,
            height=640,
            width=512,
            prompt=_houses,
            images=lambda batch: [[_pil(f"image {i}", 32, 24)] for i in range(batch)],
            guidance_scale=4.0,
        ),
    ),
    one_batch("omnigen", _OMNIGEN.within("OmniGenPipeline"), _omnigen_call),
    one_batch(
        "omnigen_edit",
        _OMNIGEN.within("OmniGenPipeline"),
        called(
            _omnigen_call,
            prompt=lambda batch: [f"<img><|image_1|></img> in winter {i}" for i in range(batch)],
            input_images=lambda batch: [[_pil(f"image {i}", 32, 48)] for i in range(batch)],
            img_guidance_scale=1.6,
        ),
        guidance=THREE,
    ),
    unet("dream_lite", _DREAM_LITE.within("DreamLitePipeline"), _dream_lite_call),
    unet(
        "dream_lite_edit",
        _DREAM_LITE.within("DreamLitePipeline"),
        called(_dream_lite_call, image=lambda _batch: _pil("image", HEIGHT, WIDTH), image_guidance_scale=1.5),
        guidance=THREE,
    ),
    two_calls(
        "ideogram4",
        _IDEOGRAM4.within("Ideogram4Pipeline"),
        called(
            IMAGE,
            height=96,
            width=64,
            max_sequence_length=12,
            prompt=_houses,
            guidance_schedule=[4.0] * 4 + [2.0] * 2,
        ),
        denoisers=("transformer", "unconditional_transformer"),
        guidance="separate, one network per branch",
    ),
)
