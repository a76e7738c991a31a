"""Tiny pipelines of real diffusers classes, built offline from constructor arguments: what all else is proven on.

Weights are random but seeded, and nothing in a denoiser is left at the zeros or ones a fresh model starts with (closed
gates, zero projections): every block has a say in the result. The pictures mean nothing; these pipelines are for
identity, state, counting, shapes and guidance, never for quality.

    pipe = fresh("flux")                        # a new object; patch it freely
    latents = run(pipe, TINY["flux"].call(pipe))
    with watch(pipe, TINY["flux"].denoisers) as calls: ...

`call(pipe, batch=n)` makes a call for n prompts whose rows do not depend on n, and `run(..., seed=[3, 5])` gives every
sample its own generator. Torch does not promise equal bits at another batch size (they differ in the last digits here):
to show that a sample ignores its batch mates, change the mates and keep the size.
"""

# How the loops behave, read in the source of diffusers 0.42.1 and seen at run time.
#
#   bar      with: `with self.progress_bar(total=n)` around the loop; iter: `for t in self.progress_bar(timesteps)`.
#            n is num_inference_steps (what is left of it after a late start), not the number of iterations: a Heun
#            loop runs 2n-1 times and a PNDM loop n+1 (n+9 with its Runge-Kutta start) under a bar of n.
#   begin    argument of `scheduler.set_begin_index`, by the pipeline, before the loop; -: never called, the noise
#            scheduler looks its index up by the first timestep; none: this noise scheduler has no such thing.
#   input    how the noisy sample reaches the denoiser: p positional, k keyword, and its name.
#   time     what the denoiser is given as time, [shape]; B is the batch the denoiser sees. k unless marked p. A bare t
#            has the noise scheduler's type: int64 for DDIM, DDPM, PNDM, DPM-Solver and UniPC, else float32.
#   output   tuple: `(sample,)` from return_dict=False; data: a dataclass with `.sample`.
#   guided   2x: two calls, first branch first; [a,b]: one call, the two halves of the batch; -: one branch.
#   context  names passed to `denoiser.cache_context` (where there is one, the calls are inside it).
#
# pipeline           bar   begin    input              time                   output    guided          context
# flux               with  0        k hidden_states    t/1000 [B]             tuple     2x cond,uncond  cond, uncond
# flux_img2img       with  t_start  k hidden_states    t/1000 [B]             tuple     2x cond,uncond  -
# flux_inpaint       with  t_start  k hidden_states    t/1000 [B]             tuple     2x cond,uncond  -
# flux_control       with  -        k hidden_states    t/1000 [B]             tuple     -               -
# flux_kontext       with  0        k hidden_states    t/1000 [B]             tuple     2x cond,uncond  -
# flux_controlnet    with  -        k hidden_states    t/1000 [B]             tuple     2x cond,uncond  -
# flux2              with  0        k hidden_states    t/1000 [B]             tuple     -               -
# chroma             with  0        k hidden_states    t/1000 [B]             tuple     2x cond,uncond  -
# qwen_image         with  0        k hidden_states    t/1000 [B]             tuple     2x cond,uncond  cond, uncond
# sd3, sd3_controln. with  -        k hidden_states    t [B]                  tuple     [uncond,cond]   -
# pixart_sigma       with  -        p hidden_states    t [B]                  tuple     [uncond,cond]   -
# dit                iter  none     p hidden_states    t [B]                  data      [cond,uncond]   -
# z_image            with  0        p x: list          p t: 1 - t/1000 [B]    ([..],)   [cond,uncond]   -
# sana               with  -        p hidden_states    t * timestep_scale [B] tuple     [uncond,cond]   -
# lumina2            with  0        k hidden_states    1 - t/1000 [B]         tuple     2x cond,uncond  -
# auraflow           with  0        p hidden_states    t/1000 [B]             tuple     [uncond,cond]   -
# wan, wan22         with  0        k hidden_states    t [B]                  tuple     2x cond,uncond  cond, uncond
# wan_per_token      with  0        k hidden_states    t [B, tokens]          tuple     2x cond,uncond  cond, uncond
# cogvideox          with  none     k hidden_states    t [B]                  tuple     [uncond,cond]   cond_uncond
# hunyuan_video      with  0        k hidden_states    t [B]                  tuple     2x cond,uncond  cond, uncond
# ltx                with  -        k hidden_states    t [B]                  tuple     [uncond,cond]   cond_uncond
# ltx2               with  0, twice k hidden_states    t [B]                  (v, a)    [uncond,cond]   cond_uncond, ..
# mochi              with  0        k hidden_states    t [B], rising from 0   tuple     [uncond,cond]   cond_uncond
# sdxl               with  0        p sample           p t []                 tuple     [uncond,cond]   -
# sdxl_img2img       with  t_start  p sample           p t []                 tuple     [uncond,cond]   -
# sd15, ..controlnet with  - / none p sample           p t []                 tuple     [uncond,cond]   -
# ddpm, ddim         iter  none     p sample           p t []                 data      -               -
# stable_audio       with  -        p hidden_states    p t [1]                tuple     [uncond,cond]   -
#
# `scheduler.step` is called on `self.scheduler` everywhere; ltx2 also steps its audio on a deep copy, new at each run.
# DDIMPipeline makes a new noise scheduler from the one it is given. Every loop runs under no_grad.
#   flux_control     the input is [sample, control] along channels: wider than the output.
#   flux_kontext     the input is [sample, image] along tokens; the output is as long, its tail is thrown away.
#   *_controlnet     the ControlNet runs before the denoiser at every step, once, and serves both branches.
#   sd3              `skip_guidance_layers` adds a call of half the batch at some steps.
#   pixart_sigma     twice the channels come back; the second half is dropped after guidance. Likewise dit.
#   dit              the doubled batch goes through `scheduler.step` too: its sample has both halves.
#   z_image          the output is negated; guidance is cond + s * (cond - uncond); `cfg_truncation` can end it early.
#   lumina2          the output is negated; `cfg_trunc_ratio` < 1 drops the second call at late steps.
#   wan22            t >= boundary_ratio * 1000: transformer, else transformer_2.
#   cogvideox_dpm    `step(output, old_x0, t, t_before, sample)` -> (sample, x0): five positional arguments, not three.
#   ltx2             two tensors in (`hidden_states`, `audio_hidden_states`), two out; guidance is done on predicted
#                    clean samples, with `scheduler.sigmas[i]`; `stg_scale`, `modality_scale` add calls, half the batch.
#   wan, wan22       pass `step_index`, `sigma` and `num_inference_steps` to `cache_context` as well.
#   U-Nets, dit, pixart_sigma, cogvideox, stable_audio   call `scheduler.scale_model_input` (not ddpm, ddim).
#   dit, pixart_sigma, ddpm, ddim, stable_audio   never set `_num_timesteps` and know no `callback_on_step_end`.
#   the same, and lumina2, auraflow   cannot be interrupted; elsewhere `pipe._interrupt` makes the loop run idle.

