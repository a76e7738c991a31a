"""The published methods that ``methods.py`` compares, and its results: one row for each method and budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OURS = "optimize"
AUTO = "auto (diffcache, no calibration)"

# name in the table -> (scheduler's spec, correction fitted on the calibration calls)
PUBLISHED: dict[str, tuple[str, str]] = {
    "uniform reuse": ("uniform", ""),
    "SmoothCache": ("smoothcache:sites=sublayer", ""),
    "MagCache": ("magcache", ""),
    "ERTACache mask": ("ertacache", ""),
    "ERTACache": ("timestep_adjustment", "one for all channels"),
    "CacheQuant DPS": ("cachequant", ""),
    "CacheQuant DPS + DEC": ("cachequant", "per channel"),
    "LeMiCa path": ("lemica", ""),
    "MeanCache path": ("meancache", ""),
    "DPCache path": ("dpcache", ""),
    "TaylorSeer, order 1": ("taylorseer:order=1", ""),
    "TaylorSeer, order 2": ("taylorseer:order=2", ""),
    "L2P": ("l2p", ""),
    "ZEUS": ("zeus", ""),
    "BudCache": ("budcache", ""),
    "CEM": ("cem", ""),
    "CEM + TaylorSeer": ("cem:order=1", ""),
    "OTCache": ("otcache", ""),
    "Spectrum": ("spectrum", ""),
    "Spectrum, half linear": ("spectrum:blend=0.5", ""),
    "simulated plan (diffcache, no fit)": ("closed_loop", ""),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One method at one budget. ``computed``: work in the denoiser, in full steps; psnr_low_db: the worst decile."""

    method: str
    budget: float
    computed: float
    speedup: float
    psnr_db: float
    psnr_low_db: float
    ssim: float
    note: str = ""
