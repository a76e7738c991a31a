"""Define the fidelity that is expected of a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffcache.documents import checks
from diffcache.documents.checks import put, refuse

Origin = Literal["simulated", "calibration", "held-out"]

EXACT_DB = 20 * math.log10(2.0**24)  # the error is below the precision of a float32 of the sample's range
MOST_DB = 200.0  # value for a run whose final state equals that of the full run
FEW_SAMPLES = 16  # below this number, a mean and its spread are not reliable
NORMAL_DECILE = 1.2815515655446004


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Expected fidelity to the full run: PSNR of the final state in dB.

    The peak is the range of each sample's final state in the full run.

    Attributes:
        mean_db: Mean over samples.
        low_db: The worst tenth of samples is expected below it.
        high_db: The best tenth of samples is expected above it.
        samples: Number of samples in the mean.
        origin: "simulated": from the profile alone; "held-out": from samples that were used for nothing else;
            "calibration": from samples to which the coefficients were fitted, so that the value is too high.
    """

    mean_db: float
    low_db: float
    high_db: float
    samples: int
    origin: Origin

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("mean_db", "low_db", "high_db"):
            put(self, **{name: checks.real(me, name, getattr(self, name))})
        put(self, samples=checks.count(me, "samples", self.samples, least=1))
        if not self.low_db <= self.high_db:
            refuse(me, "low_db", f"found {self.low_db:g}, above high_db {self.high_db:g}", "low_db <= high_db")
        if self.origin not in get_args(Origin):
            refuse(me, "origin", f"found {self.origin!r:.80}", ", ".join(map(repr, get_args(Origin))))

    @classmethod
    def over(cls, psnr_db: np.ndarray, origin: Origin) -> Expected:
        """Return the fidelity to expect of a new sample, from the PSNR of some samples.

        The ends are the deciles of the predictive distribution of one more sample, mean ± t √(1 + 1/n) s with Student's
        t for n − 1 degrees of freedom. They widen as samples become fewer. For one sample they equal the mean. Values
        above MOST_DB count as MOST_DB.

        Args:
            psnr_db: float [N], PSNR of each sample in dB.
            origin: The samples' role in planning.
        """
        psnr = np.minimum(psnr_db, MOST_DB)
        count, mean = len(psnr), float(psnr.mean())
        wide = _t_decile(count - 1) * (1 + 1 / count) ** 0.5 * float(psnr.std(ddof=1)) if count > 1 else 0.0
        return cls(mean_db=mean, low_db=mean - wide, high_db=mean + wide, samples=count, origin=origin)

    def __str__(self) -> str:
        """Return the mean, the worst and the best tenth, and the number and the role of the samples."""
        few = ", which is few" if 1 < self.samples < FEW_SAMPLES else ""
        counted = f"from {self.samples} {self.origin} sample{'s' * (self.samples != 1)}{few}"
        if self.low_db >= EXACT_DB:
            return f"no difference from the full run beyond rounding, {counted}"
        if self.samples == 1:
            return f"{decibels(self.mean_db)}, {counted}: how far others spread is not known"
        best = decibels(self.high_db).removesuffix(" dB")
        return f"{decibels(self.mean_db)}, worst tenth {self.low_db:.1f}, best {best}, {counted}"


def decibels(db: float) -> str:
    """Return a PSNR as text: "exact" if the difference is below the precision of float32."""
    return "exact" if db >= EXACT_DB else f"{db:.1f} dB"


def most_db(db: float) -> str:
    """Return the largest reachable PSNR as text. The value of a run that equals the full run is not shown."""
    return f"{EXACT_DB:.1f} (exact)" if db >= EXACT_DB else f"{db:.1f}"


def _t_decile(degrees: int) -> float:
    """Return the upper decile of Student's t distribution.

    It is computed by the expansion of Abramowitz and Stegun, 26.7.5, with an error of at most 0.3 % from 2 degrees of
    freedom and 4 % for 1.
    """
    z, n = NORMAL_DECILE, degrees
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return float(z + sum(term / n**power for power, term in enumerate(terms, 1)))