from __future__ import annotations

import functools
import inspect
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import Tensor, nn

STEPS = 6
TOKENS = 12  # length of every prompt embedding
TEXT = 24  # channels of every prompt embedding (where the model does not fix them)
POOLED = 12  # channels of a pooled prompt embedding


@dataclass(frozen=True)
class Tiny:
    """One pipeline, one way of calling it, and what its loop is known to do.

    build       a new pipeline on the CPU, float32, in evaluation mode, the same weights every time
    call        (pipe, batch=1) -> keyword arguments of `pipe(...)`, the generator apart
    denoisers   names of the components called at every step
    guidance    separate: one call per branch; batched: both branches in one call of twice the batch
    steps       iterations of the loop under `call`: fewer than STEPS after a late start, more for a scheduler that
                evaluates twice
    """

    name: str
    build: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    denoisers: tuple[str, ...]
    guidance: Literal["none", "separate", "batched"]
    modality: Literal["image", "video", "audio"]
    steps: int = STEPS


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, as a hook on the module saw it.

    batch     rows of the main input, or members where it is a list
    timestep  what the denoiser was given as time
    output    all that came back, [batch, everything else]
    """

    component: str
    batch: int
    timestep: Tensor
    output: Tensor


def fresh(name: str) -> Any:
    """A pipeline nobody else holds: for tests that patch it, change it or let a run fail."""
    return TINY[name].build()


@functools.cache
def shared(name: str) -> Any:
    """One pipeline per process: for tests that only run it, or that undo what they do."""
    return TINY[name].build()


def run(pipe: Any, call: dict[str, Any], seed: int | Sequence[int] = 0, **over: Any) -> Tensor:
    """Run with new CPU generators and return one float tensor; several outputs (video and audio) become one row each.

    seed   an integer, or one integer per sample
    over   arguments that replace those of `call`
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    # Some pipelines draw from the global generator too (the control image of the SD3 ControlNet is encoded that way).
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seeds[0])
        warnings.filterwarnings("ignore", message="In CPU autocast")  # Mochi asks for one that does nothing
        output = pipe(**{**call, **over}, generator=generators[0] if isinstance(seed, int) else generators)
    parts = [torch.as_tensor(part).detach().float() for part in output.to_tuple()]
    return parts[0].clone() if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)


