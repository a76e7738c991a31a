"""Load the two trained models that come with the package, as diffusers pipelines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcache.assets.prompts import PromptEncoder
from diffcache.errors import UnknownName

FOLDER = Path(__file__).parent / "weights"
NAMES = ("flux", "dit")
SIZE = 64
GUIDANCE = 4.0  # scale for the class-conditional model, the default of DiTPipeline


@dataclass(frozen=True)
class DemoModel:
    """A pipeline and the subjects that it can draw.

    Attributes:
        name: "flux" or "dit".
        pipe: The pipeline.
        subjects: Captions (flux) or class names (dit).
        encoder: The encoder of prompts. None for dit.
    """

    name: str
    pipe: Any
    subjects: tuple[str, ...]
    encoder: PromptEncoder | None = None

    def call(self, subjects: Sequence[str], seeds: Sequence[int], *, steps: int = 50, **more: Any) -> dict[str, Any]:
        """Return the arguments of ``pipe(**call)`` for one batch, which returns pictures as float arrays.

        Args:
            subjects: One subject for each sample.
            seeds: One seed for each sample.
            steps: Number of steps of the sampling loop.
            **more: Further arguments. They replace equal ones.

        Raises:
            UnknownName: If dit has no such class.
            BadOption: If flux does not know a word.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        common = {"num_inference_steps": steps, "generator": generators, "output_type": "np"}
        if self.encoder is not None:
            embeds, pooled = self.encoder(subjects)
            own = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": SIZE, "width": SIZE}
        else:
            own = {"class_labels": [self._label(s) for s in subjects], "guidance_scale": GUIDANCE}
        return own | common | more

    def _label(self, subject: str) -> int:
        if subject not in self.subjects:
            raise UnknownName("class", subject, self.subjects)
        return self.subjects.index(subject)


def load(name: str = "flux") -> DemoModel:
    """Load a model from files inside the package. It draws pictures of 64 px, in float32 on the CPU.

    Args:
        name: "flux": text to picture, FluxPipeline, Euler, no guidance. "dit": class to picture, DiTPipeline, DDIM,
            classifier-free guidance.

    Raises:
        UnknownName: If there is no such model.
    """
    if name not in NAMES:
        raise UnknownName("demo model", name, NAMES)
    import diffusers  # slow to import, so it is imported here

    pipe: Any
    vae = diffusers.AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    if name == "flux":
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            transformer=diffusers.FluxTransformer2DModel.from_pretrained(FOLDER / "flux", torch_dtype=torch.float32),
            vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
        subjects = tuple(json.loads((FOLDER / "captions.json").read_text()))
        encoder = PromptEncoder.load(FOLDER / "words.safetensors")
    else:
        classes = json.loads((FOLDER / "classes.json").read_text())
        pipe = diffusers.DiTPipeline(
            transformer=diffusers.DiTTransformer2DModel.from_pretrained(FOLDER / "dit", torch_dtype=torch.float32),
            vae=vae,
            scheduler=diffusers.DDIMScheduler.from_pretrained(FOLDER / "dit"),
            id2label=dict(enumerate(classes)),
        )
        subjects, encoder = tuple(classes), None
    pipe.set_progress_bar_config(disable=True)
    return DemoModel(name, pipe, subjects, encoder)
