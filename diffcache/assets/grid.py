"""Draw several pictures in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_grid(images: np.ndarray, path: str | Path, *, columns: int, gap: int = 4) -> None:
    """Write pictures row by row as one PNG on white.

    Args:
        images: float [N, H, W, 3] in 0..1.
        path: The file.
        columns: Number of pictures in a row.
        gap: Distance between pictures in pixels.
    """
    images = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    Image.fromarray(canvas).save(path)
