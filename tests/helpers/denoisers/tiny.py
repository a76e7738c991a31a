"""What a tiny denoiser is, and the loop that it is tried in: the simplest that a diffusers pipeline could have."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from pipelines.parts import STEPS, enliven
from torch import Tensor, nn


def first_tensor(output: Any) -> Tensor:
    """Return the tensor in a denoiser's output: a tensor, a tuple or list, or a dataclass."""
    while not isinstance(output, Tensor):
        output = next(value for value in (output.to_tuple() if hasattr(output, "to_tuple") else output))
    return output


@dataclass(frozen=True)
class TinyDenoiser:
    """One class of denoiser in a configuration that runs in milliseconds.

    make     a new one; it is called under a seed, and every parameter is given a say afterwards
    state    shape of one sample's noisy state
    call     (x [B, *state], t [B], from 1000 down to 0) -> all arguments of ``forward``, by name, as the class's own
             pipeline gives them; rows of other arguments depend on the row alone (``pipelines.normal``)
    taken    the output -> what stands for the change of the state, [B, *state]
    gain     what matrices are multiplied with (``pipelines.enliven``)
    """

    make: Callable[[], nn.Module]
    state: tuple[int, ...]
    call: Callable[[Tensor, Tensor], Mapping[str, Any]]
    taken: Callable[[Any], Tensor] = first_tensor
    name: str = ""
    gain: float = 1.5

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # said by diffusers to itself
            torch.manual_seed(zlib.crc32(self.name.encode()))
            module = self.make().eval().requires_grad_(False)
        enliven(module, self.name, self.gain)
        return module


class Loop(DiffusionPipeline):  # type: ignore[misc]
    """A sampling loop without prompts, guidance or decoding. It returns the final state [B, *state]."""

    tiny: TinyDenoiser

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @classmethod
    def of(cls, tiny: TinyDenoiser) -> Loop:
        pipe = cls(tiny.build(), FlowMatchEulerDiscreteScheduler())
        pipe.tiny = tiny
        return pipe

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int = STEPS, generator: Any = None, batch: int = 1, still: bool = False
    ) -> Tensor:
        """``still``: every step sees the first state and time; returns what the denoiser gave [steps, B, *state]."""
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn((batch, *self.tiny.state), generator=generator)
        outputs = []
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                time = self.scheduler.timesteps[0] if still else t
                output = self.tiny.taken(self.transformer(**self.tiny.call(x, time.expand(batch))))
                outputs.append(output)
                after = self.scheduler.step(output, t, x, return_dict=False)[0]
                x = x if still else after
                bar.update()
        self.maybe_free_model_hooks()
        return torch.stack(outputs) if still else x
