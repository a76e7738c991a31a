"""One line of the demo's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``speedup``: sampling loop of the full run / of this one, medians of one process."""

    method: str
    computed_steps: int
    total_steps: int
    speedup: float
    psnr_db: float
    ssim: float
