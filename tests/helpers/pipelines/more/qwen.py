"""More of Qwen-Image and Z-Image, and a few that stand alone."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor, nn

from pipelines.flux import qwen_image_call
from pipelines.more.flux import with_lora
from pipelines.parts import HEIGHT, IMAGE, TEXT, WIDTH, assemble, flow_euler, image_vae, network, picture, prompt, text
from pipelines.tiny import one_batch, plain, two_calls

_QWEN_SIZE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (8, 4, 4),
}
_QWEN_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.2, 1.0],
}


class _Shrinking(diffusers.AutoencoderKLQwenImage):
    """For pipelines that bring every picture to a million pixels: means over squares, for speed."""

    def _encode(self, x: Tensor) -> Tensor:
        means = nn.functional.avg_pool3d(x, (1, 64, 64))
        return torch.cat([means, means[:, :1], torch.full_like(means, -8.0), means[:, :1]], dim=1)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        return DecoderOutput(sample=z[:, :3])


def _pil(tag: str) -> Any:
    return Image.fromarray((picture(tag, HEIGHT, WIDTH)[0].movedim(0, -1) * 255).byte().numpy())


def _upper_half() -> Tensor:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return mask


def _qwen(pipeline: type, *, huge: bool = False, over: dict[str, bool] | None = None, **parts: Any) -> Any:
    levels = 6 if huge else 1
    vae: Any = _Shrinking if huge else diffusers.AutoencoderKLQwenImage
    size = {"num_layers": 3, **_QWEN_SIZE, **(over or {})}
    return assemble(
        "qwen_image",
        pipeline,
        transformer=parts.pop("transformer", lambda: diffusers.QwenImageTransformer2DModel(**size)),
        vae=lambda: vae(dim_mult=[1] * (levels + 1), temperal_downsample=[False] * levels, **_QWEN_VAE),
        scheduler=flow_euler(use_dynamic_shifting=True, shift_terminal=0.02),
        **parts,
    )


def _qwen_lightning_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Without guidance, and without padding, so that there is no mask."""
    return {**text(batch, negative=False), **IMAGE}


def _qwen_two_pictures_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_image_call(pipe, batch), "num_images_per_prompt": 2}


def _qwen_controlnet(pipeline: type, extra: int = 0) -> Any:
    return _qwen(
        pipeline,
        controlnet=lambda: diffusers.QwenImageControlNetModel(
            num_layers=2, extra_condition_channels=extra, **_QWEN_SIZE
        ),
    )


def _qwen_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_image_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def _qwen_controlnet_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_qwen_controlnet_call(pipe, batch), "control_mask": _upper_half().repeat(batch, 1, 1, 1)}


def _qwen_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_image_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _qwen_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_qwen_img2img_call(pipe, batch), "mask_image": _upper_half()}


def _qwen_edit_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_image_call(pipe, batch), "image": _pil("image"), "height": 512, "width": 384}


def _qwen_edit_plus_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_qwen_edit_call(pipe, batch), "image": [_pil("image"), _pil("another image")]}


def _qwen_edit_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**qwen_image_call(pipe, batch), "image": _pil("image"), "mask_image": _upper_half(), "strength": 0.6}
    return {key: value for key, value in call.items() if key not in ("height", "width")}


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


def _qwen_layered() -> Any:
    over = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    return _qwen(diffusers.QwenImageLayeredPipeline, huge=True, over=over, text_encoder=_Words)


def _qwen_layered_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**qwen_image_call(pipe, batch), "image": _pil("image"), "layers": 2, "resolution": 640}
    call["prompt"] = ["its embeddings are given"] * batch  # else a caption is made
    call["output_type"] = "np"  # it stumbles over "latent"
    return {key: value for key, value in call.items() if key not in ("height", "width")}


def qwen_21() -> Any:
    return assemble(
        "qwen_image_21",
        diffusers.QwenImage21Pipeline,
        transformer=network("QwenImage21Transformer2DModel"),
        vae=lambda: diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            latents_mean=[0.1] * 8,
            latents_std=[1.1] * 8,
        ),
        processor=_Places,
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def qwen_21_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**qwen_image_call(pipe, batch), "height": 96, "width": 64, "use_kv_cache": False}


def _krea2() -> Any:
    return _qwen(diffusers.Krea2Pipeline, transformer=network("Krea2Transformer2DModel"))


def _krea2_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**qwen_image_call(pipe, batch), "guidance_scale": 3.0}
    del call["true_cfg_scale"]
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        call[key] = torch.stack([call[key], -call[key], call[key].roll(1, 1)], dim=2)  # of three layers
        call[key + "_mask"] = call[key + "_mask"].bool()
    return call


def _ovis() -> Any:
    return assemble(
        "ovis_image",
        diffusers.OvisImagePipeline,
        transformer=network("OvisImageTransformer2DModel"),
        vae=image_vae(),
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _ovis_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "negative_prompt": None, "guidance_scale": 4.0}


def _bria() -> Any:
    return assemble(
        "bria",
        diffusers.BriaPipeline,
        transformer=network("BriaTransformer2DModel"),
        vae=image_vae(),
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _bria_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **IMAGE, "guidance_scale": 4.0}


_Z_SIZE: dict[str, Any] = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def _z_image(pipeline: type, *, over: dict[str, Any] | None = None, **parts: Any) -> Any:
    sizes = {**_Z_SIZE, "n_layers": 2, "in_channels": 4, "cap_feat_dim": TEXT, **(over or {})}
    return assemble(
        "z_image",
        pipeline,
        transformer=lambda: diffusers.ZImageTransformer2DModel(axes_dims=[8, 4, 4], axes_lens=[128, 32, 32], **sizes),
        vae=image_vae(),
        scheduler=flow_euler(shift=3.0, use_dynamic_shifting=True),
        **parts,
    )


