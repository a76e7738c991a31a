"""Profiles of a busy machine: times of one forward that scatter are warned of, and single interruptions are not."""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Sequence

import pytest

pytest.importorskip("transformers")

from calibrated import recorded
from decoders import decode, decoder, prompts

import diffcache
from diffcache.profiling.recording import clock, decode_times

pytestmark = pytest.mark.fast
BUSY, INTERRUPTED = (1.0, 1.9, 1.2, 2.3, 1.6), (9.0, 1.0, 1.02, 1.01, 1.03)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [(INTERRUPTED, 0.02 / 1.02), (BUSY, 0.7 / 1.6), ((1.0, 9.0, 1.0), 0.0), ((2.0,) * 8, 0.0), ((), 0.0)],
)
def test_the_scatter_is_the_middle_half_over_the_median(seconds: Sequence[float], found: float) -> None:
    assert clock.scatter(seconds) == pytest.approx(found)


class Ticking:
    """A clock of which each second reading is later by the next of some seconds."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.now, self.reading, self.seconds = 0.0, 0, itertools.cycle(seconds)

    def __call__(self) -> float:
        self.reading += 1
        if self.reading % 2 == 0:
            self.now += next(self.seconds)
        return self.now


@pytest.mark.parametrize("seconds", [BUSY, INTERRUPTED], ids=["busy", "interrupted"])
def test_a_token_profile_of_a_busy_machine_warns_once(
    monkeypatch: pytest.MonkeyPatch, seconds: Sequence[float]
) -> None:
    model = decoder()
    loop = diffcache.Loop(model, lambda prompt: decode(model, prompt)[0])
    trial = decode_times._times

    def with_clock(*args: object) -> list[float]:
        ticking = types.SimpleNamespace(perf_counter=Ticking(seconds))
        with monkeypatch.context() as change:
            change.setattr(decode_times, "time", ticking)
            return trial(*args)

    monkeypatch.setattr(decode_times, "_times", with_clock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffcache.UnsteadyTimes)
        profile = diffcache.measure(loop, [{"prompt": prompts(2)}], progress=False)
    assert set(profile.seconds.round(6)) == {1.0}  # the least time counts
    texts = [str(one.message) for one in caught if one.category is diffcache.UnsteadyTimes]
    if seconds is INTERRUPTED:
        assert texts == []
        return
    (text,) = texts
    assert text.startswith("the middle half of 5 times of the same forward differ by 44% of their median")
    assert "Measure again while no other program runs" in text
    assert "Budget(computed_steps=…)" in text


@pytest.mark.parametrize("seconds", [BUSY, INTERRUPTED], ids=["busy", "interrupted"])
def test_a_profile_of_pictures_warns_of_a_busy_machine(seconds: Sequence[float]) -> None:
    made = recorded("flux")
    for trajectory in made.trajectories:
        calls = [call for step in trajectory.steps for call in step.calls]
        for number, call in enumerate(calls):  # six of them
            call.seconds = seconds[min(number, len(seconds) - 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffcache.UnsteadyTimes)
        made.profile()
    assert len([one for one in caught if one.category is diffcache.UnsteadyTimes]) == (seconds is BUSY)
