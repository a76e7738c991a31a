"""Load the two trained models that come with the package, as diffusers pipelines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
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
        raise UnknownName(
            "demo model",
            name,
            NAMES,
            next_step="The text model is diffcache.assets.text.load_text().",
        )
    import diffusers  # slow to import, so it is imported here

    with _no_progress_bars():
        pipe, subjects, encoder = _loaded(diffusers, name)
    pipe.set_progress_bar_config(disable=True)
    return DemoModel(name, pipe, subjects, encoder)


def memory_options() -> dict[str, bool]:
    """Return the options of ``from_pretrained`` that keep diffusers from warning that accelerate is not installed.

    They do what diffusers does after the warning.
    """
    from diffusers.utils.import_utils import is_accelerate_available

    return {} if is_accelerate_available() else {"low_cpu_mem_usage": False}


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Load the small files without the progress bars of diffusers."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _loaded(diffusers: Any, name: str) -> tuple[Any, tuple[str, ...], PromptEncoder | None]:
    """Return the pipeline of a model, its subjects, and the encoder of its prompts, if it takes prompts."""

    def network(kind: Any, folder: str) -> Any:
        return kind.from_pretrained(FOLDER / folder, torch_dtype=torch.float32, **memory_options())

    vae = network(diffusers.AutoencoderKL, "vae")
    if name == "flux":
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            transformer=network(diffusers.FluxTransformer2DModel, "flux"),
            vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
        subjects = tuple(json.loads((FOLDER / "captions.json").read_text()))
        return pipe, subjects, PromptEncoder.load(FOLDER / "words.safetensors")
    classes = json.loads((FOLDER / "classes.json").read_text())
    pipe = diffusers.DiTPipeline(
        transformer=network(diffusers.DiTTransformer2DModel, "dit"),
        vae=vae,
        scheduler=diffusers.DDIMScheduler.from_pretrained(FOLDER / "dit"),
        id2label=dict(enumerate(classes)),
    )
    return pipe, tuple(classes), None
