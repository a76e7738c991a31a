"""Wan in its many forms, and what was made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel

from pipelines.parts import LEFT_OUT, STEPS, VIDEO, Parts, called, network, normal, part, picture
from pipelines.tiny import video_one_batch, video_two_calls
from pipelines.videos import WAN, flow_unipc, wan_call, wan_network, wan_vae

HEIGHT, WIDTH = VIDEO["height"], VIDEO["width"]
SEEN = 10  # channels of an image embedding

_SEES = {"image_dim": SEEN, "added_kv_proj_dim": 24}
_BESIDE = {"in_channels": 4 + 4 + 4}  # a condition and its mask, of four frames each, follow the sample


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


def _with_lora(pipe: Any) -> Any:
    """An adapter as a fresh one is not: its second matrices are no longer zero."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * normal(name, *parameter.shape)[0])
    pipe.transformer.eval().requires_grad_(False)
    return pipe


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


# What some pipelines see a picture by.
VISION = {"image_encoder": image_encoder, "image_processor": ImageProcessor}


def one_picture(tag: str, height: int = HEIGHT, width: int = WIDTH) -> Any:
    """The same for all samples."""
    return lambda _batch: picture(tag, height, width)


def film(tag: str, count: int = VIDEO["num_frames"]) -> Any:
    """The same for all samples."""
    return lambda _batch: frames(tag, count)


_TWO = ("transformer", "transformer_2")
_image_call = called(wan_call, image=one_picture("image"))
_image_to_video = WAN.within("WanImageToVideoPipeline", transformer={**_BESIDE, **_SEES}, **VISION)
_animate = WAN.within("WanAnimatePipeline", transformer=network("WanAnimateTransformer3DModel"), **VISION)
_animate_call = called(
    _image_call,
    segment_frame_length=9,
    num_frames=LEFT_OUT,
    pose_video=film("pose"),
    face_video=lambda _batch: frames("face", VIDEO["num_frames"], 16, 16),
)
_VACE = part(
    "WanVACETransformer3DModel",
    **{**wan_network.settings, "num_layers": 4},
    vace_layers=[0, 2, 3],
    vace_in_channels=4 + 4 + 8 * 8,
)
SKY_REELS = Parts(
    "sky_reels",
    {
        "transformer": part("SkyReelsV2Transformer3DModel", **wan_network.settings),
        "vae": wan_vae,
        "scheduler": flow_unipc,
    },
)
_CHRONO_EDIT = Parts(
    "chrono_edit",
    {
        "transformer": network("ChronoEditTransformer3DModel", **_BESIDE),
        "vae": wan_vae,
        "scheduler": flow_unipc,
        **VISION,
    },
)
ANY_FLOW = Parts(
    "any_flow",
    {
        "transformer": network("AnyFlowTransformer3DModel"),
        "vae": wan_vae,
        "scheduler": part("FlowMapEulerDiscreteScheduler", shift=5.0),
    },
)

PIPELINES = (
    video_two_calls("wan_image_to_video", _image_to_video, _image_call),
    video_two_calls(
        "wan_first_and_last",
        # Two pictures are embedded at once: the network knows which token is of which.
        WAN.within(
            "WanImageToVideoPipeline",
            transformer={**_BESIDE, **_SEES, "pos_embed_seq_len": 2 * 5},  # as many as a picture has tokens, twice
            **VISION,
        ),
        called(_image_call, last_image=one_picture("last image")),
    ),
    video_two_calls(
        "wan22_image_to_video",
        WAN.within(
            "WanImageToVideoPipeline",
            transformer=_BESIDE,
            transformer_2=wan_network.but(**_BESIDE),
            boundary_ratio=0.8,
        ),
        _image_call,
        denoisers=_TWO,
    ),
    video_two_calls(
        "wan22_image_to_video_per_token", WAN.within("WanImageToVideoPipeline", expand_timesteps=True), _image_call
    ),
    video_two_calls("wan_vace", WAN.within("WanVACEPipeline", transformer=_VACE), _vace_call),
    video_two_calls(
        "wan_video_to_video",
        WAN.within("WanVideoToVideoPipeline"),
        called(wan_call, video=film("video"), strength=0.7, num_frames=LEFT_OUT),
        steps=4,
    ),
    video_two_calls("wan_animate", _animate, _animate_call),
    # Two segments, each with a separate loop, one after the other.
    video_two_calls("wan_animate_long", _animate, called(_animate_call, segment_frame_length=5), steps=2 * STEPS),
    video_two_calls("wan_lora", WAN.within("WanPipeline", then=_with_lora), wan_call),
    video_two_calls("sky_reels", SKY_REELS.within("SkyReelsV2Pipeline"), wan_call),
    video_two_calls(
        "sky_reels_image_to_video",
        SKY_REELS.within("SkyReelsV2ImageToVideoPipeline", transformer={**_BESIDE, **_SEES}, **VISION),
        _image_call,
    ),
    video_two_calls("chrono_edit", _CHRONO_EDIT.within("ChronoEditPipeline"), _image_call),
    video_two_calls(
        "chrono_edit_reasoning",
        _CHRONO_EDIT.within("ChronoEditPipeline"),
        # From the third step on only the first and the last frame remain.
        called(_image_call, enable_temporal_reasoning=True, num_temporal_reasoning_steps=2),
    ),
    video_two_calls(
        "lucy_edit",
        WAN.within("LucyEditPipeline", transformer={"in_channels": 8}, expand_timesteps=True),
        called(wan_call, video=lambda batch: [frames(f"video {i}", VIDEO["num_frames"]) for i in range(batch)]),
    ),
    video_one_batch("any_flow", ANY_FLOW.within("AnyFlowPipeline"), wan_call),
)
