"""Wan in its many forms, and what was made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel

from pipelines.parts import STEPS, TEXT, VIDEO, assemble, network, normal, picture, text
from pipelines.tiny import one_batch, two_calls

HEIGHT, WIDTH = VIDEO["height"], VIDEO["width"]
SEEN = 10  # channels of an image embedding

_SIZE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
_SEES = {"image_dim": SEEN, "added_kv_proj_dim": 24}
_BESIDE = 4 + 4 + 4  # channels where a condition and its mask, of four frames each, follow the sample


def image_encoder() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=SEEN,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


class ImageProcessor:
    """Stands for the one of transformers, which would need torchvision: pictures in the size of `image_encoder`."""

    def __call__(self, images: Tensor | Image.Image | list[Tensor], **_: Any) -> BatchFeature:
        if isinstance(images, Image.Image):
            images = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] / 255
        pixels = torch.cat(images) if isinstance(images, list) else images
        return BatchFeature({"pixel_values": interpolate(pixels, (16, 16))})

    preprocess = __call__


def frames(tag: str, count: int, height: int = HEIGHT, width: int = WIDTH) -> list[Image.Image]:
    pixels = (picture(tag, height, width, count) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(frame) for frame in pixels]


def like(name: str, pipe: Any, pipeline: type, /, gain: float = 1.5, **over: dict[str, Any]) -> Any:
    """Another pipeline, of parts like those of this one; `over`: other settings, by part."""
    parts = {
        key: lambda part=part, key=key: type(part).from_config(part.config, **over.get(key, {}))
        for key, part in pipe.components.items()
        if part is not None
    }
    return assemble(name, pipeline, gain, **parts)


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 1.0],
    )


def flow_unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wan(pipeline: type, transformer: Callable[[], Any], **extra: Any) -> Any:
    return assemble("wan", pipeline, transformer=transformer, vae=wan_vae, scheduler=flow_unipc, **extra)


def _transformer(in_channels: int = 4, **over: Any) -> Callable[[], Any]:
    return lambda: diffusers.WanTransformer3DModel(**_SIZE, in_channels=in_channels, **over)


def _image_to_video() -> Any:
    return _wan(
        diffusers.WanImageToVideoPipeline,
        _transformer(_BESIDE, **_SEES),
        image_encoder=image_encoder,
        image_processor=ImageProcessor,
    )


def _first_and_last() -> Any:
    """Two pictures are embedded at once: the network knows which token is of which."""
    return _wan(
        diffusers.WanImageToVideoPipeline,
        _transformer(_BESIDE, **_SEES, pos_embed_seq_len=2 * 5),  # as many as a picture has tokens, twice
        image_encoder=image_encoder,
        image_processor=ImageProcessor,
    )


def _image_to_video_22() -> Any:
    transformer = _transformer(_BESIDE)
    return _wan(diffusers.WanImageToVideoPipeline, transformer, transformer_2=transformer, boundary_ratio=0.8)


def wan_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **VIDEO, "guidance_scale": 4.0}


def _image_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**wan_call(pipe, batch), "image": picture("image", HEIGHT, WIDTH)}


def _first_and_last_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_image_call(pipe, batch), "last_image": picture("last image", HEIGHT, WIDTH)}


def _video_to_video_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**wan_call(pipe, batch), "video": frames("video", VIDEO["num_frames"]), "strength": 0.7}
    del call["num_frames"]
    return call


def _lora() -> Any:
    """An adapter as a fresh one is not: its second matrices are no longer zero."""
    from peft import LoraConfig

    pipe = _wan(diffusers.WanPipeline, _transformer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * normal(name, *parameter.shape)[0])
    pipe.transformer.eval().requires_grad_(False)
    return pipe


def _vace() -> Any:
    network = lambda: diffusers.WanVACETransformer3DModel(  # noqa: E731
        **{**_SIZE, "num_layers": 4}, in_channels=4, vace_layers=[0, 2, 3], vace_in_channels=4 + 4 + 8 * 8
    )
    return _wan(diffusers.WanVACEPipeline, network)


def _vace_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """A part of every frame is to be changed, by the example of a picture."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    return {
        **wan_call(pipe, batch),
        "video": frames("video", VIDEO["num_frames"]),
        "mask": [mask] * VIDEO["num_frames"],
        "reference_images": frames("reference", 1),
    }


