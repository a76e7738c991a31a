"""More audio."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from pipelines import audio
from pipelines.more.wan import like
from pipelines.parts import BETAS, STEPS, TEXT, TOKENS, assemble, flow_euler, image_vae, network, normal, seeded, text
from pipelines.tiny import Tiny, one_batch, plain, two_calls, unet

_PLAIN = {tiny.name: tiny for tiny in audio.PIPELINES}
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


def _oobleck() -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )


def _noise(tag: str, samples: int, batch: int = 1) -> torch.Tensor:
    """Two channels of random sound."""
    return torch.stack([torch.rand((2, samples), generator=seeded(f"{tag}/{i}")) - 0.5 for i in range(batch)])


def _ace_step() -> Any:
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder  # not in older ones

    return assemble(
        "ace_step",
        diffusers.AceStepPipeline,
        transformer=network("AceStepTransformer1DModel"),
        condition_encoder=lambda: AceStepConditionEncoder(
            hidden_size=TEXT,
            intermediate_size=32,
            text_hidden_dim=TEXT,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
        text_encoder=_text_encoder,
        tokenizer=Tokenizer,
        vae=_oobleck,
        scheduler=flow_euler(num_train_timesteps=1, shift=1.0),
    )


def _ace_step_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    prompts = {"prompt": ["slow"] * batch, "lyrics": ["la"] * batch, "max_text_length": TOKENS}
    return {**prompts, **_STEPS, "audio_duration": 6.0, "guidance_scale": 4.0}


def _ace_step_guided_at_first_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_ace_step_call(pipe, batch), "cfg_interval_end": 0.4}


def _ace_step_repaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    span = {"repainting_start": 1.0, "repainting_end": 4.0}
    return {**_ace_step_call(pipe, batch), **span, "task_type": "repaint", "src_audio": _noise("source", 24)[0]}


def _longcat() -> Any:
    return assemble(
        "longcat_audio",
        diffusers.LongCatAudioDiTPipeline,
        transformer=network("LongCatAudioDiTTransformer"),
        text_encoder=_text_encoder,
        tokenizer=Tokenizer,
        vae=lambda: diffusers.LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=2,
            sample_rate=4,
        ),
        scheduler=flow_euler(shift=1.0, invert_sigmas=True),
    )


def _longcat_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = {"prompt": ["rain on a roof"] * batch, "negative_prompt": ["music"] * batch}
    return {**words, **_STEPS, "audio_duration_s": 6.0, "guidance_scale": 4.0}


def _stable_audio_3(pipeline: type, **scheduler: Any) -> Any:
    return assemble(
        "stable_audio_3",
        pipeline,
        transformer=network("StableAudio3DiTModel"),
        duration_embedder=lambda: diffusers.StableAudio3DurationEmbedder(output_dim=TEXT, fourier_dim=8),
        vae=lambda: diffusers.AutoencoderSAME(
            patch_size=4,
            encoder_channels=16,
            encoder_c_mults=[1],
            encoder_strides=[2],
            encoder_transformer_depths=[1],
            latent_dim=4,
            dim_heads=8,
            sampling_rate=16,
        ),
        scheduler=flow_euler(**scheduler),
    )


def _stable_audio_3_text(batch: int, *, negative: bool) -> dict[str, Any]:
    words = text(batch, mask="encoder_attention_mask", dtype=torch.int64, negative=negative)
    return {**words, **_STEPS, "duration": 6.0}


def _stable_audio_3_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_stable_audio_3_text(batch, negative=True), "guidance_scale": 4.0}


def _stable_audio_3_plain_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return _stable_audio_3_text(batch, negative=False)


def _stable_audio_3_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    span = {"mask_start_seconds": 1.0, "mask_end_seconds": 4.0}
    return {**_stable_audio_3_plain_call(pipe, batch), **span, "audio": _noise("audio", 96, batch)}


def _stable_audio_3_from_audio_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """It starts late, but with as many steps."""
    audio = {"audio": _noise("audio", 96, batch), "init_noise_level": 0.7}
    return {**_stable_audio_3_plain_call(pipe, batch), **audio}


def _stable_audio_from_audio() -> Any:
    """With an autoencoder that knows the way there too."""
    pipe = _PLAIN["stable_audio"].build()
    return like("stable_audio", pipe, diffusers.StableAudioPipeline, gain=1.2, vae={"encoder_hidden_size": 8})


def _stable_audio_from_audio_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    audio = {"initial_audio_waveforms": _noise("audio", 24, batch), "initial_audio_sampling_rate": 4}
    return {**_PLAIN["stable_audio"].call(pipe, batch), **audio}


def _audioldm2() -> Any:
    return assemble(
        "audioldm2",
        diffusers.AudioLDM2Pipeline,
        unet=lambda: diffusers.AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 16, TEXT), (None, 16, TEXT)),
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        vae=image_vae(),
        # These two are asked for nothing but the type of their numbers.
        text_encoder_2=_text_encoder,
        language_model=lambda: GPT2Model(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=8)),
        vocoder=lambda: SpeechT5HifiGan(
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
        scheduler=lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    )


def _audioldm2_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**text(batch, mask="attention_mask", dtype=torch.int64), **_STEPS, "audio_length_in_s": 6.0}
    for sign, tag in (("", "prompt"), ("negative_", "negative")):
        call[f"{sign}generated_prompt_embeds"] = normal(f"{tag}, continued", 4, 16, batch=batch)
    return {**call, "guidance_scale": 4.0}


PIPELINES: tuple[Tiny, ...] = (
    one_batch("ace_step", _ace_step, _ace_step_call, modality="audio"),
    one_batch("ace_step_repaint", _ace_step, _ace_step_repaint_call, modality="audio"),
    one_batch(
        "ace_step_guided_at_first",
        _ace_step,
        _ace_step_guided_at_first_call,
        modality="audio",
        guidance="batched, in the first half",
    ),
    two_calls("longcat_audio", _longcat, _longcat_call, modality="audio"),
    one_batch(
        "stable_audio_3",
        lambda: _stable_audio_3(diffusers.StableAudio3Pipeline),
        _stable_audio_3_call,
        modality="audio",
    ),
    plain(
        "stable_audio_3_stochastic",
        lambda: _stable_audio_3(diffusers.StableAudio3Pipeline, stochastic_sampling=True),
        _stable_audio_3_plain_call,
        modality="audio",
    ),
    plain(
        "stable_audio_3_inpaint",
        lambda: _stable_audio_3(diffusers.StableAudio3InpaintPipeline),
        _stable_audio_3_inpaint_call,
        modality="audio",
    ),
    plain(
        "stable_audio_3_from_audio",
        lambda: _stable_audio_3(diffusers.StableAudio3AudioToAudioPipeline),
        _stable_audio_3_from_audio_call,
        modality="audio",
    ),
    one_batch("stable_audio_from_audio", _stable_audio_from_audio, _stable_audio_from_audio_call, modality="audio"),
    unet("audioldm2", _audioldm2, _audioldm2_call, modality="audio"),
)
