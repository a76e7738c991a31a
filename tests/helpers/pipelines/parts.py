"""What tiny pipelines are made of: seeded parts, prompts, pictures."""

from __future__ import annotations

import functools
import inspect
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

STEPS = 6
TOKENS = 12  # length of every prompt embedding
TEXT = 24  # channels of every prompt embedding (where the model does not fix them)
POOLED = 12  # channels of a pooled prompt embedding


def seeded(tag: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(tag.encode()))


def normal(tag: str, *shape: int, batch: int = 1) -> Tensor:
    """Row i depends on the tag and on i alone, so a sample can be compared alone and among batch mates."""
    return torch.stack([torch.randn(shape, generator=seeded(f"{tag}/{i}")) for i in range(batch)])


def prompt(tag: str, batch: int) -> Tensor:
    """Text embeddings. The tokens of a prompt have a part in common: attention that averages keeps it, and so guidance
    has something to work on."""
    return normal(tag, TOKENS, TEXT, batch=batch) + normal(f"{tag} in common", 1, TEXT, batch=batch)


def picture(tag: str, height: int, width: int, batch: int = 1) -> Tensor:
    """Pixels in [0, 1], channels first."""
    return torch.stack([torch.rand((3, height, width), generator=seeded(f"{tag}/{i}")) for i in range(batch)])


def text(
    batch: int, *, mask: str = "", dtype: torch.dtype = torch.bool, pooled: bool = False, negative: bool = True
) -> dict[str, Tensor]:
    """The arguments that stand for prompts, and for negative prompts: embeddings, pooled ones, masks of this name."""
    arguments: dict[str, Tensor] = {}
    for sign, tag, padding in (("", "prompt", 3), ("negative_", "negative", 5))[: 1 + negative]:
        arguments[f"{sign}prompt_embeds"] = prompt(tag, batch)
        if pooled:
            arguments[f"{sign}pooled_prompt_embeds"] = normal(f"{tag} pooled", POOLED, batch=batch)
        if mask:  # its last positions are padding, as a real prompt's are
            arguments[sign + mask] = (torch.arange(TOKENS) < TOKENS - padding).to(dtype).repeat(batch, 1)
    return arguments


def words(**options: Any) -> Callable[..., dict[str, Tensor]]:
    """Return a function of the pipeline and the batch that returns ``text`` with these options."""
    return lambda _pipe, batch: text(batch, **options)


LEFT_OUT = object()  # the value of an argument that ``called`` removes


def called(*given: Any, **over: Any) -> Callable[..., dict[str, Any]]:
    """Return ``Tiny.call``: the arguments of a pipeline, for a batch.

    given   dictionaries of arguments, and functions of the pipeline and the batch that return one; later ones win
    over    arguments that replace these, or add to them; ``LEFT_OUT`` removes one
    A value that is a function, in a dictionary or in ``over``, is called with the batch.
    """

    def call(pipe: Any, batch: int = 1) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for some in (*given, over):
            values = some(pipe, batch) if callable(some) else some
            made |= {name: value(batch) if callable(value) else value for name, value in values.items()}
        return {name: value for name, value in made.items() if value is not LEFT_OUT}

    return call


def rows(output: Any) -> Tensor:
    """[batch, everything else] of a denoiser's output: a tuple, a dataclass, a list of samples, two streams."""
    if isinstance(output, Tensor):
        return output.detach().flatten(1)
    if isinstance(output, list):
        return torch.stack([sample.detach().flatten() for sample in output])
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return torch.cat([rows(value) for value in values if value is not None], dim=1)


def enliven(module: nn.Module, tag: str, gain: float = 1.5) -> None:
    """Give every parameter a say: noise on the constant ones, and matrices that do not shrink what passes through.

    A constant parameter (a closed gate, a zero projection, a norm of one) hides faults: behind a gate of zero a whole
    block could be skipped and the output would still be right. And torch's own initialisation divides a signal by about
    the square root of 3 at every layer, so that deep blocks and the timestep would hardly matter.
    """
    generator = seeded(tag)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
            elif parameter.ndim > 1:
                parameter.mul_(gain)


