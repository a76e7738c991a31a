"""How near two sets of pictures are."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr_db(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture, in dB; [N, H, W, 3] in 0..1 -> float64 [N]."""
    mse = np.square(images.astype(np.float64) - reference.astype(np.float64)).mean(axis=(1, 2, 3))
    return np.asarray(-10 * np.log10(np.maximum(mse, 1e-12)))


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture (torchmetrics, Gaussian window); [N, H, W, 3] in 0..1 -> float64 [N]."""
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (images, reference))
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return np.asarray(values)
