"""Transformers for video, J to Z."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from pipelines.parts import POOLED, TEXT, TOKENS, normal, picture, prompt, text
from torch import Tensor

from denoisers.tiny import TinyDenoiser


def _mask(batch: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """True at the words of a prompt, not at its padding."""
    return text(batch, mask="mask", dtype=dtype)["mask"]


def _with_unused_condition(x: Tensor, dim: int) -> Tensor:
    """What a model that can also continue a picture is given when there is none: zeros for it and for its mask."""
    return torch.cat([x, torch.zeros_like(x), torch.zeros_like(x.narrow(dim, 0, 1))], dim)


# --- Kandinsky -------------------------------------------------------------------------------------------------------

_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 12,
    "model_dim": 16,
    "ff_dim": 32,
    "num_visual_blocks": 3,
    "axes_dims": (4, 2, 2),
}
_KANDINSKY_TEXT: dict[str, Any] = {
    **_KANDINSKY,
    "in_text_dim": TEXT,
    "in_text_dim2": POOLED,
    "num_text_blocks": 2,
    "visual_cond": True,
}


def _kandinsky5(x: Tensor, t: Tensor) -> dict[str, object]:
    _, frames, height, width, _ = x.shape
    return {
        "hidden_states": _with_unused_condition(x, dim=-1),
        "encoder_hidden_states": prompt("prompt", len(x)),
        "pooled_projections": normal("pooled", POOLED, batch=len(x)),
        "timestep": t,
        "visual_rope_pos": [torch.arange(n) for n in (frames, height // 2, width // 2)],
        "text_rope_pos": torch.arange(TOKENS),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": False,
    }


_FRAMES, _HEIGHT, _WIDTH = 2, 4, 6


def _kandinsky6(x: Tensor, t: Tensor) -> dict[str, object]:
    """The state is the pixels of a video, one a row, and after them a sound; both have four channels."""
    pixels = _FRAMES * _HEIGHT * _WIDTH
    return {
        "hidden_states": _with_unused_condition(x[:, :pixels].unflatten(1, (_FRAMES, _HEIGHT, _WIDTH)), dim=-1),
        "audio_hidden_states": x[:, pixels:],
        "encoder_hidden_states": prompt("prompt", len(x)),
        "pooled_projections": normal("pooled", POOLED, batch=len(x)),
        "timestep": t,
        "visual_rope_pos": None,
        "encoder_attention_mask": _mask(len(x)),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _video_and_sound(output: tuple[Tensor, Tensor]) -> Tensor:
    video, sound = output
    return torch.cat([video.flatten(1, -2), sound], dim=1)


def _kandinsky6_sr(x: Tensor, t: Tensor) -> dict[str, object]:
    return {"hidden_states": _with_unused_condition(x, dim=-1), "timestep": t, "return_dict": False}


# --- MiniMax, Motif --------------------------------------------------------------------------------------------------


def _minimax_h3(x: Tensor, t: Tensor) -> dict[str, object]:
    """One sequence of text, sound and video; the state is the patches of a video, then a sound. Time rises to one."""
    patches = _FRAMES * (_HEIGHT // 2) * (_WIDTH // 2)
    sounds = x.shape[1] - patches
    text, sound, video = torch.arange(TOKENS + sounds + patches).split([TOKENS, sounds, patches])
    tags = torch.zeros(TOKENS + sounds + patches, dtype=torch.long)
    tags[text], tags[sound] = 1, 2
    positions = torch.zeros(len(tags), 3, dtype=torch.float64)
    positions[text, 0] = torch.arange(TOKENS, dtype=torch.float64)
    positions[sound, 0] = TOKENS + torch.arange(sounds, dtype=torch.float64) / 4
    positions[video] = torch.cartesian_prod(
        TOKENS + torch.arange(_FRAMES, dtype=torch.float64),
        torch.arange(_HEIGHT // 2, dtype=torch.float64),
        torch.arange(_WIDTH // 2, dtype=torch.float64),
    )
    noise = (t[0] / 1000).float()
    base = noise / (12 - 11 * noise)  # shifts of the two schedules: 12 for video, 3 for sound
    levels = (1 - noise).repeat(len(tags))
    levels[sound] = 1 - 3 * base / (1 + 2 * base)
    timestep, which = torch.unique(levels, sorted=True, return_inverse=True)
    return {
        "hidden_states": x[:, :patches],
        "audio_hidden_states": x[:, patches:],
        "encoder_hidden_states": prompt("prompt", len(x)),
        "timestep": timestep,
        "timestep_indices": which,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _motif_video(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": _with_unused_condition(x, dim=1),
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _mask(len(x)),
        "attention_kwargs": None,
        "return_dict": False,
    }


# --- Sana ------------------------------------------------------------------------------------------------------------


def _sana_video(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _mask(len(x), torch.long),
        "timestep": t,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _sana_wm(x: Tensor, t: Tensor) -> dict[str, object]:
    """A camera that moves; the first frame is given, so its time is zero."""
    batch, _, frames, height, width = x.shape
    timestep = t.float()[:, None, None].repeat(1, 1, frames)
    timestep[:, :, 0] = 0
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., :3, 3] = normal("camera", frames, 3, batch=batch)
    lens = x.new_tensor([width, height, width / 2, height / 2]).expand(batch, frames, 4)
    return {
        "hidden_states": x,
        "timestep": timestep,
        "encoder_hidden_states": prompt("prompt", batch)[:, None],
        "mask": _mask(batch, torch.long),
        "data_info": {"img_hw": torch.tensor([[32.0 * height, 32.0 * width]])},
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": normal("rays", 6, frames, height, width, batch=batch),
        "return_dict": False,
    }


def _refiner() -> diffusers.SanaWMLTX2RefinerTransformer3DModel:
    return diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        pos_embed_max_pos=8, base_height=64, base_width=64, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        audio_pos_embed_max_pos=8, num_layers=3, caption_channels=TEXT, rope_type="split",
    )  # fmt: skip


@functools.cache
def _refined_positions(batch: int, *frames: int) -> tuple[Tensor, Tensor]:
    rotations: tuple[Tensor, Tensor] = _refiner().build_rotary_emb_for_absolute_positions(
        batch, list(frames), _HEIGHT, _WIDTH, torch.device("cpu"), fps=16.0
    )
    return rotations


def _sana_wm_refiner(x: Tensor, t: Tensor) -> dict[str, object]:
    """Frames 2 and 3 of a video, that see its first frame and, refined before them, the second."""
    seen = diffusers.models.transformers.transformer_sana_wm_refiner.SanaWMRefinerKVCache(3)
    seen.sink_pe = _refined_positions(len(x), 0)
    for i in range(3):
        parts = (normal(f"seen {i} {part}", _HEIGHT * _WIDTH, 24, batch=len(x)) for part in range(4))
        sink_key, sink_value, key, value = parts
        seen.get(i).store_sink(sink_key, sink_value)
        seen.get(i).store_history(key, value)
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "timestep": t.float()[:, None].repeat(1, x.shape[1]),
        "video_rotary_emb": _refined_positions(len(x), 2, 3),
        "encoder_attention_mask": _mask(len(x), torch.long),
        "kv_cache": seen,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


# --- Wan and its relatives -------------------------------------------------------------------------------------------

_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}


def _skyreels_v2(x: Tensor, t: Tensor) -> dict[str, object]:
    """Every frame has a separate time; the times are equal if all frames are made at once."""
    return {
        "hidden_states": x,
        "timestep": t[:, None].repeat(1, x.shape[2]),
        "encoder_hidden_states": prompt("prompt", len(x)),
        "enable_diffusion_forcing": True,
        "fps": [1] * len(x),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_animate(x: Tensor, t: Tensor) -> dict[str, object]:
    """The first frame stands for the picture of the figure: it has no pose. Two frames have five faces."""
    batch, channels, frames, height, width = x.shape
    faces = torch.stack([picture(f"face {i}", 16, 16, batch=batch) for i in range(4 * (frames - 1) - 3)], dim=2)
    return {
        "hidden_states": torch.cat([x, normal("figure", channels + 4, frames, height, width, batch=batch)], dim=1),
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", batch),
        "encoder_hidden_states_image": normal("image", 5, 10, batch=batch),
        "pose_hidden_states": normal("pose", channels, frames - 1, height, width, batch=batch),
        "face_pixel_values": 2 * faces - 1,
        "motion_encode_batch_size": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _make_wan_animate_2() -> diffusers.WanAnimate2Transformer3DModel:
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=TOKENS, in_dim=12, dim=16, ffn_dim=32, freq_dim=16, text_dim=TEXT, out_dim=4, num_heads=2,
        num_layers=3,
    )  # fmt: skip
    # The model would compile the making of its mask, which needs a compiler on the machine and many seconds.
    with torch.compiler.set_stance("force_eager"):
        model.block_masks[2, 4] = model.create_mask(2, 4, torch.device("cpu"))
    return model


def _wan_animate_2(x: Tensor, t: Tensor) -> dict[str, object]:
    """Lists of samples. The keys and values of the driving video, two frames of 4 x 4, are there from a call before."""
    batch, channels, frames, height, width = x.shape
    driving = diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2KVCache(3)
    for i in range(3):
        driving.get(i).store(*(normal(f"driving {i} {part}", 8, 2, 8, batch=batch) for part in "kv"))
    return {
        "hidden_states": list(x),
        "timestep": t,
        "encoder_hidden_states": list(prompt("prompt", batch)),
        "encoder_hidden_states_image": normal("image", 3, 1280, batch=batch),
        "condition_latents": list(normal("figure", channels + 4, frames, height, width, batch=batch)),
        "kv_cache": driving,
        "kv_cache_mode": "cached",
        "seq_len": frames * (height // 2) * (width // 2),
        "reference_grid_sizes": torch.tensor([[frames - 1, height // 2, width // 2]] * batch),
        "origin_len": 5,
        "origin_area": [8 * height, 8 * width],
        "is_uncondtion": False,
        "return_dict": False,
    }


def _samples(output: tuple[list[Tensor]]) -> Tensor:
    return torch.stack(output[0])


def _wan_vace(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "control_hidden_states": normal("control", 6, *x.shape[2:], batch=len(x)),
        "control_hidden_states_scale": torch.ones(3),
        "attention_kwargs": None,
        "return_dict": False,
    }


DENOISERS = (
    TinyDenoiser(
        name="Kandinsky5Transformer3DModel",
        make=lambda: diffusers.Kandinsky5Transformer3DModel(**_KANDINSKY_TEXT),
        state=(_FRAMES, _HEIGHT, _WIDTH, 4),
        call=_kandinsky5,
    ),
    TinyDenoiser(
        name="Kandinsky6Transformer3DModel",
        make=lambda: diffusers.Kandinsky6Transformer3DModel(
            **_KANDINSKY_TEXT, in_audio_dim=4, out_audio_dim=4, model_dim_a=24, time_dim_a=8, ff_dim_a=20,
            ca_rope=True, cross_gates=True, fix_modulation=True, text_token_padding=True,
        ),
        state=(_FRAMES * _HEIGHT * _WIDTH + 7, 4),
        call=_kandinsky6,
        taken=_video_and_sound,
    ),
    TinyDenoiser(
        name="Kandinsky6SRTransformer3DModel",
        make=lambda: diffusers.Kandinsky6SRTransformer3DModel(**_KANDINSKY, nabla_window=(1, 1, 1)),
        state=(2, 8, 16, 4),
        call=_kandinsky6_sr,
    ),
    TinyDenoiser(
        name="MiniMaxH3Transformer3DModel",
        make=lambda: diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=8, hidden_size=12, num_layers=3, ffn_dim=24, in_channels=4,
            audio_in_channels=16, text_dim=TEXT, freq_dim=8, time_embed_hidden_dim=12, time_embed_dim=8,
            rope_freq_dim=1,
        ),
        state=(_FRAMES * (_HEIGHT // 2) * (_WIDTH // 2) + 5, 16),
        call=_minimax_h3,
        taken=lambda output: -_video_and_sound(output),  # it predicts the way to the clean sample
    ),
    TinyDenoiser(
        name="MotifVideoTransformer3DModel",
        make=lambda: diffusers.MotifVideoTransformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3,
            num_single_layers=5, num_decoder_layers=2, mlp_ratio=2.0, text_embed_dim=TEXT, rope_axes_dim=(4, 2, 2),
            enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
        ),
        state=(4, 2, 4, 6),
        call=_motif_video,
    ),
    TinyDenoiser(
        name="SanaVideoTransformer3DModel",
        make=lambda: diffusers.SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=TEXT,
            rope_max_seq_len=32,
        ),
        state=(4, 2, 4, 6),
        call=_sana_video,
    ),
    TinyDenoiser(
        name="SanaWMTransformer3DModel",
        make=lambda: diffusers.SanaWMTransformer3DModel(
            in_channels=4, num_layers=3, hidden_size=16, num_attention_heads=2, linear_head_dim=8, softmax_every_n=3,
            chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=3, caption_channels=TEXT,
        ),
        state=(4, 3, 3, 4),
        call=_sana_wm,
    ),
    TinyDenoiser(
        name="SanaWMLTX2RefinerTransformer3DModel",
        make=_refiner,
        state=(_FRAMES * _HEIGHT * _WIDTH, 4),
        call=_sana_wm_refiner,
    ),
    TinyDenoiser(
        name="SkyReelsV2Transformer3DModel",
        make=lambda: diffusers.SkyReelsV2Transformer3DModel(**_WAN, in_channels=4, num_layers=3),
        state=(4, 3, 4, 6),
        call=_skyreels_v2,
    ),
    TinyDenoiser(
        name="WanAnimateTransformer3DModel",
        make=lambda: diffusers.WanAnimateTransformer3DModel(
            **_WAN, in_channels=12, latent_channels=4, num_layers=6, image_dim=10, added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 6, "16": 4}, motion_encoder_size=16, motion_style_dim=8,
            motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        state=(4, 3, 4, 6),
        call=_wan_animate,
    ),
    TinyDenoiser(
        name="WanAnimate2Transformer3DModel",
        make=_make_wan_animate_2,
        state=(4, 3, 4, 4),
        call=_wan_animate_2,
        taken=_samples,
    ),
    TinyDenoiser(
        name="WanVACETransformer3DModel",
        make=lambda: diffusers.WanVACETransformer3DModel(
            **_WAN, in_channels=4, num_layers=4, vace_layers=[0, 2, 3], vace_in_channels=6
        ),
        state=(4, 2, 4, 6),
        call=_wan_vace,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {}
