"""Transformers for pictures, A to I."""

from __future__ import annotations

from diffusers import CogView4Transformer2DModel
from pipelines import TEXT, _prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser


def _cogview4(x: Tensor, t: Tensor) -> dict[str, object]:
    sizes = x.new_tensor([[16.0, 16.0]] * len(x))
    return {
        "hidden_states": x,
        "encoder_hidden_states": _prompt("prompt", len(x)),
        "timestep": t,
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": 0 * sizes,
        "return_dict": False,
    }


DENOISERS = (
    TinyDenoiser(
        name="CogView4Transformer2DModel",
        make=lambda: CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=TEXT, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        state=(4, 8, 8),
        call=_cogview4,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {}
