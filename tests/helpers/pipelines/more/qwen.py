"""More of Qwen-Image and Z-Image, and a few that stand alone."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor, nn

from pipelines.flux import QWEN_IMAGE, QWEN_SIZE, QWEN_VAE, qwen_image_call
from pipelines.images import Z_IMAGE, z_image_call
from pipelines.more.flux import with_lora
from pipelines.parts import (
    CONTROL,
    HEIGHT,
    IMAGE,
    IMAGE_TO_IMAGE,
    INPAINT,
    LEFT_OUT,
    UNSIZED,
    WIDTH,
    Parts,
    called,
    flow_euler,
    image_vae,
    network,
    part,
    picture,
    upper_half,
    words,
)
from pipelines.tiny import one_batch, plain, two_calls


class _Shrinking(diffusers.AutoencoderKLQwenImage):
    """For pipelines that bring every picture to a million pixels: means over squares, for speed."""

    def _encode(self, x: Tensor) -> Tensor:
        means = nn.functional.avg_pool3d(x, (1, 64, 64))
        return torch.cat([means, means[:, :1], torch.full_like(means, -8.0), means[:, :1]], dim=1)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        return DecoderOutput(sample=z[:, :3])


_QWEN_CONTROLNET = part("QwenImageControlNetModel", num_layers=2, extra_condition_channels=0, **QWEN_SIZE)


def _pil(tag: str) -> Any:
    return Image.fromarray((picture(tag, HEIGHT, WIDTH)[0].movedim(0, -1) * 255).byte().numpy())


def _shrinking() -> Any:
    return _Shrinking(dim_mult=[1] * 7, temperal_downsample=[False] * 6, **QWEN_VAE)


class _Words(nn.Module):
    """Stands for a text encoder that is asked for nothing but its type and place."""

    dtype, device = torch.float32, torch.device("cpu")


class _Places:
    """Stands for the processor of Qwen-Image 2.1, which is asked at once how long its template is."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, _text: str) -> list[int]:
        return [1]


QWEN_21 = Parts(
    "qwen_image_21",
    {
        "transformer": network("QwenImage21Transformer2DModel"),
        "vae": part(
            "AutoencoderKLQwenImage21",
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            latents_mean=[0.1] * 8,
            latents_std=[1.1] * 8,
        ),
        "processor": _Places,
        "scheduler": flow_euler(use_dynamic_shifting=True),
    },
)
qwen_21_call = called(qwen_image_call, height=96, width=64, use_kv_cache=False)


def _like_flux(name: str, kind: str) -> Parts:
    parts = {"transformer": network(kind), "vae": image_vae(), "scheduler": flow_euler(use_dynamic_shifting=True)}
    return Parts(name, parts)


def _krea2_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**qwen_image_call(pipe, batch), "guidance_scale": 3.0}
    del call["true_cfg_scale"]
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        call[key] = torch.stack([call[key], -call[key], call[key].roll(1, 1)], dim=2)  # of three layers
        call[key + "_mask"] = call[key + "_mask"].bool()
    return call


