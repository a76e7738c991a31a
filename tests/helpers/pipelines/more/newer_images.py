"""Newer transformers for pictures, and U-Nets that read prompts as these do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pipelines.more.images import PERTURBED
from pipelines.parts import (
    HEIGHT,
    IMAGE,
    STEPS,
    TEXT,
    WIDTH,
    anew,
    assemble,
    flow_euler,
    image_vae,
    network,
    normal,
    picture,
    seeded,
    text,
)
from pipelines.tiny import one_batch, plain, two_calls, unet
from pipelines.unets import PIPELINES as UNETS

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

_SDXL = next(tiny for tiny in UNETS if tiny.name == "sdxl")


def _kolors(pipeline: type) -> Any:
    known = _SDXL.build()
    size = {"encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 16}
    return assemble(
        "kolors",
        pipeline,
        unet=anew(known.unet, **size, projection_class_embeddings_input_dim=6 * 8 + TEXT),
        vae=anew(known.vae),
        scheduler=known.scheduler,
        text_encoder=LengthFirst,
        tokenizer=Words,
    )


def _kolors_pag() -> Any:
    pipe = _kolors(diffusers.KolorsPAGPipeline)
    pipe.set_pag_applied_layers("mid")
    return pipe


def _kolors_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch)
    pooled = {name.replace("prompt", "pooled_prompt"): tensor[:, 0] for name, tensor in words.items()}
    return {**words, **pooled, **IMAGE, "guidance_scale": 4.0}


def _kolors_img2img_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    """In words: of embeddings the pipeline would lose the pooled ones."""
    prompts = [f"Picture {i} of a small house" for i in range(batch)]
    run = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 4.0, "max_sequence_length": 12}
    return {**run, "prompt": prompts, "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _kolors_pag_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_kolors_call(pipe, batch), "pag_scale": 3.0}


# --- HunyuanImage ----------------------------------------------------------------------------------------------------


def _guider() -> Any:
    return diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3)  # another kind before


def _hunyuan_image(*, distilled: bool) -> Any:
    return assemble(
        f"hunyuan_image {distilled=}",
        diffusers.HunyuanImagePipeline,
        transformer=network("HunyuanImageTransformer2DModel", guidance_embeds=distilled, use_meanflow=distilled),
        vae=None,  # a picture is then 32 times as large
        scheduler=flow_euler(shift=4.0),
        guider=None if distilled else _guider,
    )


def _hunyuan_image_refiner() -> Any:
    return assemble(
        "hunyuan_image_refiner",
        diffusers.HunyuanImageRefinerPipeline,
        transformer=network(
            "HunyuanImageTransformer2DModel",
            out_channels=4,
            patch_size=(1, 1, 1),
            rope_axes_dim=(2, 4, 2),
            guidance_embeds=True,
            text_embed_2_dim=None,
        ),
        vae=None,  # a picture is then 16 times as large
        scheduler=flow_euler(shift=4.0),
        guider=_guider,
    )


def _hunyuan_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_embeds_mask", dtype=torch.int64)
    glyphs = {"prompt_embeds_2": "glyphs", "negative_prompt_embeds_2": "other glyphs"}
    for name, tag in glyphs.items():
        words[name] = normal(tag, 4, TEXT, batch=batch)
        words[name.replace("embeds", "embeds_mask")] = torch.ones(batch, 4, dtype=torch.int64)
    return {**words, **IMAGE, "height": 192, "width": 128}


def _hunyuan_image_distilled_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_hunyuan_image_call(pipe, batch), "distilled_guidance_scale": 3.5}


def _hunyuan_image_refiner_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_embeds_mask", dtype=torch.int64)
    latents = normal("image latents", 4, 1, 6, 4, batch=batch)
    return {**words, **IMAGE, "height": 96, "width": 64, "image": latents, "distilled_guidance_scale": 3.5}


# --- PRX, GLM, Ernie, Nucleus ----------------------------------------------------------------------------------------


def _prx() -> Any:
    return assemble(
        "prx",
        diffusers.PRXPipeline,
        transformer=network("PRXTransformer2DModel"),
        vae=image_vae(),
        scheduler=flow_euler(shift=3.0),
    )


def _prx_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    assert batch == 1, "under guidance PRX gives the network the times of one picture"
    words = text(batch, mask="prompt_attention_mask")
    return {**words, **IMAGE, "guidance_scale": 4.0, "use_resolution_binning": False}


def _glm_image() -> Any:
    statistics: dict[str, Any] = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.2, 1.0]}
    return assemble(
        "glm_image",
        diffusers.GlmImagePipeline,
        transformer=network("GlmImageTransformer2DModel"),
        vae=image_vae(**statistics),
        scheduler=flow_euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def _kinds(tag: str, patches: int, batch: int) -> Tensor:
    """What a language model says of each patch."""
    return (8 * normal(tag, patches, batch=batch)).long() % 16


def _glm_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    patches = (HEIGHT // 4) * (WIDTH // 4)
    return {**text(batch), **IMAGE, "prior_token_ids": _kinds("prior", patches, batch), "guidance_scale": 3.0}


def _glm_image_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Each prompt has a picture of 4 x 4 patches. The network reads it before the loop, and keeps keys and values."""
    return {
        **_glm_image_call(pipe, batch),
        "image": [[_pil(f"image {i}", 16, 16)] for i in range(batch)],
        "prior_token_image_ids": list(_kinds("prior of the picture", 16, batch)),
        "source_image_grid_thw": [torch.tensor([[1, 4, 4]])] * batch,
    }


