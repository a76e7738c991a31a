"""Transformers for videos."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from pipelines.parts import POOLED, TEXT, TOKENS, VIDEO, assemble, flow_euler, text
from pipelines.tiny import one_batch, plain, two_calls


def _wan(**extra: Any) -> Any:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        )

    return assemble(
        "wan",
        diffusers.WanPipeline,
        transformer=transformer,
        **({"transformer_2": transformer} if "boundary_ratio" in extra else {}),
        **extra,
        vae=lambda: diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
        ),
        scheduler=lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _wan_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **VIDEO, "guidance_scale": 4.0}


def _cogvideox(scheduler: type) -> Any:
    return assemble(
        "cogvideox",
        diffusers.CogVideoXPipeline,
        transformer=lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=TEXT,
            num_layers=3,
            sample_width=4,
            sample_height=6,
            sample_frames=9,
            max_text_seq_length=TOKENS,
            use_rotary_positional_embeddings=True,
        ),
        vae=lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        # The settings the published models come with; without the trailing spacing the run ends at noise.
        scheduler=lambda: scheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


def _cogvideox_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch), **VIDEO, "guidance_scale": 4.0}


def _hunyuan_video() -> Any:
    return assemble(
        "hunyuan_video",
        diffusers.HunyuanVideoPipeline,
        transformer=lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=TEXT,
            pooled_projection_dim=POOLED,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        scheduler=flow_euler(shift=7.0),
    )


def _hunyuan_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", pooled=True, negative=False)
    return {**words, **VIDEO, "num_frames": 5, "guidance_scale": 6.0}


def _hunyuan_video_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_attention_mask", pooled=True)
    return {**_hunyuan_video_call(pipe, batch), **words, "true_cfg_scale": 3.0}


def _ltx() -> Any:
    def vae() -> Any:
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        )
        vae.use_framewise_encoding = vae.use_framewise_decoding = False  # 9 frames are fewer than one tile
        return vae

    return assemble(
        "ltx",
        diffusers.LTXPipeline,
        transformer=lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT,
        ),
        vae=vae,
        scheduler=flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    )


def _ltx_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **VIDEO, "height": 64, "guidance_scale": 3.0}


def _ltx2() -> Any:
    return assemble(
        "ltx2",
        diffusers.LTX2Pipeline,
        transformer=lambda: diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=8,
            vae_scale_factors=(8, 32, 32),
        ),
        connectors=lambda: LTX2TextConnectors(
            caption_channels=8,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=4,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=4,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
        ),
        vae=lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
        ),
        audio_vae=lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=8, resolution=32
        ),
        vocoder=lambda: LTX2Vocoder(
            in_channels=16,  # two channels of eight mel bins
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
        scheduler=flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    )


def _ltx2_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    # Each of these, above its rest value, adds a call of half the batch to every step.
    rest = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    return {**_ltx_call(pipe, batch), **rest, "num_frames": 5}


def _mochi() -> Any:
    return assemble(
        "mochi",
        diffusers.MochiPipeline,
        transformer=lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            max_sequence_length=TOKENS,
        ),
        vae=lambda: diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=flow_euler(invert_sigmas=True),
    )


def _mochi_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**text(batch, mask="prompt_attention_mask"), **VIDEO, "num_frames": 7, "guidance_scale": 4.0}


PIPELINES = (
    two_calls("wan", _wan, _wan_call, modality="video"),
    two_calls(
        "wan22",
        lambda: _wan(boundary_ratio=0.8),
        _wan_call,
        denoisers=("transformer", "transformer_2"),
        modality="video",
    ),
    two_calls("wan_per_token", lambda: _wan(expand_timesteps=True), _wan_call, modality="video"),
    one_batch("cogvideox", lambda: _cogvideox(diffusers.CogVideoXDDIMScheduler), _cogvideox_call, modality="video"),
    one_batch("cogvideox_dpm", lambda: _cogvideox(diffusers.CogVideoXDPMScheduler), _cogvideox_call, modality="video"),
    plain("hunyuan_video", _hunyuan_video, _hunyuan_video_call, modality="video"),
    two_calls("hunyuan_video_true_cfg", _hunyuan_video, _hunyuan_video_true_cfg_call, modality="video"),
    one_batch("ltx", _ltx, _ltx_call, modality="video"),
    one_batch("ltx2", _ltx2, _ltx2_call, modality="video"),
    one_batch("mochi", _mochi, _mochi_call, modality="video"),
)
