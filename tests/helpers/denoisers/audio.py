"""Transformers for sound."""

from __future__ import annotations

import diffusers
import torch
from pipelines.parts import TEXT, TOKENS, normal, prompt
from torch import Tensor

from denoisers.tiny import TinyDenoiser

LENGTH = 12  # of the latent sequence
CHANNELS = 4


def _padded(batch: int, length: int, padding: int) -> Tensor:
    return (torch.arange(length) < length - padding).repeat(batch, 1)


def _ace_step(x: Tensor, t: Tensor) -> dict[str, object]:
    time = t / 1000
    source = normal("source latents", LENGTH, CHANNELS, batch=len(x))
    return {
        "hidden_states": x,
        "timestep": time,
        "timestep_r": time,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "context_latents": torch.cat([source, torch.ones_like(source)], dim=-1),  # and the mask of what to make
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat_audio(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "encoder_attention_mask": _padded(len(x), TOKENS, 3),
        "timestep": t / 1000,
        "attention_mask": _padded(len(x), LENGTH, 0),
        "latent_cond": torch.zeros_like(x),
    }


def _minimax_music(x: Tensor, t: Tensor) -> dict[str, object]:
    return {
        "hidden_states": x,
        "timestep": 1 - t / 1000,  # from noise at 0
        "encoder_hidden_states": normal("frames", LENGTH, TEXT, batch=len(x)),
        "return_dict": False,
    }


def _stable_audio_3(x: Tensor, t: Tensor) -> dict[str, object]:
    """The inpainting pipeline's: the only one that has a use for each block's local condition."""
    mask = _padded(len(x), LENGTH, 5)[:, None].float()
    kept = normal("audio latents", CHANNELS, LENGTH, batch=len(x)) * mask
    return {
        "hidden_states": x,
        "timestep": t / 1000,
        "encoder_hidden_states": prompt("prompt", len(x)),
        "global_hidden_states": normal("duration", TEXT, batch=len(x)),
        "encoder_attention_mask": _padded(len(x), TOKENS, 3),
        "local_add_cond": torch.cat([mask, kept], dim=1),
        "return_dict": False,
    }


def _t5_film(x: Tensor, t: Tensor) -> dict[str, object]:
    notes = (prompt("notes", len(x)), _padded(len(x), TOKENS, 3))
    before = (prompt("segment before", len(x)), _padded(len(x), TOKENS, 0))
    return {
        "encodings_and_masks": [notes, before],
        "decoder_input_tokens": x,
        "decoder_noise_time": t / 1000,
    }


DENOISERS = (
    TinyDenoiser(
        name="AceStepTransformer1DModel",
        make=lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, in_channels=3 * CHANNELS, audio_acoustic_hidden_dim=CHANNELS, sliding_window=2,
            encoder_hidden_size=TEXT,
        ),
        state=(LENGTH, CHANNELS),
        call=_ace_step,
    ),
    TinyDenoiser(
        name="LongCatAudioDiTTransformer",
        make=lambda: diffusers.LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=TEXT, latent_dim=CHANNELS, ff_mult=2.0,
        ),
        state=(LENGTH, CHANNELS),
        call=_longcat_audio,
    ),
    TinyDenoiser(
        name="MiniMaxMusic3Transformer1DModel",
        make=lambda: diffusers.MiniMaxMusic3Transformer1DModel(
            in_channels=CHANNELS, condition_dim=TEXT, num_layers=3, num_attention_heads=2, attention_head_dim=8,
            ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
        ),
        state=(CHANNELS, LENGTH),
        call=_minimax_music,
    ),
    TinyDenoiser(
        name="StableAudio3DiTModel",
        make=lambda: diffusers.StableAudio3DiTModel(
            io_channels=CHANNELS, embed_dim=16, depth=3, num_heads=2, cond_token_dim=TEXT, global_cond_dim=TEXT,
            local_add_cond_dim=1 + CHANNELS, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=2,
        ),
        state=(CHANNELS, LENGTH),
        call=_stable_audio_3,
    ),
    TinyDenoiser(
        name="T5FilmDecoder",
        make=lambda: diffusers.T5FilmDecoder(
            input_dims=CHANNELS, targets_length=LENGTH, d_model=TEXT, num_layers=3, num_heads=2, d_kv=8, d_ff=32,
        ),
        state=(LENGTH, CHANNELS),
        call=_t5_film,
    ),
)  # fmt: skip

NO_DENOISERS: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "A language model that writes the codes of one audio frame one after the other.",
}