def _ernie_image() -> Any:
    return assemble(
        "ernie_image",
        diffusers.ErnieImagePipeline,
        transformer=network("ErnieImageTransformer2DModel"),
        vae=None,  # a picture is then 16 times as large
        scheduler=flow_euler(shift=3.0),
    )


def _ernie_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch)
    shorter = words["negative_prompt_embeds"][:, 4:]  # prompts have different lengths
    return {**words, "negative_prompt_embeds": shorter, **IMAGE, "height": 96, "width": 64, "guidance_scale": 4.0}


def _nucleus_image() -> Any:
    def transformer() -> nn.Module:
        module = network("NucleusMoEImageTransformer2DModel", patch_size=2, out_channels=2)()
        for name, parameter in module.named_parameters():
            if ".experts." in name:  # the class leaves them as memory happens to be
                torch.nn.init.normal_(parameter, std=0.15)
        return module

    return assemble(
        "nucleus_image",
        diffusers.NucleusMoEImagePipeline,
        transformer=transformer,
        vae=None,  # a picture is then 8 times as large
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _nucleus_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_embeds_mask")
    return {**words, **IMAGE, "height": 96, "width": 64, "guidance_scale": 4.0}


# --- JoyImage, OmniGen, DreamLite, Ideogram --------------------------------------------------------------------------


def _joy_image(kind: str) -> Any:
    return assemble(
        kind,
        getattr(diffusers, f"{kind}Pipeline"),
        transformer=network(f"{kind}Transformer3DModel"),
        # Every picture that is read has about a million pixels: they are made few at once, 16 x 16 to one.
        vae=lambda: diffusers.AutoencoderKLWan(
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
        scheduler=flow_euler(shift=4.0),
        text_encoder=Reader,
        processor=Words,
    )


def _joy_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_embeds_mask", dtype=torch.int64)
    run = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 4.0}
    return {**words, **run, "image": [_pil(f"image {i}", 32, 24) for i in range(batch)]}


def _joy_image_plus_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = [f"Picture {i} of a small house" for i in range(batch)]
    images = [[_pil(f"image {i}", 32, 24)] for i in range(batch)]
    return {**IMAGE, "height": 640, "width": 512, "prompt": prompts, "images": images, "guidance_scale": 4.0}


def _omnigen() -> Any:
    return assemble(
        "omnigen",
        diffusers.OmniGenPipeline,
        transformer=network("OmniGenTransformer2DModel"),
        vae=image_vae(levels=4, shift_factor=None),  # the pipeline takes a factor of 8 for granted
        scheduler=flow_euler(invert_sigmas=True, num_train_timesteps=1),
        tokenizer=Words,
    )


def _omnigen_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = [f"Picture {i} of a small house" for i in range(batch)]
    return {**IMAGE, "prompt": prompts, "height": 64, "width": 48, "guidance_scale": 3.0}


def _omnigen_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **_omnigen_call(pipe, batch),
        "prompt": [f"<img><|image_1|></img> in winter {i}" for i in range(batch)],
        "input_images": [[_pil(f"image {i}", 32, 48)] for i in range(batch)],
        "img_guidance_scale": 1.6,
    }


