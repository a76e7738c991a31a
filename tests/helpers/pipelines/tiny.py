"""What a tiny pipeline is, and how it is run and watched."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import SkipTest

import diffusers
import torch
from packaging.version import Version
from torch import Tensor, nn

from pipelines.parts import STEPS, rows

NEWEST = Version("0.42")  # of diffusers: every pipeline here can be built with it


@dataclass(frozen=True)
class Tiny:
    """One pipeline, one way of calling it, and what its loop is known to do.

    build       a new pipeline on the CPU, float32, in evaluation mode, the same weights every time
    call        (pipe, batch=1) -> keyword arguments of `pipe(...)`, the generator apart
    denoisers   names of the components called at every step
    guidance    separate: one call per branch; batched: both branches in one call of twice the batch; a variant may
                have a separate form, in a few words
    steps       iterations of the loop under `call`: fewer than STEPS after a late start, more for a scheduler that
                evaluates twice
    """

    name: str
    build: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    denoisers: tuple[str, ...]
    guidance: str
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


def built(name: str, build: Callable[[], Any]) -> Any:
    """What ``build`` makes. Where this diffusers is older than the newest that the tests know, and lacks a class for
    it, the test that asks is a skipped one."""
    try:
        return build()
    except (AttributeError, ImportError, TypeError) as error:
        if Version(diffusers.__version__) >= NEWEST:
            raise
        raise SkipTest(f"diffusers {diffusers.__version__} cannot build {name}: {error}") from None


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
            calls.append(Call(component, len(given[names[0]]), timestep.clone(), rows(output).clone()))

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
        # The way of diffusers' own documentation. By default, no clipping: that is for pixels, not latents.
        clip = {"clip_sample": False} if name in ("ddim", "ddpm") and "clip_sample" not in old else {}
        pipe.scheduler = NOISE[name].from_config(old, **clip)
        return pipe
    shifts = {"shift": old.get("shift", old.get("flow_shift", 1.0))}
    if name in ("dpmpp_2m", "unipc"):
        shifts = {"flow_shift": shifts["shift"], "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if name != "heun":
        shifts["use_dynamic_shifting"] = old.get("use_dynamic_shifting", False)
    pipe.scheduler = FLOW[name](**shifts)
    return pipe


def stepped_by(name: str) -> Callable[[Any], Any]:
    """Return ``with_scheduler`` of this noise scheduler."""
    return lambda pipe: with_scheduler(pipe, name)


NOISE: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
}
FLOW: dict[str, Any] = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


plain = functools.partial(Tiny, denoisers=("transformer",), guidance="none", modality="image")
two_calls = functools.partial(Tiny, denoisers=("transformer",), guidance="separate", modality="image")
one_batch = functools.partial(Tiny, denoisers=("transformer",), guidance="batched", modality="image")
unet = functools.partial(Tiny, denoisers=("unet",), guidance="batched", modality="image")
video_plain = functools.partial(plain, modality="video")
video_two_calls = functools.partial(two_calls, modality="video")
video_one_batch = functools.partial(one_batch, modality="video")
TWICE = 2 * STEPS - 1  # a second-order scheduler evaluates twice, but for the last step