@contextmanager
def watch(pipe: Any, denoisers: Sequence[str]) -> Iterator[list[Call]]:
    """Record every call of these components, in order, until the block ends."""
    calls: list[Call] = []

    def listen(component: str, module: nn.Module) -> Any:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]  # the class's: the object may be patched

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            timestep = torch.as_tensor(given["t" if "t" in given else "timestep"])
            calls.append(Call(component, len(given[names[0]]), timestep.clone(), _rows(output).clone()))

        return module.register_forward_hook(hook, with_kwargs=True)

    with ExitStack() as undo:
        for component in denoisers:
            undo.callback(listen(component, getattr(pipe, component)).remove)
        yield calls


def blocks(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of a denoiser by name; those inside a block (a U-Net's layers) as well as the block itself."""
    return {name: module for name, module in denoiser.named_modules() if "Block" in type(module).__name__}


def with_scheduler(pipe: Any, name: str) -> Any:
    """Swap the noise scheduler of `pipe` in place, in the flavour (flow or noise prediction) it was built for.

    `SCHEDULERS` says which names a pipeline's loop can work with.
    """
    old = pipe.scheduler.config
    if "shift" not in old and not old.get("use_flow_sigmas"):
        # The way of diffusers' own documentation. Where nothing is said, no clipping: that is for pixels, not latents.
        clip = {"clip_sample": False} if name in ("ddim", "ddpm") and "clip_sample" not in old else {}
        pipe.scheduler = _NOISE[name].from_config(old, **clip)
        return pipe
    shifts = {"shift": old.get("shift", old.get("flow_shift", 1.0))}
    if name in ("dpmpp_2m", "unipc"):
        shifts = {"flow_shift": shifts["shift"], "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if name != "heun":
        shifts["use_dynamic_shifting"] = old.get("use_dynamic_shifting", False)
    pipe.scheduler = _FLOW[name](**shifts)
    return pipe


_NOISE: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
}
_FLOW: dict[str, Any] = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


# --- parts -----------------------------------------------------------------------------------------------------------


def _generator(tag: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(tag.encode()))


def _normal(tag: str, *shape: int, batch: int = 1) -> Tensor:
    """Row i depends on the tag and on i alone, so a sample can be compared alone and among batch mates."""
    return torch.stack([torch.randn(shape, generator=_generator(f"{tag}/{i}")) for i in range(batch)])


def _prompt(tag: str, batch: int) -> Tensor:
    """Text embeddings. The tokens of a prompt have a part in common: attention that averages keeps it, and so guidance
    has something to work on."""
    return _normal(tag, TOKENS, TEXT, batch=batch) + _normal(f"{tag} in common", 1, TEXT, batch=batch)


def _picture(tag: str, height: int, width: int, batch: int = 1) -> Tensor:
    """Pixels in [0, 1], channels first."""
    return torch.stack([torch.rand((3, height, width), generator=_generator(f"{tag}/{i}")) for i in range(batch)])


def _text(
    batch: int, *, mask: str = "", dtype: torch.dtype = torch.bool, pooled: bool = False, negative: bool = True
) -> dict[str, Tensor]:
    """The arguments that stand for prompts, and for negative prompts: embeddings, pooled ones, masks of this name."""
    arguments: dict[str, Tensor] = {}
    for sign, tag, padding in (("", "prompt", 3), ("negative_", "negative", 5))[: 1 + negative]:
        arguments[f"{sign}prompt_embeds"] = _prompt(tag, batch)
        if pooled:
            arguments[f"{sign}pooled_prompt_embeds"] = _normal(f"{tag} pooled", POOLED, batch=batch)
        if mask:  # its last positions are padding, as a real prompt's are
            arguments[sign + mask] = (torch.arange(TOKENS) < TOKENS - padding).to(dtype).repeat(batch, 1)
    return arguments


def _rows(output: Any) -> Tensor:
    """[batch, everything else] of whatever a denoiser returns: a tuple, a dataclass, a list of samples, two streams."""
    if isinstance(output, Tensor):
        return output.detach().flatten(1)
    if isinstance(output, list):
        return torch.stack([sample.detach().flatten() for sample in output])
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return torch.cat([_rows(value) for value in values if value is not None], dim=1)


def enliven(module: nn.Module, tag: str, gain: float = 1.5) -> None:
    """Give every parameter a say: noise on the constant ones, and matrices that do not shrink what passes through.

    A constant parameter (a closed gate, a zero projection, a norm of one) hides faults: behind a gate of zero a whole
    block could be skipped and the output would still be right. And torch's own initialisation divides a signal by about
    the square root of 3 at every layer, so that deep blocks and the timestep would hardly matter.
    """
    generator = _generator(tag)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
            elif parameter.ndim > 1:
                parameter.mul_(gain)


def _assemble(name: str, pipeline: type, /, gain: float = 1.5, **parts: Any) -> Any:
    """Build a pipeline of these parts; those that are functions are called under a seed, encoders left out are None.

    name   parts of one name have one set of weights, whatever the pipeline around them
    """
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Said by diffusers to itself: it builds its own models with functions that are on their way out.
        warnings.filterwarnings("ignore", message=".*(FluxPosEmbed|weight_norm)", category=FutureWarning)
        for key, part in parts.items():
            torch.manual_seed(zlib.crc32(f"{name}/{key}".encode()))
            made[key] = part() if callable(part) else part
            if isinstance(made[key], nn.Module):
                enliven(made[key].eval().requires_grad_(False), f"{name}/{key}", gain)
    required = [
        key
        for key, parameter in inspect.signature(pipeline).parameters.items()
        if parameter.default is parameter.empty and key not in made
    ]
    pipe = pipeline(**made, **dict.fromkeys(required))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow_euler(**over: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**over)


def _vae(levels: int = 2, **over: Any) -> Callable[[], Any]:
    """The image autoencoder most pipelines share: 4 latent channels, every level but the first halves the picture."""
    settings: dict[str, Any] = {
        "block_out_channels": (4,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
        "shift_factor": 0.05,
        "scaling_factor": 0.9,
    }
    return lambda: diffusers.AutoencoderKL(**{**settings, **over})


# Gentler than any published model's: a random network does not predict the noise, and the division by a vanishing alpha
# at the first steps would blow the sample up by two orders of magnitude.
_BETAS: dict[str, Any] = {"beta_start": 0.0005, "beta_end": 0.005}

# Pictures are not square wherever the pipeline allows it: a swapped height and width should not pass.
HEIGHT, WIDTH = 32, 24
_IMAGE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
_VIDEO: dict[str, Any] = {**_IMAGE, "height": 48, "width": 32, "num_frames": 9}


# --- Flux and its relatives ------------------------------------------------------------------------------------------

_FLUX_SIZE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 4, 8),
}


def _flux(name: str, pipeline: type, *, distilled: bool = True, controlnet: bool = False, **over: Any) -> Any:
    size = {**_FLUX_SIZE, "guidance_embeds": distilled, **over}
    parts: dict[str, Any] = {
        "transformer": lambda: diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=3, **size),
        "vae": _vae(),
        "scheduler": _flow_euler(shift=3.0, use_dynamic_shifting=True),
    }
    if controlnet:
        parts["controlnet"] = lambda: diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1, **size)
    return _assemble(name, pipeline, **parts)


