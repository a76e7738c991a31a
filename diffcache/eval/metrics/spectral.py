"""Log-spectral distance of audio, in dB: the root mean square difference of two log power spectra, frame by frame.

Gray and Markel 1976, "Distance measures for speech processing", doi:10.1109/TASSP.1976.1162849 (the rms log spectral
measure, there of LPC spectra), here of short-time Fourier transforms and averaged over frames:

    d = mean over channels and frames t of  sqrt( mean over frequencies f of  (L(t, f) − L̂(t, f))² )
    L(t, f) = 10·log10( max( |X(t, f)|² / (½ Σ window)², 10^(floor_db / 10) ) )

X: periodic Hann window of ``window`` samples, every ``hop`` samples, zeros beyond both ends, the first window centred
on the first sample; frequencies 0 to half the sampling rate, all with the same weight. A sine of full scale stands near
0 dB in L, and what lies below the floor counts as the floor: without one, digital silence would be infinitely far from
anything. Phases do not count, and the sampling rate is not needed.
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
    """Audio [N, channels, samples] -> dB, float64 [N]. Raises BadOption for a window below 2 samples, a hop that would
    leave samples out (more than half a window), or a floor that is no number."""
    demand_pair("spectral", found, reference, "[N, channels, samples]", lambda shape: len(shape) == 3)
    check(window=window, hop=hop, floor_db=floor_db)
    distances = np.empty(len(found))
    for i, (a, b) in enumerate(zip(found, reference, strict=True)):
        difference = _levels(a, window, hop, floor_db) - _levels(b, window, hop, floor_db)
        distances[i] = np.sqrt(np.square(difference).mean(axis=1)).mean()  # [channels, frequencies, frames]
    return distances


def check(*, window: int = 2048, hop: int = 512, floor_db: float = -100.0) -> None:
    """Raise what ``score`` raises, apart from the samples."""
    if not isinstance(window, int) or window < 2:
        raise BadOption("window", window, "2 samples or more")
    if not isinstance(hop, int) or not 1 <= hop <= window // 2:
        raise BadOption("hop", hop, f"1 to {window // 2} samples, half the window")
    if not isinstance(floor_db, (int, float)) or not math.isfinite(floor_db):
        raise BadOption("floor_db", floor_db, "a number of dB, such as -100")


def _levels(audio: np.ndarray, window: int, hop: int, floor_db: float) -> np.ndarray:
    """[channels, samples] -> dB, float64 [channels, frequencies, frames]."""
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
