"""Transformers for video, A to I."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from pipelines.parts import POOLED, STEPS, TEXT, TOKENS, normal, prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser

FRAMES, HEIGHT, WIDTH = 3, 8, 6
IMAGE = 10  # channels of an image embedding


def _mask(batch: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """1 where a prompt has a token; the last three positions are padding."""
    return (torch.arange(TOKENS) < TOKENS - 3).to(dtype).repeat(batch, 1)


def _consisid(x: Tensor, t: Tensor) -> dict[str, object]:
    batch, frames, _, height, width = x.shape
    grid = (height // 2, width // 2)
    return {
        "hidden_states": torch.cat([x, normal("image latents", *x.shape[1:], batch=batch)], dim=2),
        "encoder_hidden_states": prompt("prompt", batch),
        "timestep": t,
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, frames),
        "attention_kwargs": None,
        "id_cond": normal("face", 6, batch=batch),
        "id_vit_hidden": [normal(f"face at scale {scale}", 5, 8, batch=batch) for scale in range(2)],
        "return_dict": False,
    }


def _latte(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "timestep": t,
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _without_variance(output: tuple[Tensor, ...]) -> Tensor:
    return output[0].chunk(2, dim=1)[0]


def _allegro(x: Tensor, t: Tensor) -> dict[str, object]:
    batch, _, frames, height, width = x.shape
    grid = (height // 2, width // 2)
    *frequencies, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), grid), grid, frames)
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", batch).unsqueeze(1),
        "encoder_attention_mask": _mask(batch),
        "timestep": t,
        "image_rotary_emb": (tuple(frequencies), tuple(places.T.unsqueeze(1).contiguous())),
        "return_dict": False,
    }


def _anyflow(x: Tensor, t: Tensor) -> dict[str, object]:
    times = t[:, None].repeat(1, x.shape[1])
    return {
        "hidden_states": x,
        "timestep": times,
        "r_timestep": (times - 1000 / STEPS).clamp(min=0),  # where the step leads to
        "encoder_hidden_states": prompt("prompt", len(x)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _anyflow_far(x: Tensor, t: Tensor) -> dict[str, object]:
    """The third chunk of a video: the first is remembered at a quarter of its tokens, the second in full."""
    tokens = x.shape[-2] * x.shape[-1] // 4

    def remembered(tag: str, length: int) -> Tensor:
        return normal(tag, 2, 2, length, 8, batch=len(x)).transpose(0, 1)

    return {
        **_anyflow(x, t),
        "chunk_partition": [1, 1, x.shape[1]],
        "kv_cache": {
            layer: {
                "full_cache": remembered(f"full {layer}", tokens),
                "compressed_cache": remembered(f"compressed {layer}", tokens // 4),
            }
            for layer in range(3)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def _chronoedit(x: Tensor, t: Tensor) -> dict[str, object]:
    batch, channels, *size = x.shape
    return {
        "hidden_states": torch.cat([x, normal("mask and image latents", channels + 1, *size, batch=batch)], dim=1),
        "timestep": t,
        "encoder_hidden_states": normal("prompt", 512, TEXT, batch=batch),  # the length is fixed in its attention
        "encoder_hidden_states_image": normal("image", 5, IMAGE, batch=batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cosmos(x: Tensor, t: Tensor) -> dict[str, object]:
    """A video that begins with a given frame, as of version 2.5."""
    batch, _, frames, height, width = x.shape
    given = (torch.arange(frames) < 1).to(x.dtype).view(1, 1, frames, 1, 1).repeat(batch, 1, 1, 1, 1)
    return {
        "hidden_states": given * normal("video", *x.shape[1:], batch=batch) + (1 - given) * x,
        "condition_mask": given.repeat(1, 1, 1, height, width),
        "timestep": given * 0.1 + (1 - given) * t.view(batch, 1, 1, 1, 1) / 1000,
        "encoder_hidden_states": prompt("prompt", batch),
        "return_dict": False,
    }


def _cosmos3(x: Tensor, t: Tensor) -> dict[str, object]:
    """One packed sequence: the text, then the patches of every video. The pipeline packs a single video; several see
    each other, for attention knows of no borders in the sequence."""
    batch, _, frames, height, width = x.shape
    shape = (frames, height // 2, width // 2)
    patches = shape[0] * shape[1] * shape[2]
    text = torch.arange(TOKENS)
    places = torch.cartesian_prod(*(torch.arange(length) for length in shape)).T
    places[0] += TOKENS + 100
    vision = torch.arange(TOKENS, TOKENS + batch * patches)
    return {
        "input_ids": text * 7 % 32,
        "text_indexes": text,
        "position_ids": torch.cat([text.expand(3, -1), places.repeat(1, batch)], dim=1),
        "und_len": TOKENS,
        "sequence_length": TOKENS + batch * patches,
        "vision_tokens": list(x.unsqueeze(1)),
        "vision_token_shapes": [shape] * batch,
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": t.repeat_interleave(patches),
        "vision_noisy_frame_indexes": [torch.arange(frames)] * batch,
        "return_dict": False,
    }


def _all_videos(output: tuple[list[Tensor], ...]) -> Tensor:
    return torch.cat(output[0])


def _easyanimate(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "return_dict": False,
    }


def _helios(x: Tensor, t: Tensor) -> dict[str, object]:
    """A section of a long video, with what came before it at three resolutions."""
    batch, channels, frames, *size = x.shape
    first, long, mid, last, now = torch.arange(1 + 4 + 2 + 1 + frames)[None].split([1, 4, 2, 1, frames], dim=1)
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", batch),
        "indices_hidden_states": now,
        "indices_latents_history_short": torch.cat([first, last], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": normal("short history", channels, 2, *size, batch=batch),
        "latents_history_mid": normal("mid history", channels, 2, *size, batch=batch),
        "latents_history_long": normal("long history", channels, 4, *size, batch=batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan_video15(x: Tensor, t: Tensor) -> dict[str, object]:
    """From text alone: the latents, the mask and the embedding of the first picture are zero."""
    batch = len(x)
    return {
        "hidden_states": torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1),
        "image_embeds": x.new_zeros(batch, 5, IMAGE),
        "timestep": t,
        "attention_kwargs": None,
        "encoder_hidden_states": prompt("prompt", batch),
        "encoder_attention_mask": _mask(batch),
        "encoder_hidden_states_2": normal("glyphs", 4, POOLED, batch=batch),
        "encoder_attention_mask_2": torch.tensor([1, 1, 1, 0]).repeat(batch, 1),
        "return_dict": False,
    }


def _framepack(x: Tensor, t: Tensor) -> dict[str, object]:
    """A section of a long video; what follows it is known, at three resolutions."""
    batch, channels, frames, *size = x.shape
    first, _, now, next_, mid, far = torch.arange(1 + 3 + frames + 1 + 2 + 4).split([1, 3, frames, 1, 2, 4])
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", batch),
        "encoder_attention_mask": _mask(batch),
        "pooled_projections": normal("pooled", POOLED, batch=batch),
        "image_embeds": normal("image", 5, IMAGE, batch=batch),
        "indices_latents": now,
        "guidance": x.new_full((batch,), 9000.0),
        "latents_clean": normal("clean", channels, 2, *size, batch=batch),
        "indices_latents_clean": torch.cat([first, next_]),
        "latents_history_2x": normal("history, halved", channels, 2, *size, batch=batch),
        "indices_latents_history_2x": mid,
        "latents_history_4x": normal("history, quartered", channels, 4, *size, batch=batch),
        "indices_latents_history_4x": far,
        "attention_kwargs": None,
        "return_dict": False,
    }


DENOISERS = (
    TinyDenoiser(
        name="ConsisIDTransformer3DModel",
        make=lambda: diffusers.ConsisIDTransformer3DModel(
            num_attention_heads=3, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=16,
            text_embed_dim=TEXT, num_layers=4, sample_width=WIDTH, sample_height=HEIGHT, sample_frames=9,
            max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True, is_train_face=True,
            cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=6, LFE_vit_dim=8,
            LFE_depth=2, LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3,
            LFE_output_dim=32,  # two thirds of the inner dimension
            LFE_ff_mult=2, LFE_num_scale=2,
        ),
        state=(FRAMES, 4, HEIGHT, WIDTH),
        call=_consisid,
    ),
    TinyDenoiser(
        name="LatteTransformer3DModel",
        make=lambda: diffusers.LatteTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT, video_length=FRAMES,
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_latte,
        taken=_without_variance,
    ),
    TinyDenoiser(
        name="AllegroTransformer3DModel",
        make=lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=3, cross_attention_dim=24, sample_height=HEIGHT,
            sample_width=WIDTH, sample_frames=FRAMES, caption_channels=TEXT,
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_allegro,
    ),
    TinyDenoiser(
        name="AnyFlowTransformer3DModel",
        make=lambda: diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=8,
            ffn_dim=32, num_layers=3, rope_max_seq_len=32,
        ),
        state=(FRAMES, 4, HEIGHT, WIDTH),
        call=_anyflow,
    ),
    TinyDenoiser(
        name="AnyFlowFARTransformer3DModel",
        make=lambda: diffusers.AnyFlowFARTransformer3DModel(
            full_chunk_limit=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
            text_dim=TEXT, freq_dim=8, ffn_dim=32, num_layers=3, rope_max_seq_len=32, chunk_partition=(1, 1, 2),
        ),
        state=(2, 4, 8, 8),
        call=_anyflow_far,
    ),
    TinyDenoiser(
        name="ChronoEditTransformer3DModel",
        make=lambda: diffusers.ChronoEditTransformer3DModel(
            num_attention_heads=4, attention_head_dim=6, in_channels=9, out_channels=4, text_dim=TEXT, freq_dim=8,
            ffn_dim=48, num_layers=3, image_dim=IMAGE, added_kv_proj_dim=24, rope_max_seq_len=32,
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_chronoedit,
    ),
    TinyDenoiser(
        name="CosmosTransformer3DModel",
        make=lambda: diffusers.CosmosTransformer3DModel(
            in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
            concat_padding_mask=False,  # resizing it needs torchvision
            text_embed_dim=16, adaln_lora_dim=8, max_size=(4, 8, 8), rope_scale=(1.0, 3.0, 3.0),
            use_crossattn_projection=True, crossattn_proj_in_channels=TEXT, encoder_hidden_states_channels=16,
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_cosmos,
    ),
    TinyDenoiser(
        name="Cosmos3OmniTransformer",
        make=lambda: diffusers.Cosmos3OmniTransformer(
            head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32, rope_axes_dim=(2, 1, 1),
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_cosmos3,
        taken=_all_videos,
    ),
    TinyDenoiser(
        name="EasyAnimateTransformer3DModel",
        make=lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=3,
            mmdit_layers=3, time_embed_dim=16, text_embed_dim=TEXT,
        ),
        state=(4, FRAMES, HEIGHT, WIDTH),
        call=_easyanimate,
    ),
    TinyDenoiser(
        name="HeliosTransformer3DModel",
        make=lambda: diffusers.HeliosTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=8,
            ffn_dim=32, num_layers=3, rope_dim=(4, 2, 2),
        ),
        state=(4, 2, 8, 8),
        call=_helios,
    ),
    TinyDenoiser(
        name="HunyuanVideo15Transformer3DModel",
        make=lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3,
            text_embed_dim=TEXT, text_embed_2_dim=POOLED, image_embed_dim=IMAGE, rope_axes_dim=(4, 2, 2),
        ),
        state=(4, FRAMES, 4, 3),
        call=_hunyuan_video15,
    ),
    TinyDenoiser(
        name="HunyuanVideoFramepackTransformer3DModel",
        make=lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_single_layers=3, text_embed_dim=TEXT, pooled_projection_dim=POOLED, rope_axes_dim=(4, 2, 2),
            has_image_proj=True, image_proj_dim=IMAGE, has_clean_x_embedder=True,
        ),
        state=(4, 3, 8, 8),
        call=_framepack,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {}
