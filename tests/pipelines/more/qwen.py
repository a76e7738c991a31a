"""More of Qwen-Image, Z-Image and other transformers for pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.flux import qwen_image_call
from pipelines.parts import HEIGHT, TEXT, WIDTH, assemble, flow_euler, picture
from pipelines.tiny import two_calls

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


class _Shrinking(diffusers.AutoencoderKLQwenImage):  # type: ignore[misc]
    """For pipelines that bring every picture to a million pixels: means over squares, for convolutions take seconds."""

    def _encode(self, x: Tensor) -> Tensor:
        means = nn.functional.avg_pool3d(x, (1, 64, 64))
        return torch.cat([means, means[:, :1], torch.full_like(means, -8.0), means[:, :1]], dim=1)


def _pil(tag: str) -> Any:
    return Image.fromarray((picture(tag, HEIGHT, WIDTH)[0].movedim(0, -1) * 255).byte().numpy())


def _upper_half() -> Tensor:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return mask


def _qwen(pipeline: type, *, huge: bool = False, over: dict[str, bool] | None = None, **parts: Any) -> Any:
    levels = 6 if huge else 1
    vae = _Shrinking if huge else diffusers.AutoencoderKLQwenImage
    return assemble(
        "qwen_image",
        pipeline,
        transformer=lambda: diffusers.QwenImageTransformer2DModel(num_layers=3, **_QWEN_SIZE, **(over or {})),
        vae=lambda: vae(dim_mult=[1] * (levels + 1), temperal_downsample=[False] * levels, **_QWEN_VAE),
        scheduler=flow_euler(use_dynamic_shifting=True, shift_terminal=0.02),
        **parts,
    )


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


PIPELINES = (
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
)
