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

A pipeline is one row of a module's ``PIPELINES``. To add one, name its class, the parts that it shares with others of
its kind, what differs, and its arguments:

    plain("flux_kontext", FLUX.within("FluxKontextPipeline"), called(flux_call, image=pictured("image")))

A kind is a ``Parts``: classes of diffusers, by name, and their settings (``parts.py``).
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
from typing import Any

from pipelines import audio, flux, images, unets, videos
from pipelines.more import flux as more_flux
from pipelines.more import images as more_images
from pipelines.more import newer_images, newer_videos, odd_loops, other_unets, sound, unet_videos, wan
from pipelines.more import qwen as more_qwen
from pipelines.more import unets as more_unets
from pipelines.more import videos as more_videos
from pipelines.parts import STEPS
from pipelines.tiny import FLOW, NOISE, Call, Tiny, blocks, built, run, watch, with_scheduler

ROOMS = (flux, images, videos, unets, audio)
MORE = (
    *(more_flux, more_qwen, more_images, newer_images),
    *(more_videos, newer_videos, wan),
    *(more_unets, other_unets, unet_videos),
    *(sound, odd_loops),
)

TINY: dict[str, Tiny] = {tiny.name: tiny for room in ROOMS for tiny in room.PIPELINES}
# Further pipelines and ways of calling them: tried in one walk each (`test_variants.py`), not in every test.
VARIANTS: dict[str, Tiny] = {tiny.name: tiny for room in MORE for tiny in room.PIPELINES}
# What cannot be cached, or not at once, and what the outcome begins with.
LIMITS: dict[str, tuple[Tiny, str]] = {tiny.name: (tiny, says) for tiny, says in odd_loops.LIMITS.items()}
ALL = TINY | VARIANTS | {name: tiny for name, (tiny, _) in LIMITS.items()}


def fresh(name: str) -> Any:
    """Return a new pipeline, for tests that patch it, change it or let a run fail."""
    return built(name, ALL[name].build)


@functools.cache
def shared(name: str) -> Any:
    """One pipeline per process: for tests that only run it, or that undo what they do."""
    return fresh(name)


# What `with_scheduler` may put into which pipeline.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd3", "auraflow", "sana", "wan"), tuple(FLOW)),
    **dict.fromkeys(("flux", "flux2"), ("euler", "dpmpp_2m", "unipc")),
    **dict.fromkeys(("qwen_image", "lumina2", "ltx", "hunyuan_video"), ("euler", "unipc")),
    **dict.fromkeys(("sd15", "sdxl", "sdxl_img2img", "pixart_sigma", "dit", "cogvideox"), tuple(NOISE)),
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
    "ConsisIDPipeline": "needs opencv; its network is tried in a separate loop",
    "EasyAnimateControlPipeline": "passes its own encode_prompt an argument that it does not take",
    "BriaFibo2Pipeline": "needs a Qwen3-VL processor and encoder; embeddings cannot be given",
    "StableDiffusionAttendAndExcitePipeline": "takes gradients through the U-Net",
    "MiniMax, Cosmos 3, Kandinsky 6, SanaWM, Wan-Animate 2": "not tried; their networks are, in loops of their own, "
    "where they can stand in one",
}

__all__ = [
    "ALL",
    "LIMITS",
    "NOT_BUILT",
    "SCHEDULERS",
    "STEPS",
    "TINY",
    "VARIANTS",
    "Call",
    "Tiny",
    "blocks",
    "fresh",
    "run",
    "shared",
    "watch",
    "with_scheduler",
]
