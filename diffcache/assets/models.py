"""Load the trained models that come with the package, as diffusers pipelines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffcache.assets.prompts import PromptEncoder
from diffcache.errors import UnknownName

FOLDER = Path(__file__).parent / "weights"
SIZE = 64
SEPARATE = "true_cfg_scale"  # the argument of pipelines that compute the branches of guidance in separate forwards


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a demo model is, in the words of tables and titles.

    Attributes:
        family: "flux" or "dit", the network and its pipeline.
        title: The family, as texts write it.
        task: What the model does.
        network: The kind of network and its size.
        sampler: The noise scheduler.
        guidance: Argument of classifier-free guidance -> scale. Empty without guidance.
    """

    family: str
    title: str
    task: str
    network: str
    sampler: str
    guidance: dict[str, float] = field(default_factory=dict)

    @property
    def separate_cfg(self) -> bool:
        """Whether a step computes the branches of guidance in separate forwards."""
        return SEPARATE in self.guidance

    @property
    def guidance_words(self) -> str:
        """The guidance with its scale."""
        kind = "true classifier-free guidance" if self.separate_cfg else "classifier-free guidance"
        return f"{kind} {next(iter(self.guidance.values())):g}" if self.guidance else "no guidance"

    @property
    def short(self) -> str:
        """The name in a row of a table."""
        return f"{self.title}, guided" if self.guidance else self.title


_FLUX: dict[str, Any] = {
    "family": "flux",
    "title": "Flux",
    "task": "text to picture",
    "network": "a Flux transformer of 5.7 M parameters",
    "sampler": "Euler",
}
MODELS: dict[str, About] = {
    "flux": About(**_FLUX),
    "dit": About(
        family="dit",
        title="DiT",
        task="class to picture",
        network="a DiT of 4.8 M parameters",
        sampler="DDIM",
        guidance={"guidance_scale": 4.0},  # the default of DiTPipeline
    ),
    "flux-guided": About(**_FLUX, guidance={SEPARATE: 5.0}),
}
NAMES = tuple(MODELS)


@dataclass(frozen=True)
class DemoModel:
    """A pipeline and the subjects that it can draw.

    Attributes:
        name: A key of ``MODELS``.
        pipe: The pipeline.
        subjects: Captions (flux) or class names (dit).
        encoder: The encoder of prompts. None for dit.
    """

    name: str
    pipe: Any
    subjects: tuple[str, ...]
    encoder: PromptEncoder | None = None

    @property
    def about(self) -> About:
        """What the model is."""
        return MODELS[self.name]

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
        own: dict[str, Any]
        if self.encoder is not None:
            embeds, pooled = self.encoder(subjects)
            own = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": SIZE, "width": SIZE}
            if self.about.separate_cfg:
                embeds, pooled = self.encoder([""] * len(subjects))
                own |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        else:
            own = {"class_labels": [self._label(s) for s in subjects]}
        return own | self.about.guidance | common | more

    def _label(self, subject: str) -> int:
        if subject not in self.subjects:
            raise UnknownName("class", subject, self.subjects)
        return self.subjects.index(subject)


def load(name: str = "flux") -> DemoModel:
    """Load a model from files inside the package. It draws pictures of 64 px, in float32 on the CPU.

    Args:
        name: "flux": text to picture, FluxPipeline, Euler, no guidance. "flux-guided": the same with true
            classifier-free guidance and the empty prompt as negative prompt, two forwards a step. "dit": class to
            picture, DiTPipeline, DDIM, classifier-free guidance in one batch.

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
        pipe, subjects, encoder = _loaded(diffusers, MODELS[name].family)
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


def _loaded(diffusers: Any, family: str) -> tuple[Any, tuple[str, ...], PromptEncoder | None]:
    """Return the pipeline of a family, its subjects, and the encoder of its prompts, if it takes prompts."""

    def network(kind: Any, folder: str) -> Any:
        return kind.from_pretrained(FOLDER / folder, torch_dtype=torch.float32, **memory_options())

    vae = network(diffusers.AutoencoderKL, "vae")
    if family == "flux":
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
