"""Compute the CLIP score, which measures how well pictures fit their prompts.

The score is 100 · max(cos(picture, prompt), 0) of the embeddings of an open_clip model, or of a CLIPModel of
transformers in a folder (Hessel et al. 2021, arXiv 2104.08718).

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
        model: Name of a model in open_clip; or a folder that holds a CLIPModel of transformers and its processor.
        pretrained: One of open_clip's tags for that model, or the file of a checkpoint. None: "openai", or the weights
            in the folder.
        device: The device on which the model runs.
        batch_size: Number of pictures that the model takes at once.

    Attributes:
        title: The name of the score in results. It contains the model and the weights, without which a score has no
            meaning.

    Raises:
        MissingPackageError: If open_clip, or transformers for a folder, is not installed.
        BadOption: If open_clip does not know the model or the tag, weights are given with a folder, there is no such
            device, or the batch size is below 1.
        WeightsError: If the weights cannot be fetched, or belong to another model.
    """

    def __init__(
        self,
        model: str | Path = MODEL,
        pretrained: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = BATCH,
    ) -> None:
        if batch_size < 1:
            raise BadOption("batch_size", batch_size, "1 or more")
        self.device, self.batch_size = device_named(device), batch_size
        self._encoder: _OpenClip | _Folder
        if Path(model).is_dir():
            if pretrained is not None:
                allowed = f"none together with the folder {model}, which holds its weights"
                raise BadOption("pretrained", str(pretrained), allowed)
            self.title = f"CLIP score ({Path(model).resolve().name})"
            self._encoder = _Folder(Path(model), self.device)
        else:
            weights = PRETRAINED if pretrained is None else pretrained
            self.title = f"CLIP score ({model}, {_shown(weights)})"
            self._encoder = _OpenClip(str(model), str(weights), self.device)

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
                batch = [Image.fromarray(picture) for picture in bytes_[n : n + self.batch_size]]
                seen.append(self._encoder.images(batch).double().cpu())
                read.append(self._encoder.texts(list(prompts[n : n + self.batch_size])).double().cpu())
        image, text = (torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy() for rows in (seen, read))
        return image, text


class _OpenClip:
    """A model of open_clip."""

    def __init__(self, model: str, pretrained: str, device: torch.device) -> None:
        clip = package("open_clip", purpose="the CLIP score", install="'diffcache[eval]'")
        options = _weights(clip, model, pretrained)
        try:
            network, _, self._preprocess = clip.create_model_and_transforms(
                model, pretrained=pretrained, device=device, **options
            )
        except Exception as error:  # a file of another format can raise any class
            raise WeightsError(
                f"{pretrained} cannot be loaded into the CLIP model {model}: {_short(error)}. Allowed: a checkpoint of "
                "that model, as open_clip or torch.save(state_dict) writes it. Name the model it was made for: --model."
            ) from error
        self.network: Any = network.eval()
        self._tokenizer: Any = clip.get_tokenizer(model)
        self._device = device

    def images(self, pictures: Sequence[Any]) -> Tensor:
        """Return the embeddings of PIL pictures, [N, D]."""
        batch = torch.stack([self._preprocess(picture) for picture in pictures])
        return torch.as_tensor(self.network.encode_image(batch.to(self._device)))

    def texts(self, prompts: list[str]) -> Tensor:
        """Return the embeddings of prompts, [N, D]."""
        return torch.as_tensor(self.network.encode_text(self._tokenizer(prompts).to(self._device)))


class _Folder:
    """A CLIPModel of transformers and its processor, from a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        found = package("transformers", purpose="a CLIP model in a folder", install="transformers")
        logging = found.utils.logging
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # the weights are loaded at once
        try:
            self.network: Any = found.CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self._processor: Any = found.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # missing files and other models raise many classes
            raise WeightsError(
                f"{folder} cannot be loaded as a CLIP model: {_short(error)}. Allowed: a folder to which a CLIPModel "
                "and a CLIPProcessor of transformers were saved by save_pretrained, or the name of an open_clip model."
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        self._device = device

    def images(self, pictures: Sequence[Any]) -> Tensor:
        """Return the embeddings of PIL pictures, [N, D]."""
        given = self._processor(images=list(pictures), return_tensors="pt").to(self._device)
        return _embeddings(self.network.get_image_features(**given))

    def texts(self, prompts: list[str]) -> Tensor:
        """Return the embeddings of prompts, [N, D]."""
        longest = self.network.config.text_config.max_position_embeddings
        cut = {"padding": True, "truncation": True, "max_length": longest}
        given = self._processor(text=prompts, return_tensors="pt", **cut).to(self._device)
        return _embeddings(self.network.get_text_features(**given))


def _embeddings(found: Any) -> Tensor:
    """Return the embeddings in what transformers returns: version 4 a tensor, version 5 an output that holds it."""
    return torch.as_tensor(getattr(found, "pooler_output", found))


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
        raise BadOption("model", model, _models(len(names), near or [MODEL]))
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


def _models(number: int, some: Sequence[str]) -> str:
    """Return the allowed values of ``model``, for an error."""
    return f"one of open_clip's {number} models, such as {', '.join(some)}; or the folder of a CLIPModel"


def _shown(pretrained: str | Path) -> str:
    return Path(pretrained).name if Path(pretrained).is_file() else str(pretrained)


def _short(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.200}".rstrip(".") or type(error).__name__
