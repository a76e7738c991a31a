"""Transformers for pictures, J to Z."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from pipelines.parts import TEXT, TOKENS, normal, prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser, first_tensor

GRID = 4  # tokens along each side of a picture
PICTURE = GRID * GRID
REFERENCE = 4  # tokens of a reference picture of 2 x 2


def _mask(batch: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Which tokens of the prompts are text; the last ones are padding."""
    return (torch.arange(TOKENS) < TOKENS - 3).to(dtype).repeat(batch, 1)


def _text_ids() -> Tensor:
    at = torch.arange(TOKENS, dtype=torch.float32)
    return torch.stack([0 * at, at, at], dim=1)


def _picture_ids(kind: int = 0, start: int = 0) -> Tensor:
    at = torch.arange(GRID, dtype=torch.float32) + start
    return torch.cartesian_prod(torch.tensor([float(kind)]), at, at)


# --- edited pictures: references and the noisy picture ---------------------------------------------------------------


def _joy_edit(x: Tensor, t: Tensor) -> dict[str, object]:
    reference = normal("reference", *x.shape[1:], batch=len(x))
    return {
        "hidden_states": torch.stack([reference, x], dim=1),
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "return_dict": False,
    }


def _joy_edit_plus(x: Tensor, t: Tensor) -> dict[str, object]:
    reference = normal("reference", REFERENCE, *x.shape[2:], batch=len(x))
    return {
        "hidden_states": torch.cat([x, reference], dim=1),
        "timestep": t,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_hidden_states_mask": _mask(len(x), torch.int64),
        "shape_list": [[(1, GRID, GRID), (1, 2, 2)]] * len(x),
        "return_dict": False,
    }


