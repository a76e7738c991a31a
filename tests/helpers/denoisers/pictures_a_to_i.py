"""Transformers for pictures, A to I."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from pipelines.parts import POOLED, TEXT, TOKENS, normal, prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser, first_tensor

SIDE = 4  # of the grid of image tokens
WORDS = TOKENS - 3  # tokens of a prompt that are not padding


def _padded(batch: int) -> Tensor:
    """Which tokens of the prompts are not padding, [batch, TOKENS]."""
    return (torch.arange(TOKENS) < WORDS).repeat(batch, 1)


def _grid(side: int = SIDE) -> Tensor:
    """Position (0, row, column) of every image token, [side * side, 3]."""
    return torch.cartesian_prod(torch.arange(1.0), torch.arange(float(side)), torch.arange(float(side)))


def _negative(output: Any) -> Tensor:
    return -first_tensor(output)


def _bria(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "attention_kwargs": None,
        "return_dict": False,
        "txt_ids": torch.zeros(TOKENS, 3),
        "img_ids": _grid(),
    }


def _bria_fibo(x: Tensor, t: Tensor) -> dict[str, object]:
    mask = torch.cat([_padded(len(x)), torch.ones(x.shape[:2], dtype=torch.bool)], dim=1)
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "text_encoder_layers": [prompt(f"layer {i} of prompt", len(x)) for i in range(6)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
        "return_dict": False,
        "txt_ids": torch.zeros(TOKENS, 3),
        "img_ids": _grid(),
    }


def _bria_fibo2(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "encoder_hidden_states": torch.stack([prompt(f"bundle {i} of prompt", len(x)) for i in range(3)], dim=1),
        "encoder_attention_mask": _padded(len(x)),
        "context_latents": None,
        "return_dict": False,
    }


def _cogview(x: Tensor, t: Tensor) -> dict[str, object]:
    sizes = x.new_tensor([[16.0, 16.0]] * len(x))
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "timestep": t,
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": 0 * sizes,
        "return_dict": False,
    }


def _ernie(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "text_bth": prompt("prompt", len(x)) * _padded(len(x))[..., None],
        "text_lens": torch.full((len(x),), WORDS),
        "return_dict": False,
    }


def _flux3(x: Tensor, t: Tensor) -> dict[str, object]:
    """With a reference picture, which has separate blocks."""
    places = torch.nn.functional.pad(_grid() / 2, (0, 1))
    words = torch.nn.functional.pad(torch.arange(float(TOKENS))[:, None], (3, 0))
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "return_dict": False,
        "img_ids": places,
        "image_cond_hidden_states": normal("reference", *x.shape[1:], batch=len(x)),
        "image_cond_ids": places - torch.tensor([0.0, 0.0, 0.0, 1.0]),
        "encoder_hidden_states": prompt("prompt", len(x)),
        "txt_ids": words,
    }


def _glm(x: Tensor, t: Tensor) -> dict[str, object]:
    prior = (8 * normal("prior", SIDE * SIDE, batch=len(x))).long() % 16
    sizes = x.new_tensor([[64.0, 64.0]] * len(x))
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
        "timestep": t - 1,
        "target_size": sizes,
        "crop_coords": 0 * sizes,
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": diffusers.models.transformers.transformer_glm_image.GlmImageKVCache(num_layers=3),
    }


def _hidream(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timesteps": t,
        "encoder_hidden_states_t5": prompt("prompt", len(x)),
        "encoder_hidden_states_llama3": torch.stack([prompt(f"layer {i} of prompt", len(x)) for i in range(6)]),
        "pooled_embeds": normal("pooled", POOLED, batch=len(x)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan_image(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _padded(len(x)).long(),
        "encoder_hidden_states_2": normal("glyphs", 4, TEXT, batch=len(x)),
        "encoder_attention_mask_2": (torch.arange(4) < 3).long().repeat(len(x), 1),
    }


def _hunyuan_dit(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "text_embedding_mask": _padded(len(x)).long(),
        "encoder_hidden_states_t5": prompt("prompt of T5", len(x)),
        "text_embedding_mask_t5": _padded(len(x)).long(),
        "image_meta_size": x.new_tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * len(x)),
        "style": torch.zeros(len(x), dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (SIDE, SIDE)), (SIDE, SIDE), output_type="pt"),
        "return_dict": False,
    }


def _mean_only(output: Any) -> Tensor:
    """Without the learned variance."""
    return first_tensor(output).chunk(2, dim=1)[0]


def _ideogram4(x: Tensor, t: Tensor) -> dict[str, object]:
    """One sequence of padding, prompt and picture."""
    padding, pixels = TOKENS - WORDS, x.shape[1]
    words = torch.arange(WORDS)[:, None].expand(-1, 3)
    ids = diffusers.models.transformers.transformer_ideogram4
    places = _grid().long() + ids.IMAGE_POSITION_OFFSET
    role = torch.tensor([0] * padding + [ids.LLM_TOKEN_INDICATOR] * WORDS + [ids.OUTPUT_IMAGE_INDICATOR] * pixels)
    segment = torch.tensor([ids.SEQUENCE_PADDING_INDICATOR] * padding + [1] * (WORDS + pixels))
    return {
        "hidden_states": torch.nn.functional.pad(x, (0, 0, TOKENS, 0)),
        "timestep": 1 - t / 1000,
        "encoder_hidden_states": torch.nn.functional.pad(prompt("prompt", len(x)), (0, 0, 0, pixels)),
        "position_ids": torch.cat([words.new_zeros(padding, 3), words, places]).repeat(len(x), 1, 1),
        "segment_ids": segment.repeat(len(x), 1),
        "indicator": role.repeat(len(x), 1),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _negative_picture(output: Any) -> Tensor:
    return -first_tensor(output)[:, TOKENS:]


DENOISERS = (
    TinyDenoiser(
        name="BriaTransformer2DModel",
        make=lambda: diffusers.BriaTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=[2, 4, 2],
        ),
        state=(SIDE * SIDE, 8),
        call=_bria,
    ),
    TinyDenoiser(
        name="BriaFiboTransformer2DModel",
        make=lambda: diffusers.BriaFiboTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=[2, 4, 2], text_encoder_dim=TEXT,
        ),
        state=(SIDE * SIDE, 8),
        call=_bria_fibo,
    ),
    TinyDenoiser(
        name="BriaFibo2Transformer2DModel",
        # the narrowest whose feed-forward has channels, and two of its blocks read the prompt
        make=lambda: diffusers.BriaFibo2Transformer2DModel(
            in_channels=4, patch_size=2, dim=32, n_layers=4, n_refiner_layers=2, n_heads=4, cap_feat_dim=TEXT,
            injection_layer_ids=(1, 3), perceiver_num_layers=2, min_num_gist_tokens=4, max_num_gist_tokens=8,
            gist_step=4, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 2, 2), axes_lens=(16, 8, 8),
        ),
        state=(4, 2 * SIDE, 2 * SIDE),
        call=_bria_fibo2,
    ),
    TinyDenoiser(
        name="CogView3PlusTransformer2DModel",
        make=lambda: diffusers.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=TEXT, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        ),
        state=(4, 8, 8),
        call=_cogview,
    ),
    TinyDenoiser(
        name="CogView4Transformer2DModel",
        make=lambda: diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=TEXT, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        state=(4, 8, 8),
        call=_cogview,
    ),
    TinyDenoiser(
        name="ErnieImageTransformer2DModel",
        make=lambda: diffusers.ErnieImageTransformer2DModel(
            hidden_size=16, num_attention_heads=2, num_layers=3, ffn_hidden_size=32, in_channels=8, out_channels=8,
            patch_size=1, text_in_dim=TEXT, rope_axes_dim=(4, 2, 2),
        ),
        state=(8, SIDE, SIDE),
        call=_ernie,
    ),
    TinyDenoiser(
        name="Flux3Transformer2DModel",
        make=lambda: diffusers.Flux3Transformer2DModel(
            in_channels=8, cond_in_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=TEXT, timestep_channels=16, axes_dims_rope=(2, 2, 2, 2),
        ),
        state=(SIDE * SIDE, 8),
        call=_flux3,
    ),
    TinyDenoiser(
        name="GlmImageTransformer2DModel",
        make=lambda: diffusers.GlmImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=TEXT, time_embed_dim=16, condition_dim=4, prior_vq_quantizer_codebook_size=16,
        ),
        state=(4, 2 * SIDE, 2 * SIDE),
        call=_glm,
    ),
    TinyDenoiser(
        name="HiDreamImageTransformer2DModel",
        make=lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, caption_channels=[TEXT, TEXT], text_emb_dim=POOLED, axes_dims_rope=(4, 2, 2),
            max_resolution=(2 * SIDE, 2 * SIDE), llama_layers=list(range(6)),
        ),
        state=(4, 2 * SIDE, 2 * SIDE),
        call=_hidream,
        taken=_negative,
    ),
    TinyDenoiser(
        name="HunyuanImageTransformer2DModel",
        make=lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=3,
            num_single_layers=3, num_refiner_layers=2, text_embed_dim=TEXT, text_embed_2_dim=TEXT,
            rope_axes_dim=(4, 4),
        ),
        state=(8, SIDE, SIDE),
        call=_hunyuan_image,
    ),
    TinyDenoiser(
        name="HunyuanDiT2DModel",
        # an even number: outputs of the first blocks go to the last ones too, here from two blocks to two
        make=lambda: diffusers.HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=2 * SIDE,
            hidden_size=16, num_layers=6, cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT,
            pooled_projection_dim=POOLED, text_len=TOKENS, text_len_t5=TOKENS,
        ),
        state=(4, 2 * SIDE, 2 * SIDE),
        call=_hunyuan_dit,
        taken=_mean_only,
    ),
    TinyDenoiser(
        name="Ideogram4Transformer2DModel",
        make=lambda: diffusers.Ideogram4Transformer2DModel(
            in_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=TEXT, mrope_section=(2, 1, 1),
        ),
        state=(SIDE * SIDE, 8),
        call=_ideogram4,
        taken=_negative_picture,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {
    "DreamLiteTransformer2DModel": "A part of DreamLiteUNetModel, several in each; no pipeline calls one by itself.",
}