def assemble(name: str, pipeline: type, /, gain: float = 1.5, **parts: Any) -> Any:
    """Build a pipeline of these parts; those that are functions are called under a seed, encoders left out are None.

    name   parts of one name have one set of weights in all pipelines
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


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: a class of diffusers, by name, and the arguments that make it."""

    kind: str
    settings: dict[str, Any]

    def __call__(self) -> Any:
        return getattr(diffusers, self.kind)(**self.settings)

    def but(self, **over: Any) -> Part:
        return type(self)(self.kind, {**self.settings, **over})


class Network(Part):
    """A network as it stands among the tiny denoisers, but for these settings."""

    def __call__(self) -> Any:
        from denoisers import TINY as NETWORKS  # not above: they are made of parts of this package

        module = NETWORKS[self.kind].make()
        if not self.settings:
            return module
        size = {name: value for name, value in module.config.items() if not name.startswith("_")}
        return type(module)(**{**size, **self.settings})


def part(kind: str, /, **settings: Any) -> Part:
    return Part(kind, settings)


def network(name: str, /, **over: Any) -> Network:
    return Network(name, over)


@dataclass(frozen=True)
class Parts:
    """What pipelines of one kind are made of.

    weights   parts of one name have one set of weights in all pipelines
    """

    weights: str
    parts: dict[str, Any]
    gain: float = 1.5

    def within(
        self, pipeline: str, weights: str = "", /, *, then: Callable[[Any], Any] = lambda pipe: pipe, **over: Any
    ) -> Callable[[], Any]:
        """Return a function that builds the pipeline of this class, by name.

        weights   another name for the weights
        then      changes the pipeline
        over      what differs: the settings of a part that do, as a dictionary; another part; one more
        """

        def build() -> Any:
            made = dict(self.parts)
            for name, change in over.items():
                made[name] = made[name].but(**change) if isinstance(change, dict) else change
            return then(assemble(weights or self.weights, getattr(diffusers, pipeline), self.gain, **made))

        return build


def flow_euler(**over: Any) -> Part:
    return Part("FlowMatchEulerDiscreteScheduler", over)


def image_vae(levels: int = 2, **over: Any) -> Part:
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
    return Part("AutoencoderKL", {**settings, **over})


# Gentler than any published model's: a random network does not predict the noise, and the division by a vanishing alpha
# at the first steps would blow the sample up by two orders of magnitude.
BETAS: dict[str, Any] = {"beta_start": 0.0005, "beta_end": 0.005}

# Pictures are not square wherever the pipeline allows it: a swapped height and width should not pass.
HEIGHT, WIDTH = 32, 24
IMAGE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
VIDEO: dict[str, Any] = {**IMAGE, "height": 48, "width": 32, "num_frames": 9}


def upper_half(batch: int = 1) -> Tensor:
    """A mask whose upper half is to be made anew."""
    mask = torch.zeros(batch, 1, HEIGHT, WIDTH)
    mask[..., : HEIGHT // 2, :] = 1
    return mask


def pictured(tag: str, height: int = HEIGHT, width: int = WIDTH) -> Callable[[int], Tensor]:
    return functools.partial(picture, tag, height, width)


# Arguments of calls that read pictures.
UNSIZED: dict[str, Any] = {"height": LEFT_OUT, "width": LEFT_OUT}  # of pipelines that take the size from the picture
IMAGE_TO_IMAGE: dict[str, Any] = {"image": pictured("image"), "strength": 0.6}
INPAINT: dict[str, Any] = {**IMAGE_TO_IMAGE, "mask_image": lambda _batch: upper_half()}  # one mask for all
CONTROL: dict[str, Any] = {"control_image": pictured("control")}