def _flux_control() -> Any:
    return _flux("flux_control", diffusers.FluxControlPipeline, in_channels=32, out_channels=16)


def _flux_controlnet() -> Any:
    return _flux("flux", diffusers.FluxControlNetPipeline, controlnet=True)


def _flux_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, pooled=True, negative=False), **_IMAGE, "guidance_scale": 3.5}


def _flux_true_cfg_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, pooled=True), **_IMAGE, "guidance_scale": 3.5, "true_cfg_scale": 3.0}


def _flux_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_flux_call(pipe, batch), "image": _picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}


def _flux_inpaint_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return {**_flux_img2img_call(pipe, batch), "mask_image": mask}


def _flux_control_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_flux_call(pipe, batch), "control_image": _picture("control", HEIGHT, WIDTH, batch)}


def _flux_kontext_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    image = _picture("image", HEIGHT, WIDTH, batch)
    return {**_flux_call(pipe, batch), "image": image, "max_area": HEIGHT * WIDTH, "_auto_resize": False}


def _flux2() -> Any:
    return _assemble(
        "flux2",
        diffusers.Flux2Pipeline,
        transformer=lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        scheduler=_flow_euler(use_dynamic_shifting=True),
    )


def _flux2_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, negative=False), **_IMAGE}


def _chroma() -> Any:
    return _assemble(
        "chroma",
        diffusers.ChromaPipeline,
        transformer=lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        vae=_vae(),
        scheduler=_flow_euler(),
    )


