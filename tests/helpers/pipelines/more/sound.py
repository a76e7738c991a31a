"""More audio."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from pipelines.audio import STABLE_AUDIO, stable_audio_call
from pipelines.parts import (
    BETAS,
    STEPS,
    TEXT,
    TOKENS,
    Parts,
    called,
    flow_euler,
    image_vae,
    network,
    normal,
    part,
    seeded,
    words,
)
from pipelines.tiny import Tiny, one_batch, plain, two_calls, unet

_STEPS: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}


class Tokenizer:
    """Stands for one that is read from files: a token is a byte."""

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> SimpleNamespace:
        codes = [list(one.encode())[:max_length] for one in texts]
        longest = max(map(len, codes))
        return SimpleNamespace(
            input_ids=torch.tensor([code + [0] * (longest - len(code)) for code in codes]),
            attention_mask=torch.tensor([[1] * len(code) + [0] * (longest - len(code)) for code in codes]),
        )


def _text_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=256, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _noise(tag: str, samples: int, batch: int = 1) -> torch.Tensor:
    """Two channels of random sound."""
    return torch.stack([torch.rand((2, samples), generator=seeded(f"{tag}/{i}")) - 0.5 for i in range(batch)])


def _condition_encoder() -> Any:
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder  # not in older ones

    return AceStepConditionEncoder(
        hidden_size=TEXT,
        intermediate_size=32,
        text_hidden_dim=TEXT,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


_READ: dict[str, Any] = {"text_encoder": _text_encoder, "tokenizer": Tokenizer}
_ACE_STEP = Parts(
    "ace_step",
    {
        "transformer": network("AceStepTransformer1DModel"),
        "condition_encoder": _condition_encoder,
        **_READ,
        "vae": STABLE_AUDIO.parts["vae"].but(encoder_hidden_size=8),
        "scheduler": flow_euler(num_train_timesteps=1, shift=1.0),
    },
)
_ace_step_call = called(
    _STEPS,
    prompt=lambda batch: ["slow"] * batch,
    lyrics=lambda batch: ["la"] * batch,
    max_text_length=TOKENS,
    audio_duration=6.0,
    guidance_scale=4.0,
)
_LONGCAT = Parts(
    "longcat_audio",
    {
        "transformer": network("LongCatAudioDiTTransformer"),
        **_READ,
        "vae": part(
            "LongCatAudioDiTVae",
            channels=4,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=2,
            sample_rate=4,
        ),
        "scheduler": flow_euler(shift=1.0, invert_sigmas=True),
    },
)
_STABLE_AUDIO_3 = Parts(
    "stable_audio_3",
    {
        "transformer": network("StableAudio3DiTModel"),
        "duration_embedder": part("StableAudio3DurationEmbedder", output_dim=TEXT, fourier_dim=8),
        "vae": part(
            "AutoencoderSAME",
            patch_size=4,
            encoder_channels=16,
            encoder_c_mults=[1],
            encoder_strides=[2],
            encoder_transformer_depths=[1],
            latent_dim=4,
            dim_heads=8,
            sampling_rate=16,
        ),
        "scheduler": flow_euler(),
    },
)
_MASK: dict[str, Any] = {"mask": "encoder_attention_mask", "dtype": torch.int64}
_stable_audio_3_plain_call = called(words(**_MASK, negative=False), _STEPS, duration=6.0)
_AUDIOLDM2 = Parts(
    "audioldm2",
    {
        "unet": part(
            "AudioLDM2UNet2DConditionModel",
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 16, TEXT), (None, 16, TEXT)),
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        "vae": image_vae(),
        # These two are asked for nothing but the type of their numbers.
        "text_encoder_2": _text_encoder,
        "language_model": lambda: GPT2Model(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=8)),
        "vocoder": lambda: SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=8,
                sampling_rate=16,
                upsample_initial_channel=8,
                upsample_rates=[2, 2],
                upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1]],
            )
        ),
        "scheduler": part("DDIMScheduler", **BETAS, clip_sample=False),
    },
)


def _continued(tag: str) -> Any:
    return lambda batch: normal(f"{tag}, continued", 4, 16, batch=batch)


PIPELINES: tuple[Tiny, ...] = (
    one_batch("ace_step", _ACE_STEP.within("AceStepPipeline"), _ace_step_call, modality="audio"),
    one_batch(
        "ace_step_repaint",
        _ACE_STEP.within("AceStepPipeline"),
        called(
            _ace_step_call,
            repainting_start=1.0,
            repainting_end=4.0,
            task_type="repaint",
            src_audio=lambda _batch: _noise("source", 24)[0],
        ),
        modality="audio",
    ),
    one_batch(
        "ace_step_guided_at_first",
        _ACE_STEP.within("AceStepPipeline"),
        called(_ace_step_call, cfg_interval_end=0.4),
        modality="audio",
        guidance="batched, in the first half",
    ),
    two_calls(
        "longcat_audio",
        _LONGCAT.within("LongCatAudioDiTPipeline"),
        called(
            _STEPS,
            prompt=lambda batch: ["rain on a roof"] * batch,
            negative_prompt=lambda batch: ["music"] * batch,
            audio_duration_s=6.0,
            guidance_scale=4.0,
        ),
        modality="audio",
    ),
    one_batch(
        "stable_audio_3",
        _STABLE_AUDIO_3.within("StableAudio3Pipeline"),
        called(words(**_MASK), _STEPS, duration=6.0, guidance_scale=4.0),
        modality="audio",
    ),
    plain(
        "stable_audio_3_stochastic",
        _STABLE_AUDIO_3.within("StableAudio3Pipeline", scheduler={"stochastic_sampling": True}),
        _stable_audio_3_plain_call,
        modality="audio",
    ),
    plain(
        "stable_audio_3_inpaint",
        _STABLE_AUDIO_3.within("StableAudio3InpaintPipeline"),
        called(
            _stable_audio_3_plain_call,
            mask_start_seconds=1.0,
            mask_end_seconds=4.0,
            audio=lambda batch: _noise("audio", 96, batch),
        ),
        modality="audio",
    ),
    plain(
        "stable_audio_3_from_audio",
        _STABLE_AUDIO_3.within("StableAudio3AudioToAudioPipeline"),
        # It starts late, but with as many steps.
        called(_stable_audio_3_plain_call, audio=lambda batch: _noise("audio", 96, batch), init_noise_level=0.7),
        modality="audio",
    ),
    one_batch(
        "stable_audio_from_audio",
        # With an autoencoder that knows the way there too.
        STABLE_AUDIO.within("StableAudioPipeline", vae={"encoder_hidden_size": 8}),
        called(
            stable_audio_call,
            initial_audio_waveforms=lambda batch: _noise("audio", 24, batch),
            initial_audio_sampling_rate=4,
        ),
        modality="audio",
    ),
    unet(
        "audioldm2",
        _AUDIOLDM2.within("AudioLDM2Pipeline"),
        called(
            words(mask="attention_mask", dtype=torch.int64),
            _STEPS,
            audio_length_in_s=6.0,
            generated_prompt_embeds=_continued("prompt"),
            negative_generated_prompt_embeds=_continued("negative"),
            guidance_scale=4.0,
        ),
        modality="audio",
    ),
)
