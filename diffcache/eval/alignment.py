"""Compute the CLIP score, which measures how well pictures fit their prompts.

The score is 100 · max(cos(picture, prompt), 0) of the embeddings of an open_clip model (Hessel et al. 2021, arXiv
2104.08718).

The paper has w · max(cos, 0) with w = 2.5 and puts the prefix "A photo depicts" before the prompt. Here, as in
torchmetrics, w = 1, the scale is 100 and prompts are unchanged. Values are comparable only for one model with one set
of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.errors import BadOption
from diffcache.eval.extractors import PicturesError, as_tensor
from diffcache.eval.requirements import WeightsError, device_named, package

MODEL, PRETRAINED = "ViT-B-32", "openai"  # the model of the paper
BATCH = 32


class ClipScore:
    """A CLIP model that scores pictures against prompts.

    With a tag, the activation (QuickGELU or GELU) is the one that the weights were trained with; open_clip itself only
    warns. With a file, the name of the model decides: OpenAI's own weights need ViT-B-32-quickgelu.

    Args:
        model: Name of a model in open_clip.
        pretrained: One of open_clip's tags for that model, or the file of a checkpoint.
        device: The device on which the model runs.
        batch_size: Number of pictures that the model takes at once.

    Attributes:
        title: The name of the score in results. It contains the model and the weights, without which a score has no
            meaning.

    Raises:
        MissingPackageError: If open_clip is not installed.
        BadOption: If open_clip does not know the model or the tag, there is no such device, or the batch size is below
            1.
        WeightsError: If the weights cannot be fetched, or belong to another model.
    """

    def __init__(
        self,
        model: str = MODEL,
        pretrained: str | Path = PRETRAINED,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = BATCH,
    ) -> None:
        if batch_size < 1:
            raise BadOption("batch_size", batch_size, "1 or more")
        clip = package("open_clip", purpose="the CLIP score", install="'diffcache[eval]'")
        self.device, self.batch_size = device_named(device), batch_size
        self.title = f"CLIP score ({model}, {_shown(pretrained)})"
        options = _weights(clip, model, str(pretrained))
        try:
            network, _, self._preprocess = clip.create_model_and_transforms(
                model, pretrained=str(pretrained), device=self.device, **options
            )
        except Exception as error:  # a file of another format can raise any class
            raise WeightsError(
                f"{pretrained} cannot be loaded into the CLIP model {model}: {_short(error)}. Allowed: a checkpoint of "
                "that model, as open_clip or torch.save(state_dict) writes it. Name the model it was made for: --model."
            ) from error
        self._network: Any = network.eval()
        self._tokenizer: Any = clip.get_tokenizer(model)

    def __call__(self, pictures: np.ndarray | Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Return the CLIP score of each picture and its prompt.

        Args:
            pictures: [N, H, W, 3], float in 0..1 or uint8.
            prompts: One text for each picture. A prompt longer than the model's context is cut there.

        Returns:
            float64 [N] in 0..100.

        Raises:
            PicturesError: If the pictures are not valid, or there is not one prompt for each picture.
        """
        return score(*self.embedded(pictures, prompts))

    def embedded(self, pictures: np.ndarray | Tensor, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of pictures and prompts, float64 [N, D] each, with rows of length 1.

        Args:
            pictures: [N, H, W, 3], float in 0..1 or uint8.
            prompts: One text for each picture.

        Raises:
            PicturesError: If the pictures are not valid, or there is not one prompt for each picture.
        """
        from PIL import Image

        if isinstance(prompts, str) or len(prompts) != len(pictures):
            many = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise PicturesError(f"{many} for {len(pictures)} pictures. Allowed: one prompt for every picture.")
        bytes_ = (as_tensor(pictures).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        seen, read = [], []
        with torch.no_grad():
            for n in range(0, len(bytes_), self.batch_size):
                batch = [self._preprocess(Image.fromarray(picture)) for picture in bytes_[n : n + self.batch_size]]
                seen.append(self._network.encode_image(torch.stack(batch).to(self.device)).double().cpu())
                words = self._tokenizer(list(prompts[n : n + self.batch_size]))
                read.append(self._network.encode_text(words.to(self.device)).double().cpu())
        image, text = (torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy() for rows in (seen, read))
        return image, text


def score(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return 100 · max(cos, 0), float64 [N], of embeddings [N, D] with rows of length 1."""
    return np.asarray(100 * np.maximum((image * text).sum(axis=1), 0))


def by_chance(image: np.ndarray, text: np.ndarray, prompts: Sequence[str]) -> float | None:
    """Return the mean score of pictures with the prompts of other pictures: the floor for the score.

    Prompts are shifted by 1 to 8 positions. Pairs with equal prompts are left out.

    Args:
        image: Embeddings of the pictures, float64 [N, D], with rows of length 1.
        text: Embeddings of the prompts, float64 [N, D], with rows of length 1.
        prompts: The N prompts.

    Returns:
        The mean over the shifts; None if all prompts are the same.
    """
    pairs = [
        score(image[other], np.roll(text, shift, axis=0)[other]).mean()
        for shift in range(1, min(len(prompts), 9))
        if (other := np.array([a != b for a, b in zip(prompts, np.roll(prompts, shift), strict=True)])).any()
    ]
    return float(np.mean(pairs)) if pairs else None


def _weights(clip: Any, model: str, pretrained: str) -> dict[str, Any]:
    """Return the options for open_clip that these weights need, after checking that the weights are available."""
    names = clip.list_models()
    if model not in names:
        near = get_close_matches(model, names, n=3, cutoff=0.4)
        raise BadOption("model", model, f"one of open_clip's {len(names)} models, such as {', '.join(near or [MODEL])}")
    if not pretrained:
        raise BadOption("pretrained", pretrained, "a tag or a file of weights")
    tags = clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        if Path(pretrained).is_file():
            return {}
        raise BadOption(
            "pretrained", pretrained, f"a file that exists, or a tag of {model}: {', '.join(tags) or 'it has none'}"
        )
    settings = clip.get_pretrained_cfg(model, pretrained)
    try:
        clip.download_pretrained(settings)
    except Exception as error:  # the hub client and the network raise many classes
        raise WeightsError(
            f"the weights {pretrained!r} of the CLIP model {model} are not on this machine and could not be fetched: "
            f"{_short(error)}. Allowed: a machine with a network, or the file of a checkpoint: --pretrained FILE "
            "(pretrained=)."
        ) from error
    return {"force_quick_gelu": True} if settings.get("quick_gelu") else {}


def _shown(pretrained: str | Path) -> str:
    return Path(pretrained).name if Path(pretrained).is_file() else str(pretrained)


def _short(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.200}".rstrip(".") or type(error).__name__
