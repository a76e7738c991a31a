"""diffusers' own caches: FirstBlockCache, TaylorSeer, MagCache, SeaCache, Pyramid Attention Broadcast, FasterCache.

FluxPipeline is used as the documentation says: ``transformer.enable_cache(config)``. DiTPipeline opens no cache context
and its transformer has no ``enable_cache``, so the caches are put on by the ``apply_*`` functions and told by ``_tell``
what they ask of a pipeline. No cache's own code is replaced.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import diffusers
import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from diffcache.assets import MODELS, load
from diffcache.demo import Size
from diffcache.demo.run import split
from peers.peer import Peer

PACKAGE = "diffusers"
BOTH = ("flux", "dit")
FAMILIES = {"FluxPipeline": "flux", "DiTPipeline": "dit"}
APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "MagCacheConfig": "apply_mag_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "SeaCacheConfig": "apply_sea_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "FasterCacheConfig": "apply_faster_cache",
}
# Where TaylorSeer predicts, per model. Nothing said is the package's own choice, which finds nothing to predict on DiT:
# its attention is called attn1, and its last layer proj_out_2.
TAYLOR: dict[tuple[str, str], dict[str, Any]] = {
    ("attention", "flux"): {},
    ("attention", "dit"): {"cache_identifiers": [r"transformer_blocks\.\d+\.attn1"]},
    ("sublayers", "flux"): {
        "cache_identifiers": [
            r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
            r"single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)",
        ]
    },
    ("sublayers", "dit"): {"cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|ff)"]},
    ("lite", "flux"): {"use_lite_mode": True},
    ("lite", "dit"): {
        "skip_predict_identifiers": [r"transformer_blocks\.\d+"],
        "cache_identifiers": ["proj_out_2"],
    },
    ("attention as shipped", "dit"): {},
    ("lite as shipped", "dit"): {"use_lite_mode": True},
}


def first_block(threshold: float) -> Peer:
    """``threshold``: relative change of the first block's residual up to which the other blocks are skipped."""
    return _peer(
        "FirstBlockCache", f"threshold {threshold:g}", "FirstBlockCacheConfig", lambda *_: {"threshold": threshold}
    )


def mag(threshold: float, *, in_a_row: int, retention: float) -> Peer:
    """Ratios from the package's own calibration, on pictures that nothing is compared on.

    threshold  of the accumulated error
    in_a_row   at most so many steps skipped one after another
    retention  share of the steps, from the beginning, that is always computed
    """

    def settings(pipe: Any, steps: int, separate_cfg: bool) -> dict[str, Any]:
        return {
            "threshold": threshold,
            "max_skip_steps": in_a_row,
            "retention_ratio": retention,
            "num_inference_steps": steps,
            "mag_ratios": list(magnitudes(FAMILIES[type(pipe).__name__], separate_cfg, steps)),
        }

    setting = f"threshold {threshold:g}, at most {in_a_row} in a row, retention {retention:g}"
    return _peer("MagCache", setting, "MagCacheConfig", settings)


def taylor(where: str, every: int, order: int, *, before: int = 3, note: str = "") -> Peer:
    """A full step every ``every`` steps after the first ``before``, extrapolation in between.

    where  "attention": of the attentions' outputs, the package's default; "sublayers": of attentions and feed-forwards,
           as the paper has it; "lite": of the whole model's output; or one of the last two of ``TAYLOR``
    """

    def settings(pipe: Any, *_: Any) -> dict[str, Any]:
        return TAYLOR[where, FAMILIES[type(pipe).__name__]] | {
            "cache_interval": every,
            "disable_cache_before_step": before,
            "max_order": order,
            "taylor_factors_dtype": torch.float32,  # the models' own; the default is bfloat16
        }

    setting = f"{where}, every {every}, order {order}, first {before}"
    models = tuple(name for place, name in TAYLOR if place == where)
    return _peer("TaylorSeer", setting, "TaylorSeerCacheConfig", settings, models, note)