def _qwen_21(x: Tensor, t: Tensor) -> dict[str, object]:
    """As the pipeline does under ``use_kv_cache=False``; else it has one long sequence first and then short ones.

    Of the twelve places of the prompt one stands for the reference; four more are for the picture to be made.
    """
    slots = torch.arange(TOKENS + PICTURE // 4)
    return {
        "hidden_states": torch.cat([normal("reference", REFERENCE, x.shape[-1], batch=len(x)), x], dim=1),
        "timestep": t / 1000,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_hidden_states_mask": _mask(len(x)),
        "img_shapes": [[(1, 2, 2), (1, GRID, GRID)]] * len(x),
        "img_mask": ((slots == 4) | (slots >= TOKENS)).repeat(len(x), 1),
        "attention_kwargs": None,
        "kv_cache": None,
        "kv_cache_mode": None,
        "return_dict": False,
    }


def _omnigen(x: Tensor, t: Tensor) -> dict[str, object]:
    """Text and time are causal; the reference within the text and the picture after it see themselves."""
    length = TOKENS + 1 + PICTURE
    sees = torch.ones(length, length).tril()
    sees[2 : 2 + REFERENCE, 2 : 2 + REFERENCE] = 1
    sees[TOKENS + 1 :, TOKENS + 1 :] = 1
    return {
        "hidden_states": x,
        "timestep": 1 - t / 1000,
        "input_ids": normal("prompt", TOKENS, batch=len(x)).mul(10).abs().long(),
        "input_img_latents": list(normal("reference", 1, 4, 4, 4, batch=len(x))),
        "input_image_sizes": {row: [[2, 2 + REFERENCE]] for row in range(len(x))},
        "attention_mask": sees.repeat(len(x), 1, 1),
        "position_ids": torch.arange(length).repeat(len(x), 1),
        "return_dict": False,
    }


# --- pictures from text ----------------------------------------------------------------------------------------------


def _krea_2(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": normal("prompt", TOKENS, 3, TEXT, batch=len(x)),
        "timestep": t / 1000,
        "position_ids": torch.cat([0 * _text_ids(), _picture_ids()]),
        "encoder_attention_mask": _mask(len(x)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "guidance": None,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "txt_ids": _text_ids(),
        "img_ids": _picture_ids(1, TOKENS),
        "return_dict": False,
    }


def _ovis(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "txt_ids": _text_ids(),
        "img_ids": _picture_ids(),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _nucleus(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_hidden_states_mask": _mask(len(x)),
        "img_shapes": [(1, GRID, GRID)] * len(x),
        "attention_kwargs": {},
        "return_dict": False,
    }


def _make_lumina_next() -> diffusers.LuminaNextDiT2DModel:
    module = diffusers.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=3, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, learn_sigma=True, cross_attention_dim=TEXT,
    )  # fmt: skip
    # The class leaves it as memory happens to be, and a constant one would change what `enliven` draws for the others.
    torch.nn.init.normal_(module.pad_token, generator=torch.Generator().manual_seed(0))
    return module


def _make_nucleus() -> diffusers.NucleusMoEImageTransformer2DModel:
    module = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=TEXT, axes_dims_rope=(4, 2, 2), mlp_ratio=12.0,
        dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    for name, parameter in module.named_parameters():
        if ".experts." in name:  # the class leaves them as memory happens to be
            torch.nn.init.normal_(parameter, std=0.15)
    return module


def _prx(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "attention_mask": _mask(len(x)),
        "return_dict": False,
    }


def _lumina_next(x: Tensor, t: Tensor) -> dict[str, object]:
    time = 1 - t / 1000
    linear, ntk = (1.5, 1.0) if time[0] < 0.3 else (1.0, 1.5)
    return {
        "hidden_states": x,
        "timestep": time,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_mask": _mask(len(x), torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 8, 8, linear_factor=linear, ntk_factor=ntk),
        "cross_attention_kwargs": {"base_sequence_length": 8},
        "return_dict": False,
    }


def _patches(x: Tensor, t: Tensor) -> dict[str, object]:
    """As PixArt-alpha calls it."""
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _mask(len(x)),
        "timestep": t,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _prior(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": t[0],
        "proj_embedding": normal("pooled", TEXT, batch=len(x)),
        "encoder_hidden_states": prompt("prompt", len(x)),
        "attention_mask": _mask(len(x)),
    }


def _last(output: Any) -> Tensor:
    """The picture comes after the references, or after all other tokens."""
    return first_tensor(output)[:, -1]


def _picture_last(output: Any) -> Tensor:
    return first_tensor(output)[:, -PICTURE:]


def _picture_first(output: Any) -> Tensor:
    return first_tensor(output)[:, :PICTURE]


def _mean(output: Any) -> Tensor:
    """Without the learned variance."""
    return first_tensor(output).chunk(2, dim=1)[0]


DENOISERS = (
    TinyDenoiser(
        name="JoyImageEditTransformer3DModel",
        make=lambda: diffusers.JoyImageEditTransformer3DModel(
            in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=TEXT, mlp_width_ratio=2.0, num_layers=3,
            rope_dim_list=[4, 2, 2],
        ),
        state=(4, 1, 8, 8),
        call=_joy_edit,
        taken=_last,
    ),
    TinyDenoiser(
        name="JoyImageEditPlusTransformer3DModel",
        make=lambda: diffusers.JoyImageEditPlusTransformer3DModel(
            in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=TEXT, mlp_width_ratio=2.0, num_layers=3,
            rope_dim_list=[4, 2, 2],
        ),
        state=(PICTURE, 4, 1, 2, 2),
        call=_joy_edit_plus,
        taken=_picture_first,
    ),
    TinyDenoiser(
        name="Krea2Transformer2DModel",
        make=lambda: diffusers.Krea2Transformer2DModel(
            in_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=TEXT, num_text_layers=3,
            text_num_attention_heads=3, text_num_key_value_heads=3, text_intermediate_size=24,
            num_layerwise_text_blocks=2, num_refiner_text_blocks=2, axes_dims_rope=(4, 2, 2),
        ),
        state=(PICTURE, 8),
        call=_krea_2,
    ),
    TinyDenoiser(
        name="LongCatImageTransformer2DModel",
        make=lambda: diffusers.LongCatImageTransformer2DModel(
            in_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=[4, 2, 2],
        ),
        state=(PICTURE, 8),
        call=_longcat,
    ),
    TinyDenoiser(
        name="LuminaNextDiT2DModel",
        make=_make_lumina_next,
        state=(4, 8, 8),
        call=_lumina_next,
        taken=lambda output: -_mean(output),  # time rises from 0 there
    ),
    TinyDenoiser(
        name="NucleusMoEImageTransformer2DModel",
        make=_make_nucleus,
        state=(PICTURE, 8),
        call=_nucleus,
    ),
    TinyDenoiser(
        name="OmniGenTransformer2DModel",
        make=lambda: diffusers.OmniGenTransformer2DModel(
            in_channels=4, patch_size=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, num_layers=3, pad_token_id=0, vocab_size=64,
            rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, pos_embed_max_size=8, time_step_dim=16,
        ),
        state=(4, 8, 8),
        call=_omnigen,
        taken=lambda output: -first_tensor(output),  # time rises from 0 there
    ),
    TinyDenoiser(
        name="OvisImageTransformer2DModel",
        make=lambda: diffusers.OvisImageTransformer2DModel(
            in_channels=8, out_channels=8, num_layers=3, num_single_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=(4, 2, 2),
        ),
        state=(PICTURE, 8),
        call=_ovis,
    ),
    TinyDenoiser(
        name="PRXTransformer2DModel",
        make=lambda: diffusers.PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=TEXT, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=3,
            axes_dim=[4, 4], resolution_embeds=True,
        ),
        state=(4, 8, 8),
        call=_prx,
    ),
    TinyDenoiser(
        name="QwenImage21Transformer2DModel",
        make=lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            context_in_dim=TEXT, axes_dims_rope=(4, 2, 2),
        ),
        state=(PICTURE, 8),
        call=_qwen_21,
        taken=_picture_last,
    ),
    TinyDenoiser(
        name="Transformer2DModel",
        make=lambda: diffusers.Transformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
            caption_channels=TEXT,
        ),
        state=(4, 8, 8),
        call=_patches,
        taken=_mean,
    ),
    TinyDenoiser(
        name="PriorTransformer",
        make=lambda: diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=TEXT, num_embeddings=TOKENS,
        ),
        state=(TEXT,),
        call=_prior,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {}