def _chroma_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, mask="prompt_attention_mask"), **_IMAGE, "guidance_scale": 4.0}


def _qwen_image() -> Any:
    return _assemble(
        "qwen_image",
        diffusers.QwenImagePipeline,
        transformer=lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
        ),
        scheduler=_flow_euler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def _qwen_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, mask="prompt_embeds_mask", dtype=torch.int64), **_IMAGE, "true_cfg_scale": 4.0}


# --- other image transformers ----------------------------------------------------------------------------------------

_SD3_SIZE: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 16,
}


def _sd3(scheduler: str, *, controlnet: bool = False) -> Any:
    parts: dict[str, Any] = {
        "transformer": lambda: diffusers.SD3Transformer2DModel(
            num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm", **_SD3_SIZE
        ),
        "vae": _vae(),
        "scheduler": _flow_euler(shift=3.0),
    }
    if controlnet:
        parts["controlnet"] = lambda: diffusers.SD3ControlNetModel(num_layers=1, **_SD3_SIZE)
    pipeline = diffusers.StableDiffusion3ControlNetPipeline if controlnet else diffusers.StableDiffusion3Pipeline
    pipe = _assemble("sd3", pipeline, **parts)
    return pipe if scheduler == "euler" else with_scheduler(pipe, scheduler)


def _sd3_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, pooled=True), **_IMAGE, "guidance_scale": 4.0}


def _sd3_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd3_call(pipe, batch), "control_image": _picture("control", HEIGHT, WIDTH, batch)}


def _pixart_sigma() -> Any:
    return _assemble(
        "pixart_sigma",
        diffusers.PixArtSigmaPipeline,
        transformer=lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=16,
        ),
        vae=_vae(),
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(**_BETAS),
    )


def _pixart_sigma_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **_text(batch, mask="prompt_attention_mask", dtype=torch.int64),
        **_IMAGE,
        "negative_prompt": None,  # its default is the empty string, which may not meet embeddings
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }


def _dit() -> Any:
    return _assemble(
        "dit",
        diffusers.DiTPipeline,
        transformer=lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8
        ),
        vae=_vae(),
        scheduler=lambda: diffusers.DDIMScheduler(clip_sample=False, **_BETAS),
    )


def _dit_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    labels = [7 + 100 * i for i in range(batch)]
    return {"class_labels": labels, "guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt"}


def _z_image() -> Any:
    return _assemble(
        "z_image",
        diffusers.ZImagePipeline,
        transformer=lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[8, 4, 4],
            axes_lens=[128, 32, 32],
        ),
        vae=_vae(),
        scheduler=_flow_euler(shift=3.0, use_dynamic_shifting=True),
    )


def _z_image_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": list(_prompt("prompt", batch)),
        "negative_prompt_embeds": list(
            _prompt("negative", batch)[:, 3:]
        ),  # shorter: each sample has a length of its own
        **_IMAGE,
        "guidance_scale": 3.0,
    }


