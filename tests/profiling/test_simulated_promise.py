"""What a plan from a profile promises on the Flux demo model, compared with its run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffcache import plan
from diffcache.assets import load
from diffcache.demo import Size
from diffcache.demo.run import STEPS, batches, split
from diffcache.documents import Profile
from diffcache.profiling import Calibration
from diffcache.profiling.fitting import replayed_psnr_db
from diffcache.profiling.fitting.dynamics import answers, with_answer
from diffcache.profiling.fitting.fit import fit
from diffcache.schedulers.uniform import evenly

SAMPLES, COMPUTED = 3, 12  # the first sample leaves the trajectory of its full run


@pytest.fixture(scope="module")
def made() -> Calibration:
    model = load("flux")
    prompts, seeds = next(iter(batches(split(model, Size(calibration=16, held_out=8))[0])))
    return Calibration.record(model.pipe, [model.call(prompts[:SAMPLES], seeds[:SAMPLES], steps=STEPS)])


def promised_and_real(made: Calibration, profile: Profile) -> tuple[float, float]:
    """Return the mean PSNR of plain reuse that a plan expects, and that of its run, in dB."""
    schedule = plan(profile, "uniform", COMPUTED)
    (denoiser,) = schedule.denoisers.values()
    found = denoiser.sites["model"]
    assert schedule.expected is not None
    return schedule.expected.mean_db, float(replayed_psnr_db(made.replays, found.compute, found.weights).mean())


def test_plain_reuse_is_promised_what_it_reaches(made: Calibration) -> None:
    profile = made.profile()
    promise, real = promised_and_real(made, profile)
    assert promise == pytest.approx(real, abs=3)
    # The sum over the samples, which the sample with the largest errors decides, promises far less.
    sums = answers(made.replays, fit(made.replays, evenly(STEPS, STEPS // 2), per_branch=False))
    assert profile.dynamics is not None
    together = with_answer(profile.dynamics, sums.sum(1, keepdims=True))
    low, _ = promised_and_real(made, dataclasses.replace(profile, dynamics=together))
    assert low < real - 6
    assert np.all(together.spread >= 0)