def sea(threshold: float, *, in_a_row: int, order: int = 1) -> Peer:
    """``threshold``: accumulated change of the filtered latents; ``order`` 1 extrapolates the residual, 0 reuses it."""

    def settings(pipe: Any, *_: Any) -> dict[str, Any]:
        return {
            "threshold": threshold,
            "residual_order": order,
            "max_consecutive_cached": in_a_row,
            "raw_vision_callback": functools.partial(_latents, pipe),
        }

    setting = f"threshold {threshold:g}, at most {in_a_row} in a row, order {order}"
    return _peer("SeaCache", setting, "SeaCacheConfig", settings)


def pyramid(every: int, window: tuple[int, int] = (100, 800)) -> Peer:
    """Attention outputs reused, computed every ``every`` steps while the timestep is inside ``window``."""

    def settings(pipe: Any, *_: Any) -> dict[str, Any]:
        return {
            "spatial_attention_block_skip_range": every,
            "spatial_attention_timestep_skip_range": window,
            "current_timestep_callback": functools.partial(_timestep, pipe),
        }

    setting = f"every {every}, timesteps {window[0]} to {window[1]}"
    return _peer("PAB", setting, "PyramidAttentionBroadcastConfig", settings)


def faster(attention: int, branch: int, window: tuple[int, int] = (-1, 681)) -> Peer:
    """``attention``, ``branch``: these are computed every so many steps while the timestep is inside ``window``."""

    def settings(pipe: Any, *_: Any) -> dict[str, Any]:
        return {
            "spatial_attention_block_skip_range": attention,
            "unconditional_batch_skip_range": branch,
            "spatial_attention_timestep_skip_range": window,
            "unconditional_batch_timestep_skip_range": window,
            "tensor_format": "BCHW",
            "is_guidance_distilled": FAMILIES[type(pipe).__name__] == "flux",  # here: no forward with both branches
            "attention_weight_callback": lambda _: 0.5,
            "current_timestep_callback": functools.partial(_timestep, pipe),
            "_unconditional_conditional_input_kwargs_identifiers": ["timestep", "class_labels"],
        }

    setting = f"attention every {attention}, uncond every {branch}, timesteps {window[0]} to {window[1]}"
    return _peer("FasterCache", setting, "FasterCacheConfig", settings)


@functools.cache
def magnitudes(family: str, separate_cfg: bool, steps: int) -> tuple[float, ...]:
    """MagCache's ratios of a demo model, as its calibration prints them.

    With separate forwards it prints one line for each branch, and takes one list for all. The conditional branch ends
    first, and its line is used.
    """
    (name,) = (n for n, about in MODELS.items() if (about.family, about.separate_cfg) == (family, separate_cfg))
    model = load(name)
    (subjects, seeds), _ = split(model, Size(calibration=8, held_out=0))
    config = {"calibrate": True, "num_inference_steps": steps}
    peer = _peer("MagCache", "calibration", "MagCacheConfig", lambda *_: config)
    with redirect_stdout(io.StringIO()) as said, peer.on(model.pipe, steps, separate_cfg=separate_cfg):
        model.pipe(**model.call(subjects, seeds, steps=steps))
    line, *others = re.findall(r"^\[[\d.].*\]$", said.getvalue(), re.MULTILINE)
    if len(others) != separate_cfg:
        raise RuntimeError(f"MagCache printed {1 + len(others)} lines of ratios; expected one for each branch")
    return tuple(json.loads(line))


def _peer(
    name: str,
    setting: str,
    kind: str,
    settings: Callable[[Any, int, bool], dict[str, Any]],
    models: tuple[str, ...] = BOTH,
    note: str = "",
) -> Peer:
    def switch(pipe: Any, steps: int, separate_cfg: bool) -> Callable[[], None]:
        config = getattr(diffusers, kind)(**settings(pipe, steps, separate_cfg))
        transformer = pipe.transformer
        if isinstance(transformer, CacheMixin):
            transformer.enable_cache(config)
            if kind == "SeaCacheConfig":
                _place_contexts(pipe)
            return transformer.disable_cache
        getattr(hooks, APPLY[kind])(transformer, config)
        _tell(pipe, kind)
        return lambda: None  # there is no disable_cache; ``untouched`` takes the hooks off

    return Peer(name=name, package=PACKAGE, setting=setting, models=models, switch=switch, note=note)


