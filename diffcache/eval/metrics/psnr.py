"""Peak signal-to-noise ratio: 10·log10(1 / mean squared difference), peak 1.

Below a mean squared difference of 1e-12 it is 120 dB. Otherwise identical samples would have an infinite value, and so
would the mean over samples.
"""

from __future__ import annotations

import numpy as np

from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import frame_by_frame

MOST_DB = 120.0

RANGE = (0.0, MOST_DB)
ABOUT = About(
    "PSNR",
    "dB",
    "higher",
    "How near the pictures are to the full run's, pixel by pixel, on a logarithmic scale: 20 dB is an error of a tenth "
    "of the range, 40 dB of a hundredth. Identical pictures count as 120 dB.",
    of_pictures=True,
)


def score(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the PSNR in dB, float64 [N], of pictures, or its mean over the frames of videos.

    Args:
        found: Pictures [N, H, W, 3] or videos [N, F, H, W, 3] of a method, in 0..1.
        reference: The pictures or videos of the full run, of the same shape.

    Raises:
        SamplesError: If the arrays are not valid.
    """
    return frame_by_frame("psnr", found, reference, _psnr)


def _psnr(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    error = np.square(found.astype(np.float64) - reference.astype(np.float64)).mean(axis=(1, 2, 3))
    return np.asarray(-10 * np.log10(np.maximum(error, 10 ** (-MOST_DB / 10))))
