"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004, doi:10.1109/TIP.2003.819861), through torchmetrics.

Gaussian window of 11×11 pixels, σ = 1.5, K = (0.01, 0.03), range 1, population covariance; each colour channel by
itself, then their mean.

torchmetrics' map is averaged over the pixels whose window lies within the picture, as in the paper and in scikit-image.
torchmetrics by itself also counts a rim of five pixels, where the picture is mirrored: ``rim=True`` gives its number.
"""

from __future__ import annotations

import functools

import numpy as np

from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import frame_by_frame
from diffcache.eval.requirements import device_named, package

WINDOW, SIGMA = 11, 1.5
IMAGES, INSTALL = "torchmetrics.functional.image", "'diffcache[eval]'"

RANGE = (-1.0, 1.0)
ABOUT = About(
    "SSIM",
    "",
    "higher",
    "How alike the pictures and the full run's are in brightness, contrast and structure, window by window: 1 is "
    "identical, 0 is unrelated.",
)


def score(found: np.ndarray, reference: np.ndarray, *, rim: bool = False, device: str = "cpu") -> np.ndarray:
    """Pictures or videos, sides of 11 pixels or more -> float64 [N]; of a video the mean of its frames.

    ``rim`` counts the five pixels along the edges as well. Reckoned in float64: in float32, the variances of even parts
    (white backgrounds) cancel, which moves the fifth digit. That is slow for many large pictures on few cores;
    ``device`` takes it elsewhere.
    """
    return frame_by_frame("ssim", found, reference, functools.partial(_ssim, rim=rim, device=device), least=WINDOW)


def check(*, rim: bool = False, device: str = "cpu") -> None:
    """Raise what ``score`` raises, apart from the samples."""
    device_named(device)
    package(IMAGES, purpose="ssim", install=INSTALL)


def _ssim(found: np.ndarray, reference: np.ndarray, rim: bool, device: str) -> np.ndarray:
    import torch

    images = package(IMAGES, purpose="ssim", install=INSTALL)

    a, b = (torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2).to(device) for x in (found, reference))
    _, similarity = images.structural_similarity_index_measure(
        a, b, sigma=SIGMA, kernel_size=WINDOW, data_range=1.0, reduction="none", return_full_image=True
    )
    cut = 0 if rim else WINDOW // 2
    height, width = similarity.shape[-2:]
    inside = similarity[..., cut : height - cut, cut : width - cut]
    return np.asarray(inside.mean(dim=(1, 2, 3)).cpu())