def _tell(pipe: Any, kind: str) -> None:
    """Open a cache context around each forward, and reset the caches when a run is over, as newer pipelines do."""
    transformer = pipe.transformer
    forward = transformer.forward

    def told(*args: Any, **kwargs: Any) -> Any:
        vars(transformer)["_told_timestep"] = kwargs["timestep"]
        where = _place(pipe) if kind == "SeaCacheConfig" else {}
        with CacheMixin.cache_context(transformer, "all branches", **where):
            if kind != "FasterCacheConfig":
                return forward(*args, **kwargs)
            # It takes the second half of a batch for the conditional one; DiTPipeline puts that first.
            output = forward(*map(_swapped, args), **{name: _swapped(value) for name, value in kwargs.items()})
            output.sample = _swapped(output.sample)
            return output

    transformer.forward = told
    transformer._reset_stateful_cache = functools.partial(CacheMixin._reset_stateful_cache, transformer)


def _place_contexts(pipe: Any) -> None:
    """Add the place in the loop to the cache contexts that a pipeline opens, one for each branch."""
    opened = pipe.transformer.cache_context
    pipe.transformer.cache_context = lambda name: opened(name, **_place(pipe))


def _swapped(value: Any) -> Any:
    return torch.cat(value.chunk(2)[::-1]) if isinstance(value, Tensor) else value


def _timestep(pipe: Any) -> float:
    """Of the step in progress, 1000 to 0."""
    now = getattr(pipe, "current_timestep", None)
    return float(now if now is not None else vars(pipe.transformer)["_told_timestep"][0])


def _place(pipe: Any) -> dict[str, Any]:
    """Where the loop is. ``sigma``: share of the noise in the state, 0 to 1, for both kinds of noise schedule."""
    scheduler, timestep = pipe.scheduler, _timestep(pipe)
    index = int((scheduler.timesteps - timestep).abs().argmin())
    if hasattr(scheduler, "alphas_cumprod"):
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        sigma = (1 - signal) ** 0.5 / (signal**0.5 + (1 - signal) ** 0.5)
    else:
        sigma = float(scheduler.sigmas[index])
    return {"step_index": index, "num_inference_steps": len(scheduler.timesteps), "sigma": sigma}


def _latents(pipe: Any, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The state, one [C, 1, H, W] per sample."""
    state = args[0] if args else kwargs["hidden_states"]
    if FAMILIES[type(pipe).__name__] == "flux":
        side = int(state.shape[1] ** 0.5) * 2 * pipe.vae_scale_factor
        state = pipe._unpack_latents(state, side, side, pipe.vae_scale_factor)
    return list(state.unsqueeze(2))


PEERS = (
    *(first_block(t) for t in (0.05, 0.08, 0.12, 0.2, 0.3, 0.5)),
    mag(0.06, in_a_row=3, retention=0.2),
    mag(0.12, in_a_row=4, retention=0.1),
    mag(0.24, in_a_row=6, retention=0.1),
    mag(0.5, in_a_row=8, retention=0.06),
    mag(1.0, in_a_row=10, retention=0.06),
    mag(2.0, in_a_row=14, retention=0.06),
    *(taylor("attention", every, 1) for every in (2, 5)),
    *(taylor("sublayers", every, order) for every in (2, 5, 10) for order in (1, 2)),
    *(taylor("lite", every, order) for every in (2, 3, 4, 6, 10) for order in (1, 2)),
    taylor("lite", 12, 1, before=2),
    taylor("attention as shipped", 5, 1, note="its patterns match no module of DiT: nothing is cached"),
    taylor("lite as shipped", 5, 1, note="its patterns miss DiT's last layer: predicted steps are made of zeros"),
    *(sea(t, in_a_row=n, order=o) for t, n in ((0.1, 2), (0.25, 4), (0.5, 8), (1.0, 10)) for o in (0, 1)),
    *(pyramid(every) for every in (2, 4)),
    pyramid(8, (0, 1000)),
    faster(2, 5),
    faster(4, 5, (-1, 950)),
)
