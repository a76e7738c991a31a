"""Add up the changes of the denoiser's input after a filter that keeps its clean part (SeaCache).

The filter is a Wiener filter, normalised as in equation (7) of the paper: the state is a · clean + b · noise, the power
of the clean part falls with a power of the frequency, and the gains are divided by their mean. Each axis has a gain,
and their product is the filter.

Three details are readings. The authors filter the normalised input of the first block; this criterion filters the
denoiser's input, as diffusers' SeaCache does. Inputs [samples, tokens, channels] have no axes of a picture: tokens are
rows of a square if their number is a square, and otherwise one line, unless ``rows`` states their rows. Axes of inputs
[samples, channels, …] are those after the channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcache.documents.schedule import Online
from diffcache.errors import BadOption, Unusable
from diffcache.executor.criteria import About, Memory, Signal, Where

ABOUT = About(
    source="SeaCache, arXiv 2602.18993, jiwoogit/SeaCache @802d7cd; diffusers' hooks/sea_cache.py",
    where=Where.MODEL,
    accumulates=True,
    levels=True,
)
LEAST = 1e-16  # is added to powers, so that the mean of a picture has a finite gain
EDGE = 1e-6  # shares of noise are limited to EDGE … 1 − EDGE


def change(signal: Signal, memory: Memory, *, power: float = 2.0, rows: int = 0) -> Tensor:
    """Return the relative L1 change of the filtered input since the call before, the mean over samples, 0-d.

    Raises:
        Unusable: The noise levels of the loop are not known.
        BadOption: The tokens do not fill ``rows`` rows.
    """
    if signal.levels is None:
        reason = "its levels of noise are not known, and the rule filters by them"
        raise Unusable("noise scheduler", reason, "Use a rule without a filter, such as 'easycache'")
    now, then = float(signal.levels[signal.step]), float(signal.levels[signal.since])
    found = []
    for a, b in zip(signal.now, signal.then, strict=True):
        new, old = _filtered(a, now, power, rows), _filtered(b, then, power, rows)
        found.append((new - old).abs().flatten(1).mean(1) / (old.abs().flatten(1).mean(1) + LEAST))
    return torch.cat(found).mean()


def check(online: Online) -> None:
    """Raise BadOption for an option out of range."""
    options = {"power": 2.0, "rows": 0} | dict(online.options)
    power, rows = options["power"], options["rows"]
    if isinstance(power, str) or not 0 < power <= 16:
        raise BadOption("power", power, "a number above 0, 16 at most. The paper uses 2 for pictures, 3 for video")
    if isinstance(rows, str) or rows < 0:
        raise BadOption("rows", rows, "a whole number; 0: as many rows as columns")


def _filtered(x: Tensor, noise: float, power: float, rows: int) -> Tensor:
    """Return a filtered input, float32 or float64, with the axes of a picture after the channels.

    Args:
        x: [B, tokens, channels], [B, channels, …], or [B, channels], which has no axes and is not changed.
        noise: The share of noise in the state, b / (a + b).
        power: The exponent of the clean part's power over the frequency.
        rows: The number of rows of tokens. 0: see the module.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 3:
        tokens = x.shape[1]
        side = math.isqrt(tokens)
        height = rows or (side if side * side == tokens else 1)
        if tokens % height:
            allowed = f"a number that divides {tokens}, the number of tokens; 0: as many rows as columns"
            raise BadOption("rows", rows, allowed)
        x = x.movedim(2, 1).reshape(len(x), -1, height, tokens // height)
    axes = range(2, x.ndim)
    if not axes:
        return x
    noise = min(max(noise, EDGE), 1 - EDGE)
    clean = 1 - noise
    gain = torch.ones((), dtype=x.dtype, device=x.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(x.shape[axis], dtype=x.dtype, device=x.device).abs()
        strength = 1 / (frequency**power + LEAST)
        along = clean * strength / (clean**2 * strength + noise**2 + LEAST)
        gain = gain * along.view([-1 if n == axis else 1 for n in range(2, x.ndim)])
    spectrum: Tensor = torch.fft.fftn(x, dim=tuple(axes)) * (gain / gain.mean())
    filtered: Tensor = torch.fft.ifftn(spectrum, dim=tuple(axes)).real
    return filtered