def _animate() -> Any:
    return _wan(
        diffusers.WanAnimatePipeline,
        network("WanAnimateTransformer3DModel"),
        image_encoder=image_encoder,
        image_processor=ImageProcessor,
    )


def _animate_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**_image_call(pipe, batch), "segment_frame_length": 9}
    count = call.pop("num_frames")
    return {**call, "pose_video": frames("pose", count), "face_video": frames("face", count, 16, 16)}


def _animate_long_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Two segments, each with a separate loop, one after the other."""
    return {**_animate_call(pipe, batch), "segment_frame_length": 5}


def sky_reels(pipeline: type, in_channels: int = 4, **over: Any) -> Any:
    sees = _SEES if over else {}
    network = lambda: diffusers.SkyReelsV2Transformer3DModel(**_SIZE, in_channels=in_channels, **sees)  # noqa: E731
    return assemble("sky_reels", pipeline, transformer=network, vae=wan_vae, scheduler=flow_unipc, **over)


def _sky_reels_image_to_video() -> Any:
    return sky_reels(
        diffusers.SkyReelsV2ImageToVideoPipeline,
        _BESIDE,
        image_encoder=image_encoder,
        image_processor=ImageProcessor,
    )


def _chrono_edit() -> Any:
    return assemble(
        "chrono_edit",
        diffusers.ChronoEditPipeline,
        transformer=network("ChronoEditTransformer3DModel", in_channels=_BESIDE),
        vae=wan_vae,
        image_encoder=image_encoder,
        image_processor=ImageProcessor,
        scheduler=flow_unipc,
    )


def _chrono_edit_reasoning_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """From the third step on only the first and the last frame remain."""
    return {**_image_call(pipe, batch), "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}


def _lucy_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**wan_call(pipe, batch), "video": [frames(f"video {i}", VIDEO["num_frames"]) for i in range(batch)]}


def _any_flow() -> Any:
    return assemble(
        "any_flow",
        diffusers.AnyFlowPipeline,
        transformer=network("AnyFlowTransformer3DModel"),
        vae=wan_vae,
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


PIPELINES = (
    two_calls("wan_image_to_video", _image_to_video, _image_call, modality="video"),
    two_calls("wan_first_and_last", _first_and_last, _first_and_last_call, modality="video"),
    two_calls(
        "wan22_image_to_video",
        _image_to_video_22,
        _image_call,
        denoisers=("transformer", "transformer_2"),
        modality="video",
    ),
    two_calls(
        "wan22_image_to_video_per_token",
        lambda: _wan(diffusers.WanImageToVideoPipeline, _transformer(), expand_timesteps=True),
        _image_call,
        modality="video",
    ),
    two_calls("wan_vace", _vace, _vace_call, modality="video"),
    two_calls(
        "wan_video_to_video",
        lambda: _wan(diffusers.WanVideoToVideoPipeline, _transformer()),
        _video_to_video_call,
        modality="video",
        steps=4,
    ),
    two_calls("wan_animate", _animate, _animate_call, modality="video"),
    two_calls("wan_animate_long", _animate, _animate_long_call, modality="video", steps=2 * STEPS),
    two_calls("wan_lora", _lora, wan_call, modality="video"),
    two_calls("sky_reels", lambda: sky_reels(diffusers.SkyReelsV2Pipeline), wan_call, modality="video"),
    two_calls("sky_reels_image_to_video", _sky_reels_image_to_video, _image_call, modality="video"),
    two_calls("chrono_edit", _chrono_edit, _image_call, modality="video"),
    two_calls("chrono_edit_reasoning", _chrono_edit, _chrono_edit_reasoning_call, modality="video"),
    two_calls(
        "lucy_edit",
        lambda: _wan(diffusers.LucyEditPipeline, _transformer(8), expand_timesteps=True),
        _lucy_call,
        modality="video",
    ),
    one_batch("any_flow", _any_flow, wan_call, modality="video"),
)