def _z_image_control(channels: int) -> Any:
    return part(
        "ZImageControlNetModel",
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


def _seen() -> Any:
    """Return a network that sees pictures."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=8
    )
    return Siglip2VisionModel(config)


def _seen_as() -> Any:
    from transformers import Siglip2ImageProcessor

    return Siglip2ImageProcessor(patch_size=8, max_num_patches=16)


def _halved(pipe: Any) -> Any:
    pipe.vae.to(torch.bfloat16)  # the pipeline gives it such pictures
    return pipe


def _z_image_omni_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    pixels = picture("reference", 64, 64)[0].movedim(0, -1) * 255
    call = {**z_image_call(pipe, batch), "image": [Image.fromarray(pixels.byte().numpy())]}
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        call[key] = [[row[:4], row[4:6], row[6:]] for row in call[key]]  # before the picture, between, after
    return call


_PICTURE = {"image": lambda _batch: _pil("image")}
_Z_IMAGE = Z_IMAGE.within("ZImagePipeline")
_LORAS = (
    two_calls(
        "qwen_lora",
        QWEN_IMAGE.within("QwenImagePipeline", then=lambda pipe: with_lora(pipe, "add_q_proj")),
        qwen_image_call,
    ),
    one_batch("z_image_lora", Z_IMAGE.within("ZImagePipeline", then=lambda pipe: with_lora(pipe, "w1")), z_image_call),
)

PIPELINES = (
    two_calls(
        "qwen_two_pictures", QWEN_IMAGE.within("QwenImagePipeline"), called(qwen_image_call, num_images_per_prompt=2)
    ),
    # Without guidance, and without padding, so that there is no mask.
    plain("qwen_lightning", QWEN_IMAGE.within("QwenImagePipeline"), called(words(negative=False), IMAGE)),
    two_calls(
        "qwen_controlnet",
        QWEN_IMAGE.within("QwenImageControlNetPipeline", controlnet=_QWEN_CONTROLNET),
        called(qwen_image_call, CONTROL),
    ),
    two_calls(
        "qwen_controlnet_inpaint",
        QWEN_IMAGE.within(
            "QwenImageControlNetInpaintPipeline", controlnet=_QWEN_CONTROLNET.but(extra_condition_channels=4)
        ),
        called(qwen_image_call, CONTROL, control_mask=upper_half),
    ),
    two_calls(
        "qwen_img2img", QWEN_IMAGE.within("QwenImageImg2ImgPipeline"), called(qwen_image_call, IMAGE_TO_IMAGE), steps=4
    ),
    two_calls("qwen_inpaint", QWEN_IMAGE.within("QwenImageInpaintPipeline"), called(qwen_image_call, INPAINT), steps=4),
    two_calls(
        "qwen_edit",
        QWEN_IMAGE.within("QwenImageEditPipeline", vae=_shrinking),
        called(qwen_image_call, _PICTURE, height=512, width=384),
    ),
    two_calls(
        "qwen_edit_plus",
        QWEN_IMAGE.within("QwenImageEditPlusPipeline", vae=_shrinking, transformer={"zero_cond_t": True}),
        called(
            qwen_image_call,
            image=lambda _batch: [_pil("image"), _pil("another image")],
            height=512,
            width=384,
        ),
    ),
    two_calls(
        "qwen_edit_inpaint",
        QWEN_IMAGE.within("QwenImageEditInpaintPipeline", vae=_shrinking),
        called(qwen_image_call, INPAINT, _PICTURE, UNSIZED),
        steps=4,
    ),
    two_calls(
        "qwen_layered",
        QWEN_IMAGE.within(
            "QwenImageLayeredPipeline",
            vae=_shrinking,
            transformer={"use_additional_t_cond": True, "use_layer3d_rope": True},
            text_encoder=_Words,
        ),
        called(
            qwen_image_call,
            _PICTURE,
            UNSIZED,
            layers=2,
            resolution=640,
            prompt=lambda batch: ["its embeddings are given"] * batch,  # else a caption is made
            output_type="np",  # it stumbles over "latent"
        ),
    ),
    two_calls("qwen_21", QWEN_21.within("QwenImage21Pipeline"), qwen_21_call),
    two_calls(
        "krea2",
        QWEN_IMAGE.within("Krea2Pipeline", transformer=network("Krea2Transformer2DModel")),
        _krea2_call,
    ),
    two_calls(
        "ovis_image",
        _like_flux("ovis_image", "OvisImageTransformer2DModel").within("OvisImagePipeline"),
        called(words(), IMAGE, negative_prompt=None, guidance_scale=4.0),
    ),
    one_batch(
        "bria",
        _like_flux("bria", "BriaTransformer2DModel").within("BriaPipeline"),
        called(words(), IMAGE, guidance_scale=4.0),
    ),
    plain("z_image_turbo", _Z_IMAGE, called(z_image_call, guidance_scale=0.0)),
    one_batch(
        "z_image_truncated",
        _Z_IMAGE,
        called(z_image_call, cfg_truncation=0.4, cfg_normalization=True),
        guidance="batched, at the first steps alone",
    ),
    one_batch(
        "z_image_img2img", Z_IMAGE.within("ZImageImg2ImgPipeline"), called(z_image_call, IMAGE_TO_IMAGE), steps=4
    ),
    one_batch("z_image_inpaint", Z_IMAGE.within("ZImageInpaintPipeline"), called(z_image_call, INPAINT), steps=4),
    one_batch(
        "z_image_controlnet",
        Z_IMAGE.within("ZImageControlNetPipeline", controlnet=_z_image_control(4)),
        called(z_image_call, CONTROL),
    ),
    one_batch(
        "z_image_controlnet_inpaint",
        Z_IMAGE.within("ZImageControlNetInpaintPipeline", controlnet=_z_image_control(9)),
        called(z_image_call, INPAINT, CONTROL, mask_image=upper_half, strength=LEFT_OUT),
    ),
    one_batch(
        "z_image_omni",
        # Two conditions: the latents of a picture, and what another network sees in it.
        Z_IMAGE.within(
            "ZImageOmniPipeline",
            transformer={"siglip_feat_dim": 16},
            siglip=_seen,
            siglip_processor=_seen_as,
            then=_halved,
        ),
        _z_image_omni_call,
    ),
    *_LORAS,
)