def _dream_lite() -> Any:
    return assemble(
        "dream_lite",
        diffusers.DreamLitePipeline,
        unet=network("DreamLiteUNetModel"),
        vae=lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        text_encoder=Reader,
        tokenizer=Words,
        processor=Words,
    )


def _dream_lite_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    assert batch == 1, "DreamLite makes one picture"
    return {**IMAGE, "prompt": "a small house", "guidance_scale": 3.5}


def _dream_lite_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_dream_lite_call(pipe, batch), "image": _pil("image", HEIGHT, WIDTH), "image_guidance_scale": 1.5}


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


def _ideogram4() -> Any:
    transformer = network("Ideogram4Transformer2DModel", llm_features_dim=13 * 8)  # 13 layers are read
    return assemble(
        "ideogram4",
        diffusers.Ideogram4Pipeline,
        transformer=transformer,
        unconditional_transformer=transformer,
        text_encoder=_language_model,
        tokenizer=Words,
        vae=None,  # a picture is then 16 times as large
        scheduler=flow_euler(),
    )


def _ideogram4_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = [f"Picture {i} of a small house" for i in range(batch)]
    sizes = {"height": 96, "width": 64, "max_sequence_length": 12}
    return {**IMAGE, **sizes, "prompt": prompts, "guidance_schedule": [4.0] * 4 + [2.0] * 2}


PIPELINES = (
    unet("kolors", lambda: _kolors(diffusers.KolorsPipeline), _kolors_call),
    unet("kolors_img2img", lambda: _kolors(diffusers.KolorsImg2ImgPipeline), _kolors_img2img_call, steps=3),
    unet("kolors_pag", _kolors_pag, _kolors_pag_call, guidance=PERTURBED),
    two_calls("hunyuan_image", lambda: _hunyuan_image(distilled=False), _hunyuan_image_call),
    plain("hunyuan_image_distilled", lambda: _hunyuan_image(distilled=True), _hunyuan_image_distilled_call),
    two_calls("hunyuan_image_refiner", _hunyuan_image_refiner, _hunyuan_image_refiner_call),
    one_batch("prx", _prx, _prx_call),
    two_calls("glm_image", _glm_image, _glm_image_call),
    two_calls("glm_image_edit", _glm_image, _glm_image_edit_call),
    one_batch("ernie_image", _ernie_image, _ernie_image_call),
    two_calls("nucleus_image", _nucleus_image, _nucleus_image_call),
    two_calls("joy_image", lambda: _joy_image("JoyImageEdit"), _joy_image_call),
    one_batch("joy_image_plus", lambda: _joy_image("JoyImageEditPlus"), _joy_image_plus_call),
    one_batch("omnigen", _omnigen, _omnigen_call),
    one_batch("omnigen_edit", _omnigen, _omnigen_edit_call, guidance=THREE),
    unet("dream_lite", _dream_lite, _dream_lite_call),
    unet("dream_lite_edit", _dream_lite, _dream_lite_edit_call, guidance=THREE),
    two_calls(
        "ideogram4",
        _ideogram4,
        _ideogram4_call,
        denoisers=("transformer", "unconditional_transformer"),
        guidance="separate, one network per branch",
    ),
)
