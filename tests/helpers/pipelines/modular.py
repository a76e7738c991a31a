"""Modular pipelines, from prompt embeddings to latents, made of the parts of tiny pipelines; and what guides them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from torch import Tensor

from pipelines.flux import PIPELINES as FLUX
from pipelines.images import PIPELINES as IMAGES
from pipelines.parts import POOLED, TEXT, TOKENS, assemble, flow_euler, normal, picture, text
from pipelines.tiny import Tiny, built, two_calls
from pipelines.unets import PIPELINES as UNETS
from pipelines.videos import PIPELINES as VIDEOS


@dataclass(frozen=True)
class Modular:
    """One modular pipeline, one way of calling it.

    blocks  module, below diffusers.modular_pipelines, and class of its blocks
    tiny    the pipeline whose parts and call it has
    guider  a new guider; None: as the pipeline comes
    more    makes components that the tiny pipeline lacks, of those it has
    over    arguments that replace those of the tiny pipeline's call, or add to them
    layers  where its repeated blocks are, for guiders that need the name
    """

    blocks: str
    tiny: Tiny
    guider: Callable[[], Any] = lambda: None
    more: Callable[[Any], dict[str, Any]] = lambda plain: {}
    over: dict[str, Any] = field(default_factory=dict)
    layers: str = "auto"

    def build(self, guider: Any = None, blocks: Any = None) -> Any:
        """Return a new pipeline with this guider and these blocks."""
        return built(self.blocks, lambda: self._build(guider, blocks))

    def _build(self, guider: Any, blocks: Any) -> Any:
        module, _, name = self.blocks.rpartition(".")
        blocks = blocks or getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
        pipe, plain = blocks.init_pipeline(), self.tiny.build()
        pipe.set_progress_bar_config(disable=True)
        parts = {**plain.components, **self.more(plain), "guider": guider or self.guider()}
        known = {component.name for component in blocks.expected_components}
        pipe.update_components(**{k: part for k, part in parts.items() if part is not None and k in known})
        return pipe

    def call(self, pipe: Any) -> dict[str, Any]:
        wanted = {parameter.name for parameter in pipe.blocks.inputs}
        return {name: value for name, value in {**self.tiny.call(pipe), **self.over}.items() if name in wanted}


@functools.cache
def shared(name: str) -> Any:
    """One pipeline per process, guided as it comes: for tests that undo what they do."""
    return MODULAR[name].build()


def run(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The latents. Guiders that drop out at random draw from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        latents = pipe(**call, generator=torch.Generator().manual_seed(0), output="latents")
    assert isinstance(latents, Tensor)
    return latents.clone()


class _Parts:
    """What a tiny pipeline is needed for here."""

    def __init__(self, **components: Any) -> None:
        self.components = components

    def set_progress_bar_config(self, **_: Any) -> None:
        pass


def _controlnet(plain: Any) -> dict[str, Any]:
    def controlnet() -> Any:
        return diffusers.ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 8))

    made: dict[str, Any] = assemble("sdxl", _Parts, controlnet=controlnet).components
    return made


def _ip_adapter(plain: Any) -> dict[str, Any]:
    from pipelines.more.unets import with_ip_adapters

    return {"unet": with_ip_adapters(plain).unet}


def _hunyuan_video15() -> Any:
    return assemble(
        "hunyuan_video15",
        _Parts,
        transformer=lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=65,  # noise and picture, 32 of each, and a mask
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=TEXT,
            text_embed_2_dim=TEXT,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 8),
            target_size=64,
        ),
        scheduler=flow_euler(shift=5.0),
    )


def _hunyuan_video15_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    words = text(batch, mask="prompt_embeds_mask")
    return {**words, **{f"{name}_2": value for name, value in words.items()}, "num_inference_steps": 6}


def _connected() -> dict[str, Any]:
    """What the connectors of LTX2 make of a prompt."""
    words: dict[str, Any] = {}
    for sign in ("", "negative_"):
        words[f"{sign}connector_prompt_embeds"] = normal(f"{sign}video words", TOKENS, 8)
        words[f"{sign}connector_audio_prompt_embeds"] = normal(f"{sign}audio words", TOKENS, 8)
        words[f"{sign}connector_attention_mask"] = torch.ones(1, TOKENS)
    return {**words, "batch_size": 1, "dtype": torch.float32}


def cfg(**over: Any) -> Any:
    return guiders.ClassifierFreeGuidance(4.0, **over)


def ltx2_guidance(**over: Any) -> Any:
    settings = {"guidance_scale": 3.0, "spatio_temporal_guidance_blocks": [1], **over}
    return built("LTX2Guidance", lambda: guiders.LTX2Guidance(**settings))


_TINY = {tiny.name: tiny for tiny in (*FLUX, *IMAGES, *UNETS, *VIDEOS)}
_EIGHTHS: dict[str, Any] = {"height": 64, "width": 48}  # their autoencoder is taken to have a factor of 8
_WAN: dict[str, Any] = {"latents": normal("latents", 4, 3, 6, 4)}  # and here 16 channels
_SDXL = Modular(
    "stable_diffusion_xl.modular_blocks_stable_diffusion_xl.StableDiffusionXLCoreDenoiseStep",
    _TINY["sdxl"],
    layers="down_blocks.1.attentions.0.transformer_blocks",
)

MODULAR: dict[str, Modular] = {
    "flux": Modular("flux.modular_blocks_flux.FluxCoreDenoiseStep", _TINY["flux"], over=_EIGHTHS),
    "flux2": Modular("flux2.modular_blocks_flux2.Flux2CoreDenoiseStep", _TINY["flux2"], over=_EIGHTHS),
    "flux2_klein": Modular(
        "flux2.modular_blocks_flux2_klein_base.Flux2KleinBaseCoreDenoiseStep",
        _TINY["flux2"],
        over={**_EIGHTHS, **text(1)},
    ),
    "qwen_image": Modular(
        "qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep", _TINY["qwen_image"], over=_EIGHTHS
    ),
    "z_image": Modular(  # guidance is off as it comes
        "z_image.modular_blocks_z_image.ZImageCoreDenoiseStep", _TINY["z_image"], cfg, over=_EIGHTHS
    ),
    "sd3": Modular(
        "stable_diffusion_3.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep",
        _TINY["sd3"],
        over=_EIGHTHS,
    ),
    "sdxl": _SDXL,
    "sdxl_img2img": replace(_SDXL, over={"image_latents": normal("picture", 4, 16, 12), "strength": 0.7}),
    "sdxl_controlnet": replace(_SDXL, more=_controlnet, over={"control_image": picture("control", 32, 24)}),
    "sdxl_ip_adapter": replace(
        _SDXL,
        more=_ip_adapter,
        over={
            "ip_adapter_embeds": [normal("picture", 1, POOLED)],
            "negative_ip_adapter_embeds": [normal("no picture", 1, POOLED)],
        },
    ),
    "wan": Modular("wan.modular_blocks_wan.WanCoreDenoiseStep", _TINY["wan"], over=_WAN),
    "wan22": Modular("wan.modular_blocks_wan22.Wan22CoreDenoiseStep", _TINY["wan22"], over=_WAN),
    "ltx": Modular("ltx.modular_blocks_ltx.LTXCoreDenoiseStep", _TINY["ltx"]),
    "ltx2": Modular(
        "ltx2.modular_blocks_ltx2.LTX2CoreDenoiseStep",
        _TINY["ltx2"],
        lambda: ltx2_guidance(stg_scale=1.0, modality_scale=2.0),
        lambda plain: {"audio_guider": ltx2_guidance(guidance_scale=5.0)},
        over=_connected(),
    ),
    "hunyuan_video15": Modular(
        "hunyuan_video1_5.modular_blocks_hunyuan_video1_5.HunyuanVideo15CoreDenoiseStep",
        two_calls("hunyuan_video15", _hunyuan_video15, _hunyuan_video15_call, modality="video"),
        over={"latents": normal("latents", 32, 2, 4, 3)},
    ),
}


@dataclass(frozen=True)
class Guided:
    """A guider, on one pipeline.

    make   of where the layers are that it perturbs
    steps  per step the branches it asks for, a letter each: conditional, unconditional, skipped (or perturbed)
    """

    pipeline: str
    make: Callable[[str], Any]
    steps: tuple[str, ...] = ("cu",) * 6


_EVER = 0.0, 1.0  # from here to there, in parts of the run; no guider perturbs the first step
_LATE = ("cu", *("cus",) * 5)
_CHANGING = ("cu", "cus", "cus", "cs", "cs", "cs")


def _second(layers: str, **over: Any) -> Any:
    """The second block of them, left out for one branch."""
    return LayerSkipConfig([1], fqn=layers, **over)


def _perturbed(scale: float = 4.0, **over: Any) -> Callable[[str], Any]:
    def make(layers: str) -> Any:
        config = _second(layers, skip_attention=False, skip_attention_scores=True, skip_ff=False)
        return guiders.PerturbedAttentionGuidance(scale, 2.8, *_EVER, perturbed_guidance_config=config, **over)

    return make


def _skipping(**over: Any) -> Callable[[str], Any]:
    return lambda layers: guiders.SkipLayerGuidance(4.0, 2.8, *_EVER, skip_layer_config=_second(layers), **over)


def _auto(**over: Any) -> Callable[[str], Any]:
    return lambda layers: guiders.AutoGuidance(4.0, auto_guidance_config=_second(layers, **over))


def _smoothed(layers: str) -> Any:
    return guiders.SmoothedEnergyGuidance(4.0, seg_guidance_config={"indices": [1], "fqn": layers})


GUIDED: dict[str, Guided] = {
    "classifier-free": Guided("qwen_image", lambda _: cfg()),
    "classifier-free, late": Guided("wan", lambda _: cfg(start=0.5), ("c", "c", "c", "cu", "cu", "cu")),
    "classifier-free, between": Guided("sdxl", lambda _: cfg(start=0.2, stop=0.7), ("c", "cu", "cu", "cu", "c", "c")),
    "perturbed attention": Guided("qwen_image", _perturbed(), _LATE),
    "perturbed attention, U-Net": Guided("sdxl", _perturbed(), _LATE),
    "perturbed attention alone": Guided("qwen_image", _perturbed(1.0), ("c", *("cs",) * 5)),
    "perturbed attention stays": Guided("qwen_image", _perturbed(stop=0.5), _CHANGING),
    "skip layer": Guided("wan", _skipping(), _LATE),
    "skip layer stays": Guided("sd3", _skipping(stop=0.5), _CHANGING),
    "skip layer stays, U-Net": Guided("sdxl", _skipping(stop=0.5), _CHANGING),
    "skip layer comes first": Guided("wan", _skipping(start=0.5), ("c", "cs", "cs", "cus", "cus", "cus")),
    "smoothed energy": Guided("sdxl", _smoothed, _LATE),
    "auto": Guided("qwen_image", _auto()),
    "auto, at random": Guided("sdxl", _auto(skip_ff=False, dropout=0.3)),
    "adaptive projected": Guided(
        "qwen_image", lambda _: guiders.AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5)
    ),
    "adaptive projected mix": Guided("sdxl", lambda _: guiders.AdaptiveProjectedMixGuidance(4.0)),
    "zero star": Guided("wan", lambda _: guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=1)),
    "tangential": Guided("qwen_image", lambda _: guiders.TangentialClassifierFreeGuidance(4.0)),
    "magnitude-aware": Guided("qwen_image", lambda _: guiders.MagnitudeAwareGuidance(4.0)),  # tokens only
    "frequency-decoupled": Guided("sdxl", lambda _: guiders.FrequencyDecoupledGuidance([4.0, 2.0])),  # pictures only
}