def _sana() -> Any:
    return _assemble(
        "sana",
        diffusers.SanaPipeline,
        transformer=lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=8,
        ),
        vae=lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        ),
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _sana_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **_text(batch, mask="prompt_attention_mask", dtype=torch.int64),
        **_IMAGE,
        "negative_prompt": None,  # its default is the empty string, which may not meet embeddings
        "guidance_scale": 4.0,
        "height": 64,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }


def _lumina2() -> Any:
    return _assemble(
        "lumina2",
        diffusers.Lumina2Pipeline,
        transformer=lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(64, 32, 32),
            cap_feat_dim=TEXT,
        ),
        vae=_vae(levels=4),  # the pipeline takes a factor of 8 for granted
        scheduler=_flow_euler(shift=6.0),
    )


def _lumina2_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    sizes = {"height": 96, "width": 64}
    return {**_text(batch, mask="prompt_attention_mask"), **_IMAGE, **sizes, "guidance_scale": 4.0}


def _auraflow() -> Any:
    return _assemble(
        "auraflow",
        diffusers.AuraFlowPipeline,
        gain=2.0,  # text passes two gates in a row here
        transformer=lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=TEXT,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
        vae=_vae(),
        scheduler=_flow_euler(shift=1.73),
    )


def _auraflow_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, mask="prompt_attention_mask"), **_IMAGE, "guidance_scale": 3.5}


# --- video -----------------------------------------------------------------------------------------------------------


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

    return _assemble(
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
    return {**_text(batch), **_VIDEO, "guidance_scale": 4.0}


def _cogvideox(scheduler: type) -> Any:
    return _assemble(
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
    return {**_text(batch), **_VIDEO, "guidance_scale": 4.0}


def _hunyuan_video() -> Any:
    return _assemble(
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
        scheduler=_flow_euler(shift=7.0),
    )


def _hunyuan_video_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    text = _text(batch, mask="prompt_attention_mask", pooled=True, negative=False)
    return {**text, **_VIDEO, "num_frames": 5, "guidance_scale": 6.0}


def _hunyuan_video_true_cfg_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    text = _text(batch, mask="prompt_attention_mask", pooled=True)
    return {**_hunyuan_video_call(pipe, batch), **text, "true_cfg_scale": 3.0}


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

    return _assemble(
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
        scheduler=_flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    )


def _ltx_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, mask="prompt_attention_mask"), **_VIDEO, "height": 64, "guidance_scale": 3.0}


def _ltx2() -> Any:
    return _assemble(
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
        scheduler=_flow_euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
    )


def _ltx2_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    # Each of these, above its rest value, adds a call of half the batch to every step.
    rest = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    return {**_ltx_call(pipe, batch), **rest, "num_frames": 5}


def _mochi() -> Any:
    return _assemble(
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
        scheduler=_flow_euler(invert_sigmas=True),
    )


def _mochi_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, mask="prompt_attention_mask"), **_VIDEO, "num_frames": 7, "guidance_scale": 4.0}


# --- U-Nets ----------------------------------------------------------------------------------------------------------

_SD15_BETAS: dict[str, Any] = {**_BETAS, "beta_schedule": "scaled_linear"}
_SD15_SIZE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def _sd15(scheduler: str, *, controlnet: bool = False) -> Any:
    parts: dict[str, Any] = {
        "unet": lambda: diffusers.UNet2DConditionModel(
            sample_size=16, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_SD15_SIZE
        ),
        "vae": _vae(shift_factor=None, force_upcast=False),
        "scheduler": lambda: diffusers.PNDMScheduler(
            skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **_SD15_BETAS
        ),
        "requires_safety_checker": False,
    }
    if controlnet:
        # The picture reaches the network at an eighth of its size and the U-Net at a half: two strides fewer.
        parts["controlnet"] = lambda: diffusers.ControlNetModel(
            conditioning_embedding_out_channels=(4, 8), **_SD15_SIZE
        )
    pipeline = diffusers.StableDiffusionControlNetPipeline if controlnet else diffusers.StableDiffusionPipeline
    pipe = _assemble("sd15", pipeline, **parts)
    return pipe if scheduler == "pndm" else with_scheduler(pipe, scheduler)


def _sd15_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch), **_IMAGE, "guidance_scale": 4.0}


def _sd15_controlnet_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_sd15_call(pipe, batch), "image": _picture("control", HEIGHT, WIDTH, batch)}


