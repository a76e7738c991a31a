"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004, doi:10.1109/TIP.2003.819861), through torchmetrics.

The window is a Gaussian of 11 × 11 pixels with σ = 1.5; K = (0.01, 0.03), range 1, population covariance. Each colour
channel is scored by itself, and the result is their mean.

The map of torchmetrics is averaged over the pixels whose window lies inside the picture, as in the paper and in
scikit-image. torchmetrics itself also includes a border of five pixels, at which the picture is mirrored. ``rim=True``
gives its result.
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
    of_pictures=True,
)


def score(found: np.ndarray, reference: np.ndarray, *, rim: bool = False, device: str = "cpu") -> np.ndarray:
    """Return the SSIM, float64 [N], of pictures, or its mean over the frames of videos.

    It is computed in float64. In float32 the variances of uniform areas (white backgrounds) cancel, which changes the
    fifth digit. With many large pictures and few cores this is slow; ``device`` can be a GPU.

    Args:
        found: Pictures [N, H, W, 3] or videos [N, F, H, W, 3] of a method, in 0..1, with sides of 11 pixels or more.
        reference: The pictures or videos of the full run, of the same shape.
        rim: Whether the five pixels along the edges are included.
        device: The device on which it is computed.

    Raises:
        SamplesError: If the arrays are not valid.
    """
    return frame_by_frame("ssim", found, reference, functools.partial(_ssim, rim=rim, device=device), least=WINDOW)


def check(*, rim: bool = False, device: str = "cpu") -> None:
    """Raise BadOption if there is no such device, MissingPackageError if torchmetrics is not installed."""
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
