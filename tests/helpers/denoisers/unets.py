"""U-Nets and their kin."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines.parts import POOLED, TEXT, TOKENS, normal, prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser, first_tensor

FRAMES, SIDE = 3, 8
CODES = 6  # of the codebook; one more token is the mask
UVIT = 16


def _mask(batch: int) -> Tensor:
    return (torch.arange(TOKENS) < TOKENS - 3).repeat(batch, 1)


def _sound(x: Tensor, t: Tensor) -> dict[str, object]:
    return {"sample": x, "timestep": t[0] / 1000}


def _clip(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "sample": x,
        "timestep": t[0],
        "encoder_hidden_states": prompt("prompt", len(x)),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def _animated(x: Tensor, t: Tensor) -> dict[str, object]:
    prompts = prompt("prompt", len(x)).repeat_interleave(FRAMES, dim=0)
    return {**_clip(x, t), "encoder_hidden_states": prompts, "added_cond_kwargs": None}


def _picture_to_clip(x: Tensor, t: Tensor) -> dict[str, object]:
    first = normal("image latents", 4, 1, SIDE, SIDE, batch=len(x))
    places = torch.stack([torch.full_like(first[:, :, 0], i / (FRAMES - 1)) for i in range(1, FRAMES)], dim=2)
    return {
        **_clip(x, t),
        "fps": torch.full((len(x),), 16),
        "image_latents": torch.cat([first, places], dim=2),
        "image_embeddings": normal("image", 1, TEXT, batch=len(x)),
    }


def _stable_video(x: Tensor, t: Tensor) -> dict[str, object]:
    image = normal("image latents", 1, 4, SIDE, SIDE, batch=len(x)).repeat(1, FRAMES, 1, 1, 1)
    return {
        "sample": torch.cat([x, image], dim=2),
        "timestep": t[0],
        "encoder_hidden_states": normal("image", 1, TEXT, batch=len(x)),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(len(x), 1),  # frames a second, motion, noise
        "return_dict": False,
    }


def _dream_lite(x: Tensor, t: Tensor) -> dict[str, object]:
    """The channels of the input picture follow those of the sample. Without an input picture they are zero."""
    image = normal("image latents", 4, SIDE, SIDE, batch=len(x))
    return {
        "sample": torch.cat([x, image], dim=3),
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _mask(len(x)),
        "added_cond_kwargs": {"time_ids": torch.tensor([[64.0, 48.0]]).repeat(len(x), 1)},
        "return_dict": False,
    }


def _left_half(output: Any) -> Tensor:
    return first_tensor(output)[..., :SIDE]


def _kandinsky3(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "sample": x,
        "timestep": t[0],
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _mask(len(x)),
        "return_dict": False,
    }


def _cascade(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "sample": x,
        "timestep_ratio": t / 1000,
        "clip_text_pooled": normal("pooled", 1, POOLED, batch=len(x)),
        "clip_text": prompt("prompt", len(x)),
        "clip_img": normal("image", 1, POOLED, batch=len(x)),
        "return_dict": False,
    }


def _masked_tokens(x: Tensor, t: Tensor) -> dict[str, object]:
    """The network sees tokens and no time: the noise is how many of them are masked. Here they are the largest of the
    state's channels, and masked are those whose place in a fixed order is below the time."""
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0)).view(1, SIDE, SIDE)
    masked = order < t.view(-1, 1, 1) / 1000 * SIDE * SIDE - 1
    return {
        "input_ids": torch.where(masked, CODES, x.argmax(dim=1)),
        "micro_conds": torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).repeat(len(x), 1),  # sizes, crop, beauty
        "pooled_text_emb": normal("pooled", POOLED, batch=len(x)),
        "encoder_hidden_states": prompt("prompt", len(x)),
        "cross_attention_kwargs": None,
    }


DENOISERS = (
    TinyDenoiser(
        name="UNet1DModel",
        make=lambda: diffusers.UNet1DModel(
            # Attention has a head for every 32 channels.
            sample_size=32, in_channels=2, out_channels=2, extra_in_channels=16, block_out_channels=(8, 32, 32),
        ),
        state=(2, 32),
        call=_sound,
    ),
    TinyDenoiser(
        name="UNet3DConditionModel",
        make=lambda: diffusers.UNet3DConditionModel(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT,
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=2,
        ),
        state=(4, FRAMES, SIDE, SIDE),
        call=_clip,
    ),
    TinyDenoiser(
        name="DreamLiteUNetModel",
        make=lambda: diffusers.DreamLiteUNetModel(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            transformer_layers_per_block=(1, 1, 2), attention_head_dim=2, use_linear_projection=True, ff_mult=2,
            encoder_hid_dim=TEXT, encoder_hid_dim_type="text_proj_rms", addition_embed_type="time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=16,
        ),
        state=(4, SIDE, SIDE),
        call=_dream_lite,
        taken=_left_half,
    ),
    TinyDenoiser(
        name="I2VGenXLUNet",
        make=lambda: diffusers.I2VGenXLUNet(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT,
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=2,
        ),
        state=(4, FRAMES, SIDE, SIDE),
        call=_picture_to_clip,
    ),
    TinyDenoiser(
        name="Kandinsky3UNet",
        make=lambda: diffusers.Kandinsky3UNet(
            time_embedding_dim=16, groups=2, attention_head_dim=4, layers_per_block=2,
            block_out_channels=(8, 8, 16, 16), cross_attention_dim=16, encoder_hid_dim=TEXT,
        ),
        state=(4, 2 * SIDE, 2 * SIDE),  # halved three times
        call=_kandinsky3,
    ),
    TinyDenoiser(
        name="UNetMotionModel",
        make=lambda: diffusers.UNetMotionModel(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT,
            down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=FRAMES,
        ),
        state=(4, FRAMES, SIDE, SIDE),
        call=_animated,
    ),
    TinyDenoiser(
        name="UNetSpatioTemporalConditionModel",
        make=lambda: diffusers.UNetSpatioTemporalConditionModel(
            # Channels are normalised in 32 groups. A group of one channel would lose the time, a constant added to it.
            block_out_channels=(64, 64), layers_per_block=1, cross_attention_dim=TEXT, num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        ),
        state=(FRAMES, 4, SIDE, SIDE),
        call=_stable_video,
    ),
    TinyDenoiser(
        name="StableCascadeUNet",
        make=lambda: diffusers.StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
            block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 2),
            up_num_layers_per_block=(2, 1), clip_text_in_channels=TEXT, clip_text_pooled_in_channels=POOLED,
            clip_image_in_channels=POOLED, switch_level=(False,),
        ),
        state=(4, SIDE, SIDE),
        call=_cascade,
    ),
    TinyDenoiser(
        name="UVit2DModel",
        make=lambda: diffusers.UVit2DModel(
            hidden_size=UVIT, cond_embed_dim=POOLED, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
            encoder_hidden_size=TEXT, vocab_size=CODES + 1, codebook_size=CODES, in_channels=UVIT,
            block_out_channels=UVIT, num_res_blocks=2, downsample=True, upsample=True, block_num_heads=2,
            num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        ),
        state=(CODES, SIDE, SIDE),
        call=_masked_tokens,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {
    "MotionAdapter": "It holds the weights of motion modules until a UNetMotionModel takes them, and computes nothing.",
}
