"""The numbers that a calibration decides by: sizes of samples, shares of time, and gains that options must reach."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a calibration searches, and which gain an option must reach to be used.

    Gains are in dB of PSNR of the final state. An option that gains less is not used, because it makes a schedule
    larger or fits it more closely to one noise scheduler.

    Attributes:
        searched_samples: Samples that the search fits. A mask needs fewer samples than its coefficients; the final fit
            uses all of them.
        held_samples: Samples that the search accepts candidates by, in addition to the fitted ones.
        scale_gain_db: Least gain of a scale per channel, on held-out samples and on all samples.
        levels_gain_db: Least gain of moved noise levels.
        estimates_gain_db: Least gain of combining clean estimates instead of outputs. Where estimates are useful at
            all, the gain is 10 dB or more.
        estimates_tried_on: Clean estimates are tried on an even mask that computes one step in this number of steps.
        nudge_gain_db: Least gain of moving one computed step to another noise level. On few samples, smaller gains were
            not found again on other samples.
        nudged_share: Share of the time limit for moving noise levels.
        last_fits: The fits after the search (options, expected fidelity, final coefficients) take as long as this
            number of fits.
    """

    searched_samples: int = 16
    held_samples: int = 8
    scale_gain_db: float = 0.1
    levels_gain_db: float = 0.3
    estimates_gain_db: float = 3.0
    estimates_tried_on: int = 5
    nudge_gain_db: float = 0.05
    nudged_share: float = 0.25
    last_fits: int = 8


DEFAULT = Strategy()