def _sdxl(pipeline: type) -> Any:
    return _assemble(
        "sdxl",
        pipeline,
        unet=lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=TEXT,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,  # six numbers of size and crop
        ),
        vae=_vae(shift_factor=None, force_upcast=False),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **_SD15_BETAS),
    )


def _sdxl_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {**_text(batch, pooled=True), **_IMAGE, "guidance_scale": 4.0}


def _sdxl_img2img_call(pipe: Any, batch: int = 1) -> dict[str, Any]:
    call = {**_sdxl_call(pipe, batch), "image": _picture("image", HEIGHT, WIDTH, batch), "strength": 0.6}
    del call["height"], call["width"]
    return call


def _pixels(pipeline: type) -> Any:
    return _assemble(
        "pixels",
        pipeline,
        unet=lambda: diffusers.UNet2DModel(
            sample_size=(16, 12),
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=lambda: diffusers.DDPMScheduler(**_BETAS),  # DDIMPipeline makes its own of it
    )


def _pixels_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {"batch_size": batch, "num_inference_steps": STEPS, "output_type": "pt"}


# --- audio -----------------------------------------------------------------------------------------------------------


def _stable_audio() -> Any:
    return _assemble(
        "stable_audio",
        diffusers.StableAudioPipeline,
        gain=1.2,  # the sample starts fifty times too large, so errors of prediction are as large
        transformer=lambda: diffusers.StableAudioDiTModel(
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
        projection_model=lambda: StableAudioProjectionModel(
            text_encoder_dim=TEXT, conditioning_dim=16, min_value=0, max_value=32
        ),
        vae=lambda: diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=4,
        ),
        # The published model comes with the cosine scheduler, which needs torchsde; this one the pipeline names itself.
        scheduler=lambda: diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=50, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),
    )


def _stable_audio_call(_pipe: Any, batch: int = 1) -> dict[str, Any]:
    return {
        **_text(batch, mask="attention_mask", dtype=torch.int64),
        "guidance_scale": 4.0,
        "audio_end_in_s": 6.0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


# --- the table -------------------------------------------------------------------------------------------------------

_plain = functools.partial(Tiny, denoisers=("transformer",), guidance="none", modality="image")
_two_calls = functools.partial(Tiny, denoisers=("transformer",), guidance="separate", modality="image")
_one_batch = functools.partial(Tiny, denoisers=("transformer",), guidance="batched", modality="image")
_unet = functools.partial(Tiny, denoisers=("unet",), guidance="batched", modality="image")
_TWICE = 2 * STEPS - 1  # a second-order scheduler evaluates twice, but for the last step

_ALL = (
    _plain("flux", lambda: _flux("flux", diffusers.FluxPipeline), _flux_call),
    _two_calls("flux_true_cfg", lambda: _flux("flux", diffusers.FluxPipeline, distilled=False), _flux_true_cfg_call),
    _plain("flux_img2img", lambda: _flux("flux", diffusers.FluxImg2ImgPipeline), _flux_img2img_call, steps=4),
    _plain("flux_inpaint", lambda: _flux("flux", diffusers.FluxInpaintPipeline), _flux_inpaint_call, steps=4),
    _plain("flux_control", _flux_control, _flux_control_call),
    _plain("flux_kontext", lambda: _flux("flux", diffusers.FluxKontextPipeline), _flux_kontext_call),
    _plain("flux_controlnet", _flux_controlnet, _flux_control_call),
    _plain("flux2", _flux2, _flux2_call),
    _two_calls("chroma", _chroma, _chroma_call),
    _two_calls("qwen_image", _qwen_image, _qwen_image_call),
    _one_batch("sd3", lambda: _sd3("euler"), _sd3_call),
    _one_batch("sd3_heun", lambda: _sd3("heun"), _sd3_call, steps=_TWICE),
    _one_batch("sd3_controlnet", lambda: _sd3("euler", controlnet=True), _sd3_controlnet_call),
    _one_batch("pixart_sigma", _pixart_sigma, _pixart_sigma_call),
    _one_batch("dit", _dit, _dit_call),
    _one_batch("z_image", _z_image, _z_image_call),
    _one_batch("sana", _sana, _sana_call),
    _two_calls("lumina2", _lumina2, _lumina2_call),
    _one_batch("auraflow", _auraflow, _auraflow_call),
    _two_calls("wan", _wan, _wan_call, modality="video"),
    _two_calls(
        "wan22",
        lambda: _wan(boundary_ratio=0.8),
        _wan_call,
        denoisers=("transformer", "transformer_2"),
        modality="video",
    ),
    _two_calls("wan_per_token", lambda: _wan(expand_timesteps=True), _wan_call, modality="video"),
    _one_batch("cogvideox", lambda: _cogvideox(diffusers.CogVideoXDDIMScheduler), _cogvideox_call, modality="video"),
    _one_batch("cogvideox_dpm", lambda: _cogvideox(diffusers.CogVideoXDPMScheduler), _cogvideox_call, modality="video"),
    _plain("hunyuan_video", _hunyuan_video, _hunyuan_video_call, modality="video"),
    _two_calls("hunyuan_video_true_cfg", _hunyuan_video, _hunyuan_video_true_cfg_call, modality="video"),
    _one_batch("ltx", _ltx, _ltx_call, modality="video"),
    _one_batch("ltx2", _ltx2, _ltx2_call, modality="video"),
    _one_batch("mochi", _mochi, _mochi_call, modality="video"),
    _unet("sdxl", lambda: _sdxl(diffusers.StableDiffusionXLPipeline), _sdxl_call),
    _unet("sdxl_img2img", lambda: _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), _sdxl_img2img_call, steps=3),
    _unet("sd15", lambda: _sd15("pndm"), _sd15_call, steps=STEPS + 1),  # PNDM visits its second timestep twice
    _unet("sd15_ddim", lambda: _sd15("ddim"), _sd15_call),
    _unet("sd15_heun", lambda: _sd15("heun"), _sd15_call, steps=_TWICE),
    _unet("sd15_controlnet", lambda: _sd15("ddim", controlnet=True), _sd15_controlnet_call),
    _unet("ddpm", lambda: _pixels(diffusers.DDPMPipeline), _pixels_call, guidance="none"),
    _unet("ddim", lambda: _pixels(diffusers.DDIMPipeline), _pixels_call, guidance="none"),
    _one_batch("stable_audio", _stable_audio, _stable_audio_call, modality="audio"),
)
TINY: dict[str, Tiny] = {tiny.name: tiny for tiny in _ALL}

