"""Transformers for videos."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from pipelines.parts import POOLED, TEXT, TOKENS, VIDEO, Parts, called, flow_euler, part, words
from pipelines.tiny import video_one_batch, video_plain, video_two_calls

flow_unipc = part("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
wan_vae = part(
    "AutoencoderKLWan",
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.1, 0.9, 1.2, 1.0],
)
wan_network = part(
    "WanTransformer3DModel",
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
WAN = Parts("wan", {"transformer": wan_network, "vae": wan_vae, "scheduler": flow_unipc})
wan_call = called(words(), VIDEO, guidance_scale=4.0)
_V_PREDICTION = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",  # without it the run ends at noise
}  # as the published models have it
COGVIDEOX_DPM = part("CogVideoXDPMScheduler", **_V_PREDICTION)
COGVIDEOX = Parts(
    "cogvideox",
    {
        "transformer": part(
            "CogVideoXTransformer3DModel",
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
        "vae": part(
            "AutoencoderKLCogVideoX",
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "scheduler": part("CogVideoXDDIMScheduler", **_V_PREDICTION),
    },
)

HUNYUAN_VIDEO = Parts(
    "hunyuan_video",
    {
        "transformer": part(
            "HunyuanVideoTransformer3DModel",
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
        "vae": part(
            "AutoencoderKLHunyuanVideo",
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "scheduler": flow_euler(shift=7.0),
    },
)

ltx_call = called(words(mask="prompt_attention_mask"), VIDEO, height=64, guidance_scale=3.0)
LTX2 = Parts(
    "ltx2",
    {
        "transformer": part(
            "LTX2VideoTransformer3DModel",
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
        "connectors": functools.partial(
            LTX2TextConnectors,
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
        "vae": part(
            "AutoencoderKLLTX2Video",
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
        "audio_vae": part(
            "AutoencoderKLLTX2Audio",
            base_channels=4,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=2,
            mel_bins=8,
            resolution=32,
        ),
        "vocoder": functools.partial(
            LTX2Vocoder,
            in_channels=16,  # two channels of eight mel bins
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
        "scheduler": flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    },
)

MOCHI = Parts(
    "mochi",
    {
        "transformer": part(
            "MochiTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            max_sequence_length=TOKENS,
        ),
        "vae": part(
            "AutoencoderKLMochi",
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "scheduler": flow_euler(invert_sigmas=True),
    },
)

mochi_call = called(words(mask="prompt_attention_mask"), VIDEO, num_frames=7, guidance_scale=4.0)

hunyuan_video_call = called(
    words(mask="prompt_attention_mask", pooled=True, negative=False), VIDEO, num_frames=5, guidance_scale=6.0
)
hunyuan_video_true_cfg_call = called(
    hunyuan_video_call, words(mask="prompt_attention_mask", pooled=True), true_cfg_scale=3.0
)


def _few_frames(pipe: Any) -> Any:
    pipe.vae.use_framewise_encoding = pipe.vae.use_framewise_decoding = False  # 9 frames are fewer than one tile
    return pipe


ltx_vae = part(
    "AutoencoderKLLTXVideo",
    latent_channels=8,
    block_out_channels=(8, 8, 8, 8),
    decoder_block_out_channels=(8, 8, 8, 8),
    layers_per_block=(1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1, 1),
    spatio_temporal_scaling=(True, True, False, False),
    decoder_spatio_temporal_scaling=(True, True, False, False),
    patch_size=2,
)
LTX = Parts(
    "ltx",
    {
        "transformer": part(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT,
        ),
        "vae": ltx_vae,
        "scheduler": flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    },
)
# Each of these, above its rest value, adds a call of half the batch to every step.
_REST = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
ltx2_call = called(ltx_call, _REST, num_frames=5)

PIPELINES = (
    video_two_calls("wan", WAN.within("WanPipeline"), wan_call),
    video_two_calls(
        "wan22",
        WAN.within("WanPipeline", transformer_2=wan_network, boundary_ratio=0.8),
        wan_call,
        denoisers=("transformer", "transformer_2"),
    ),
    video_two_calls("wan_per_token", WAN.within("WanPipeline", expand_timesteps=True), wan_call),
    video_one_batch("cogvideox", COGVIDEOX.within("CogVideoXPipeline"), wan_call),
    video_one_batch("cogvideox_dpm", COGVIDEOX.within("CogVideoXPipeline", scheduler=COGVIDEOX_DPM), wan_call),
    video_plain("hunyuan_video", HUNYUAN_VIDEO.within("HunyuanVideoPipeline"), hunyuan_video_call),
    video_two_calls(
        "hunyuan_video_true_cfg", HUNYUAN_VIDEO.within("HunyuanVideoPipeline"), hunyuan_video_true_cfg_call
    ),
    video_one_batch("ltx", LTX.within("LTXPipeline", then=_few_frames), ltx_call),
    video_one_batch("ltx2", LTX2.within("LTX2Pipeline"), ltx2_call),
    video_one_batch("mochi", MOCHI.within("MochiPipeline"), mochi_call),
)
