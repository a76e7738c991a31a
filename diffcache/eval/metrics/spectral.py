"""Log-spectral distance of audio in dB: the root mean square difference of two log power spectra, frame by frame.

This is the rms log spectral measure of Gray and Markel 1976, "Distance measures for speech processing",
doi:10.1109/TASSP.1976.1162849. They apply it to LPC spectra. Here it is applied to short-time Fourier transforms and
averaged over frames:

    d = mean over channels and frames t of  sqrt( mean over frequencies f of  (L(t, f) − L̂(t, f))² )
    L(t, f) = 10·log10( max( |X(t, f)|² / (½ Σ window)², 10^(floor_db / 10) ) )

X is the transform with a periodic Hann window of ``window`` samples, every ``hop`` samples. The audio is padded with
zeros, and the first window is centred on the first sample. Frequencies from 0 to half the sampling rate have the same
weight. A sine of full scale has an L near 0 dB. Levels below the floor are set to the floor; otherwise digital silence
would be infinitely far from any other signal. Phases are ignored, and the sampling rate is not needed.
"""

from __future__ import annotations

import math

import numpy as np

from diffcache.errors import BadOption
from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import demand_pair

RANGE = (0.0, math.inf)
ABOUT = About(
    "log-spectral distance",
    "dB",
    "lower",
    "By how many dB the strength of a frequency at a moment differs from the full run's, root mean square: 0 is "
    "identical, 6 is as if everything were half as loud.",
)


def score(
    found: np.ndarray, reference: np.ndarray, *, window: int = 2048, hop: int = 512, floor_db: float = -100.0
) -> np.ndarray:
    """Return the log-spectral distance in dB, float64 [N].

    Args:
        found: Audio of a method, [N, channels, samples].
        reference: Audio of the full run, of the same shape.
        window: Length of the window in samples.
        hop: Distance between windows in samples, at most half of a window.
        floor_db: Level in dB below which levels are set to it.

    Raises:
        BadOption: If the window is shorter than 2 samples, the hop is longer than half a window, or the floor is not a
            finite number.
        SamplesError: If the arrays are not valid.
    """
    demand_pair("spectral", found, reference, "[N, channels, samples]", lambda shape: len(shape) == 3)
    check(window=window, hop=hop, floor_db=floor_db)
    distances = np.empty(len(found))
    for i, (a, b) in enumerate(zip(found, reference, strict=True)):
        difference = _levels(a, window, hop, floor_db) - _levels(b, window, hop, floor_db)
        distances[i] = np.sqrt(np.square(difference).mean(axis=1)).mean()  # [channels, frequencies, frames]
    return distances


def check(*, window: int = 2048, hop: int = 512, floor_db: float = -100.0) -> None:
    """Raise BadOption if an option of ``score`` is not valid."""
    if not isinstance(window, int) or window < 2:
        raise BadOption("window", window, "2 samples or more")
    if not isinstance(hop, int) or not 1 <= hop <= window // 2:
        raise BadOption("hop", hop, f"1 to {window // 2} samples, half the window")
    if not isinstance(floor_db, (int, float)) or not math.isfinite(floor_db):
        raise BadOption("floor_db", floor_db, "a number of dB, such as -100")


def _levels(audio: np.ndarray, window: int, hop: int, floor_db: float) -> np.ndarray:
    """Return the levels in dB of audio [channels, samples], float64 [channels, frequencies, frames]."""
    import torch

    weights = torch.hann_window(window, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(audio.astype(np.float64)),
        window,
        hop,
        window=weights,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = (spectrum.abs() / (weights.sum() / 2)).square()
    return np.asarray(10 * torch.log10(power.clamp(min=10 ** (floor_db / 10))))
