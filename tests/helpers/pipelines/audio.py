"""Audio."""

from __future__ import annotations

import functools

import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from pipelines.parts import STEPS, TEXT, Parts, called, part, words
from pipelines.tiny import one_batch

STABLE_AUDIO = Parts(
    "stable_audio",
    {
        "transformer": part(
            "StableAudioDiTModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=16,
            cross_attention_input_dim=16,
            global_states_input_dim=32,
            time_proj_dim=16,
        ),
        "projection_model": functools.partial(
            StableAudioProjectionModel, text_encoder_dim=TEXT, conditioning_dim=16, min_value=0, max_value=32
        ),
        "vae": part(
            "AutoencoderOobleck",
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=4,
        ),
        # The published model comes with the cosine scheduler, which needs torchsde; this one the pipeline names itself.
        "scheduler": part(
            "EDMDPMSolverMultistepScheduler",
            sigma_min=0.3,
            sigma_max=50,
            sigma_data=1.0,
            sigma_schedule="exponential",
            prediction_type="v_prediction",
        ),
    },
    gain=1.2,  # the sample starts fifty times too large, so errors of prediction are as large
)
stable_audio_call = called(
    words(mask="attention_mask", dtype=torch.int64),
    guidance_scale=4.0,
    audio_end_in_s=6.0,
    num_inference_steps=STEPS,
    output_type="latent",
)

PIPELINES = (
    one_batch("stable_audio", STABLE_AUDIO.within("StableAudioPipeline"), stable_audio_call, modality="audio"),
)
