"""More transformers for videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from pipelines.more.wan import ImageProcessor, film, frames, image_encoder
from pipelines.parts import (
    LEFT_OUT,
    POOLED,
    STEPS,
    UNSIZED,
    VIDEO,
    Parts,
    called,
    flow_euler,
    network,
    normal,
    part,
    picture,
    pictured,
    text,
)
from pipelines.tiny import video_one_batch, video_plain, video_two_calls
from pipelines.videos import (
    COGVIDEOX,
    COGVIDEOX_DPM,
    HUNYUAN_VIDEO,
    LTX,
    LTX2,
    hunyuan_video_call,
    hunyuan_video_true_cfg_call,
    ltx2_call,
    ltx_call,
    wan_call,
)

HEIGHT, WIDTH, FRAMES = VIDEO["height"], VIDEO["width"], VIDEO["num_frames"]
_TWICE_AS_WIDE = {"in_channels": 4 + 4}  # the condition follows the sample
_FROM_IMAGE = {"image": pictured("image", HEIGHT, WIDTH), "num_frames": FRAMES}
_HUNYUAN_FROM_IMAGE = "HunyuanVideoImageToVideoPipeline"
hunyuan_vae = HUNYUAN_VIDEO.parts["vae"]
VISION = {"image_encoder": image_encoder, "feature_extractor": ImageProcessor}

_FRAMEPACK = Parts(
    "framepack",
    {
        "transformer": network("HunyuanVideoFramepackTransformer3DModel"),
        "vae": hunyuan_vae,
        "scheduler": flow_euler(use_dynamic_shifting=True),
        **VISION,
    },
)
_framepack_call = called(
    hunyuan_video_call,
    image=pictured("image", 64, 48),
    height=64,
    width=48,
    num_frames=9,  # one section
    latent_window_size=3,
    output_type="pt",  # its latents would come back as a list
)
_framepack_sections_call = called(_framepack_call, num_frames=18)  # two sections, each with a separate loop


def _guided() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0)


def _guided_at_first() -> Any:
    return ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5)


def _projected() -> Any:
    return AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.0)


_HUNYUAN15 = Parts(
    "hunyuan_video15",
    {
        "transformer": network("HunyuanVideo15Transformer3DModel", target_size=64),
        "vae": part(
            "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ),
        "scheduler": flow_euler(shift=5.0),
        "guider": _guided,
    },
)


def _sees_five_tokens(pipe: Any) -> Any:
    pipe.vision_num_semantic_tokens = 5
    return pipe


def _hunyuan15_words(_pipe: Any, batch: int) -> dict[str, Any]:
    """Two kinds of text; where the second has none, as here in the negative prompt, it is masked altogether."""
    words = text(batch, mask="prompt_embeds_mask", dtype=torch.int64)
    for sign, length in (("", 3), ("negative_", 0)):
        words[f"{sign}prompt_embeds_2"] = normal(f"{sign}glyphs", 4, POOLED, batch=batch)
        words[f"{sign}prompt_embeds_mask_2"] = (torch.arange(4) < length).long().repeat(batch, 1)
    return words


_hunyuan15_call = called(VIDEO, _hunyuan15_words, height=64, width=48)


def _ltx_conditions(_batch: int) -> Any:
    """The first frame is given and, a little less strictly, the last, which is more tokens than the video has."""
    first, last = frames("condition", 2, 64)
    return [LTXVideoCondition(image=first), LTXVideoCondition(image=last, frame_index=8, strength=0.8)]


def _ltx2_conditions(_batch: int) -> Any:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition  # not in older ones

    first, last = (picture(tag, 64, WIDTH) for tag in ("first", "last"))
    return [LTX2VideoCondition(first, crf=0), LTX2VideoCondition(last, index=1, strength=0.8, crf=0)]


PIPELINES = (
    video_one_batch(
        "cogvideox_image_to_video",
        COGVIDEOX.within("CogVideoXImageToVideoPipeline", transformer=_TWICE_AS_WIDE),
        called(wan_call, image=pictured("image", HEIGHT, WIDTH)),
    ),
    video_one_batch(
        "cogvideox_video_to_video",
        COGVIDEOX.within("CogVideoXVideoToVideoPipeline", "cogvideox_dpm", scheduler=COGVIDEOX_DPM),
        called(wan_call, num_frames=LEFT_OUT, video=film("video"), strength=0.7),
        steps=4,
    ),
    video_one_batch(
        "cogvideox_fun_control",
        COGVIDEOX.within("CogVideoXFunControlPipeline", transformer=_TWICE_AS_WIDE),
        called(
            wan_call,
            num_frames=LEFT_OUT,
            control_video=lambda batch: [frames(f"control {i}", FRAMES) for i in range(batch)],
        ),
    ),
    video_plain(
        "hunyuan_video_beside_an_image",
        HUNYUAN_VIDEO.within(
            _HUNYUAN_FROM_IMAGE, transformer={"in_channels": 4 + 4 + 1, "image_condition_type": "latent_concat"}
        ),
        called(hunyuan_video_call, _FROM_IMAGE),
    ),
    video_two_calls(
        "hunyuan_video_after_an_image",
        HUNYUAN_VIDEO.within(_HUNYUAN_FROM_IMAGE, transformer={"image_condition_type": "token_replace"}),
        called(hunyuan_video_true_cfg_call, _FROM_IMAGE),
    ),
    video_two_calls(
        "hunyuan_sky_reels",
        HUNYUAN_VIDEO.within("HunyuanSkyreelsImageToVideoPipeline", transformer=_TWICE_AS_WIDE),
        called(hunyuan_video_true_cfg_call, _FROM_IMAGE),
    ),
    video_plain("framepack", _FRAMEPACK.within("HunyuanVideoFramepackPipeline"), _framepack_call),
    video_plain(
        "framepack_sections",
        _FRAMEPACK.within("HunyuanVideoFramepackPipeline"),
        _framepack_sections_call,
        steps=2 * STEPS,
    ),
    video_plain(
        "framepack_forward",
        _FRAMEPACK.within("HunyuanVideoFramepackPipeline"),
        called(_framepack_sections_call, sampling_type="vanilla"),
        steps=2 * STEPS,
    ),
    video_two_calls(
        "hunyuan_video15", _HUNYUAN15.within("HunyuanVideo15Pipeline", then=_sees_five_tokens), _hunyuan15_call
    ),
    video_two_calls(
        "hunyuan_video15_guided_at_first",
        _HUNYUAN15.within("HunyuanVideo15Pipeline", then=_sees_five_tokens, guider=_guided_at_first),
        _hunyuan15_call,
        guidance="separate, in the first half",
    ),
    video_two_calls(
        "hunyuan_video15_projected",
        _HUNYUAN15.within("HunyuanVideo15Pipeline", then=_sees_five_tokens, guider=_projected),
        _hunyuan15_call,
    ),
    video_two_calls(
        "hunyuan_video15_image_to_video",
        _HUNYUAN15.within("HunyuanVideo15ImageToVideoPipeline", then=_sees_five_tokens, **VISION),
        called(_hunyuan15_call, UNSIZED, image=lambda _batch: frames("image", 1, 80, 48)[0]),
    ),
    video_one_batch(
        "ltx_image_to_video",
        LTX.within("LTXImageToVideoPipeline"),
        called(ltx_call, image=pictured("image", 64, WIDTH)),
    ),
    video_one_batch(
        "ltx_condition",
        LTX.within("LTXConditionPipeline", scheduler={"use_dynamic_shifting": False}),
        called(ltx_call, conditions=_ltx_conditions),
    ),
    video_one_batch(
        "ltx2_image_to_video",
        LTX2.within("LTX2ImageToVideoPipeline"),
        called(ltx2_call, image=pictured("image", 64, WIDTH), image_crf=0),
    ),
    video_one_batch(
        "ltx2_condition", LTX2.within("LTX2ConditionPipeline"), called(ltx2_call, conditions=_ltx2_conditions)
    ),
    video_one_batch(
        "ltx2_all_guidance",
        LTX2.within("LTX2Pipeline"),
        # Every form of guidance that there is: a call with a block left out, and one without the other stream.
        called(
            ltx2_call,
            {"stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 2.0, "audio_modality_scale": 2.0},
            spatio_temporal_guidance_blocks=[1],
        ),
        guidance="batched, two more branches in separate calls",
    ),
)
