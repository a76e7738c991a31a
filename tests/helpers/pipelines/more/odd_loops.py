"""Loops of other habits: a step taken in parts, noise schedulers of the loop's own, levels set up within the loop."""

from __future__ import annotations

from pipelines.flux import FLUX2
from pipelines.more.flux import flux2_edit_call
from pipelines.more.newer_videos import HELIOS, helios_call
from pipelines.more.qwen import QWEN_21, qwen_21_call
from pipelines.more.unets import SD15, tiny
from pipelines.more.wan import ANY_FLOW, SKY_REELS
from pipelines.parts import LEFT_OUT, called, network, part
from pipelines.tiny import plain, two_calls, video_two_calls
from pipelines.unets import sd15_call
from pipelines.videos import wan_call

_FORCING = SKY_REELS.within("SkyReelsV2DiffusionForcingPipeline")
_forcing_call = called(wan_call, prompt=None)

PIPELINES = (
    # Two views of one picture, each with separate states of the noise scheduler.
    tiny("sd15_panorama", SD15, "StableDiffusionPanoramaPipeline", called(sd15_call, height=16, width=576)),
    video_two_calls("sky_reels_forcing", _FORCING, _forcing_call),
    video_two_calls(
        "helios_pyramid",
        # A gamma of a third makes the noise of a block singular.
        HELIOS.within("HeliosPyramidPipeline", scheduler=part("HeliosScheduler", gamma=0.3)),
        # Three sizes, one after the other, with two steps each.
        called(helios_call, num_frames=5, pyramid_num_inference_steps_list=[2, 2, 2], num_inference_steps=LEFT_OUT),
    ),
)

# What cannot be cached, or not at once, and how the reported outcome begins.
LIMITS = {
    tiny("sd15_sag", SD15, "StableDiffusionSAGPipeline", sd15_call): "UnsupportedModel",
    video_two_calls(
        "sky_reels_forcing_in_turn",
        _FORCING,
        # Later frames wait: more iterations than the noise scheduler has timesteps.
        called(_forcing_call, ar_step=2, causal_block_size=1),
        steps=10,
    ): "failed open",
    video_two_calls(
        "any_flow_far",
        ANY_FLOW.within(
            "AnyFlowFARPipeline", transformer=network("AnyFlowFARTransformer3DModel", chunk_partition=(1, 1, 1))
        ),
        wan_call,
    ): "no effect",
    plain("flux2_klein_kv", FLUX2.within("Flux2KleinKVPipeline"), flux2_edit_call): "failed open",
    two_calls(
        "qwen_21_cached", QWEN_21.within("QwenImage21Pipeline"), called(qwen_21_call, use_kv_cache=True)
    ): "failed open",
}