# What `with_scheduler` may put into which pipeline.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd3", "auraflow", "sana", "wan"), tuple(_FLOW)),
    **dict.fromkeys(("flux", "flux2"), ("euler", "dpmpp_2m", "unipc")),
    **dict.fromkeys(("qwen_image", "lumina2", "ltx", "hunyuan_video"), ("euler", "unipc")),
    **dict.fromkeys(("sd15", "sdxl", "sdxl_img2img", "pixart_sigma", "dit", "cogvideox"), tuple(_NOISE)),
    "ddpm": ("ddpm", "ddim", "dpmpp_2m"),
}

# What was tried or asked for and is not here, and why.
NOT_BUILT: dict[str, str] = {
    "flux with heun": "its set_timesteps takes neither `sigmas` nor `mu`, and the pipeline always passes both; so do "
    "flux2, chroma, qwen_image, lumina2, z_image and ltx (hunyuan_video and mochi pass sigmas). sd3_heun stands in",
    "qwen_image with dpmpp_2m": "its set_timesteps takes no `sigmas`; likewise chroma, lumina2, z_image, ltx, "
    "hunyuan_video, mochi. flux and flux2 leave them out when the scheduler has `use_flow_sigmas`",
    "flux_img2img with unipc": "adding noise at the late start needs `scale_noise`, which only the flow-matching Euler "
    "and Heun schedulers have",
    "z_image with unipc": "the pipeline passes its sigmas as a list, and UniPC computes with them",
    "mochi with another": "nothing but the flow-matching Euler scheduler can invert its sigmas",
    "ddpm with heun": "DDPMPipeline passes a generator to every `step`; Heun, UniPC and PNDM take none. And Euler "
    "needs `scale_model_input`, which the pipeline never calls",
    "stable_audio with cosine": "CosineDPMSolverMultistepScheduler needs torchsde",
    "LoRA": "needs peft",
}