def _z_image_controlnet(pipeline: type, channels: int) -> Any:
    return _z_image(
        pipeline,
        controlnet=lambda: diffusers.ZImageControlNetModel(
            control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels, **_Z_SIZE
        ),
    )


def _z_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    negative = list(prompt("negative", batch)[:, 3:])  # shorter: samples have different lengths
    call = {"prompt_embeds": list(prompt("prompt", batch)), "negative_prompt_embeds": negative}
    return {**call, **IMAGE, "guidance_scale": 3.0}


def _z_image_turbo_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_z_image_call(pipe, batch), "guidance_scale": 0.0}


def _z_image_truncated_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_z_image_call(pipe, batch), "cfg_truncation": 0.4, "cfg_normalization": True}


def _z_image_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_z_image_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _z_image_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_z_image_img2img_call(pipe, batch), "mask_image": _upper_half()}


def _z_image_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_z_image_call(pipe, batch), "control_image": picture("control", HEIGHT, WIDTH, batch)}


def _z_image_controlnet_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    mask = _upper_half().repeat(batch, 1, 1, 1)
    images = {"image": picture("image", HEIGHT, WIDTH, batch), "mask_image": mask}
    return {**_z_image_controlnet_call(pipe, batch), **images}


def _z_image_omni() -> Any:
    """Two conditions: the latents of a picture, and what another network sees in it."""
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    seen = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=8
    )
    pipe = _z_image(
        diffusers.ZImageOmniPipeline,
        over={"siglip_feat_dim": 16},
        siglip=lambda: Siglip2VisionModel(seen),
        siglip_processor=lambda: Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    )
    pipe.vae.to(torch.bfloat16)  # the pipeline gives it such pictures
    return pipe


def _z_image_omni_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    pixels = picture("reference", 64, 64)[0].movedim(0, -1) * 255
    call = {**_z_image_call(pipe, batch), "image": [Image.fromarray(pixels.byte().numpy())]}
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        call[key] = [[row[:4], row[4:6], row[6:]] for row in call[key]]  # before the picture, between, after
    return call


_LORAS = (
    two_calls("qwen_lora", lambda: with_lora(_qwen(diffusers.QwenImagePipeline), "add_q_proj"), qwen_image_call),
    one_batch("z_image_lora", lambda: with_lora(_z_image(diffusers.ZImagePipeline), "w1"), _z_image_call),
)

PIPELINES = (
    two_calls("qwen_two_pictures", lambda: _qwen(diffusers.QwenImagePipeline), _qwen_two_pictures_call),
    plain("qwen_lightning", lambda: _qwen(diffusers.QwenImagePipeline), _qwen_lightning_call),
    two_calls(
        "qwen_controlnet", lambda: _qwen_controlnet(diffusers.QwenImageControlNetPipeline), _qwen_controlnet_call
    ),
    two_calls(
        "qwen_controlnet_inpaint",
        lambda: _qwen_controlnet(diffusers.QwenImageControlNetInpaintPipeline, extra=4),
        _qwen_controlnet_inpaint_call,
    ),
    two_calls("qwen_img2img", lambda: _qwen(diffusers.QwenImageImg2ImgPipeline), _qwen_img2img_call, steps=4),
    two_calls("qwen_inpaint", lambda: _qwen(diffusers.QwenImageInpaintPipeline), _qwen_inpaint_call, steps=4),
    two_calls("qwen_edit", lambda: _qwen(diffusers.QwenImageEditPipeline, huge=True), _qwen_edit_call),
    two_calls(
        "qwen_edit_plus",
        lambda: _qwen(diffusers.QwenImageEditPlusPipeline, huge=True, over={"zero_cond_t": True}),
        _qwen_edit_plus_call,
    ),
    two_calls(
        "qwen_edit_inpaint",
        lambda: _qwen(diffusers.QwenImageEditInpaintPipeline, huge=True),
        _qwen_edit_inpaint_call,
        steps=4,
    ),
    two_calls("qwen_layered", _qwen_layered, _qwen_layered_call),
    two_calls("qwen_21", qwen_21, qwen_21_call),
    two_calls("krea2", _krea2, _krea2_call),
    two_calls("ovis_image", _ovis, _ovis_call),
    one_batch("bria", _bria, _bria_call),
    plain("z_image_turbo", lambda: _z_image(diffusers.ZImagePipeline), _z_image_turbo_call),
    one_batch(
        "z_image_truncated",
        lambda: _z_image(diffusers.ZImagePipeline),
        _z_image_truncated_call,
        guidance="batched, at the first steps alone",
    ),
    one_batch("z_image_img2img", lambda: _z_image(diffusers.ZImageImg2ImgPipeline), _z_image_img2img_call, steps=4),
    one_batch("z_image_inpaint", lambda: _z_image(diffusers.ZImageInpaintPipeline), _z_image_inpaint_call, steps=4),
    one_batch(
        "z_image_controlnet",
        lambda: _z_image_controlnet(diffusers.ZImageControlNetPipeline, 4),
        _z_image_controlnet_call,
    ),
    one_batch(
        "z_image_controlnet_inpaint",
        lambda: _z_image_controlnet(diffusers.ZImageControlNetInpaintPipeline, 9),
        _z_image_controlnet_inpaint_call,
    ),
    one_batch("z_image_omni", _z_image_omni, _z_image_omni_call),
    *_LORAS,
)
