"""The search: never worse than the even mask, no more computed steps than asked for, the same every time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from calibrated import calibration

from diffcache.errors import BadOption
from diffcache.profiling.calibration import search as searching
from diffcache.profiling.calibration.search import FITS, Search
from diffcache.profiling.fitting import Fit, replayed_psnr_db
from diffcache.profiling.fitting.fit import fit, replayed_states
from diffcache.schedulers import budcache
from diffcache.schedulers.closed_loop import shifts
from diffcache.schedulers.uniform import evenly, reuse

AMPLE = 60.0  # seconds: these searches end by themselves, long before


def search(name: str, computed: int, **limits: float) -> tuple[Fit, tuple[Fit, ...]]:
    """Return the best fit on all replays of a tiny pipeline, and every fit that was tried."""
    tried: list[Fit] = []
    best = Search(calibration(name).replays, tried=tried.append).run(computed, **limits)  # type: ignore[arg-type]
    return best, tuple(tried)


@functools.cache
def searched(name: str, computed: int) -> tuple[Fit, tuple[Fit, ...]]:
    return search(name, computed, until=time.monotonic() + AMPLE)


CASES = [("flux", 2), ("flux", 3), ("chroma", 3), ("sd15_ddim", 2), ("wan22", 3), ("ddim", 3)]


@pytest.mark.parametrize(("name", "computed"), CASES)
def test_the_best_of_what_was_tried_is_found_and_no_single_move_betters_it(name: str, computed: int) -> None:
    replays = calibration(name).replays
    best, tried = searched(name, computed)
    even = fit(replays, evenly(len(replays[0].steps), computed, replays[0].first_steps))
    assert tried[0].compute.tolist() == even.compute.tolist()
    assert np.array_equal(tried[0].weights, even.weights)
    assert best.score == max(f.score for f in tried) >= even.score
    for one in tried:
        assert one.compute.sum() == computed
        assert one.compute[list(replays[0].first_steps)].all()
    scores = {f.compute.tobytes(): f.score for f in tried}
    for step in np.setdiff1d(np.flatnonzero(best.compute), replays[0].first_steps):
        assert all(scores[other.tobytes()] <= best.score for other in shifts(best.compute, int(step)) if other[0])


@pytest.mark.parametrize(("name", "computed"), [("flux", 2), ("ddim", 3)])
def test_a_search_finds_masks_better_than_the_even_one(name: str, computed: int) -> None:
    best, tried = searched(name, computed)
    assert best.score > tried[0].score + 0.1


def test_the_best_mask_of_all_is_found_where_masks_are_few() -> None:
    replays = calibration("flux").replays
    every = []
    for chosen in itertools.combinations(range(1, 6), 2):
        compute = np.zeros(6, bool)
        compute[[0, *chosen]] = True
        every.append(fit(replays, compute).score)
    assert searched("flux", 3)[0].score == max(every)
    assert min(every) < max(every) - 1  # there was something to find


def test_a_fit_in_the_search_is_the_fit_from_the_start() -> None:
    best, tried = searched("chroma", 3)
    for one in (best, *tried[:3]):
        scratch = fit(calibration("chroma").replays, one.compute)
        assert np.array_equal(one.weights, scratch.weights)
        assert np.array_equal(one.error_db, scratch.error_db)


def test_a_search_repeats_itself() -> None:
    best, tried = searched("sd15_ddim", 2)
    found, again = search("sd15_ddim", 2, until=time.monotonic() + AMPLE)
    assert [f.compute.tolist() for f in again] == [f.compute.tolist() for f in tried]
    assert np.array_equal(found.weights, best.weights)


def test_without_time_the_even_and_the_simulated_mask_are_fitted_and_nothing_else() -> None:
    found, tried = search("flux", 3, until=0)
    assert [f.compute.tolist() for f in tried] == [
        evenly(6, 3).tolist(),
        Search(calibration("flux").replays).simulated(3).tolist(),
    ]
    assert found.score == max(f.score for f in tried)


def test_with_every_step_computed_there_is_nothing_to_search() -> None:
    found, tried = search("flux", 6, until=math.inf)
    assert found.compute.all()
    assert len(tried) == 1


def test_a_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock, with every fit taking a second of it: no fit begins that would end later."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(searching, "fit", lambda *a, **k: (now.__setitem__(0, now[0] + 1), fit(*a, **k))[1])
    tried: list[Fit] = []
    seeker = Search(calibration("sd3_heun").replays, tried=tried.append)
    best = seeker.run(4, until=4.5)
    assert len(tried) == 4
    assert seeker.ended == "time limit"
    assert best.score == max(f.score for f in tried)


def test_a_larger_budget_is_at_least_as_good_as_a_smaller_earlier_one() -> None:
    seeker = Search(calibration("sd15_ddim").replays)
    best = None
    for computed in range(1, 7):
        found = seeker.run(computed, until=0)
        assert found.compute.sum() <= computed
        assert best is None or found.score >= best.score
        best = found
    assert best is not None
    assert best.compute.all()


def test_a_smaller_budget_that_is_better_is_extended_or_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every mask of three steps scores low, the search returns the mask of two."""

    def spoiled(*args: Any, **options: Any) -> Fit:
        found = fit(*args, **options)
        bad = np.where(found.compute.sum() == 3, 50.0, 0.0)
        return dataclasses.replace(found, error_db=found.error_db - bad)

    monkeypatch.setattr(searching, "fit", spoiled)
    seeker = Search(calibration("flux").replays)
    two = seeker.run(2, until=0)
    three = seeker.run(3, until=0)
    assert three.compute.tolist() == two.compute.tolist()
    assert three.checkpoints
    assert seeker.run(4, until=0).score >= two.score


def test_what_a_smaller_neighbour_shows_is_used() -> None:
    seeker = Search(calibration("flux").replays)
    best = seeker.run(3, until=0)
    front = seeker.nearby(best)
    found = seeker.no_worse_than_smaller(3, best)
    assert found.score >= max(f.score for n, f in front.items() if n <= 3)
    scores = [front[n].score for n in sorted(front)]
    assert scores == sorted(scores)


def test_more_or_fewer_computed_steps_than_there_can_be_are_refused() -> None:
    for computed in (0, 7):
        with pytest.raises(BadOption, match="Allowed: 1 to 6"):
            search("flux", computed)
    with pytest.raises(BadOption, match=r"Allowed: 2 to 6 \(steps 0, \d are always computed\)"):
        search("wan22", 1)


def test_branches_can_share_their_coefficients() -> None:
    found = Search(calibration("chroma").replays, per_branch=False).run(3, until=0)
    assert len(found.weights) == 1
    assert len(searched("chroma", 3)[0].weights) == 2


def test_without_a_clock_a_search_ends_after_a_number_of_fits() -> None:
    assert [len(search("ddim", 3, fits=n)[1]) for n in (1, 5)] == [2, 5]  # the even and the simulated mask at least
    assert len(searched("ddim", 3)[1]) < FITS  # which is ample for six steps: the same mask is found
    assert np.array_equal(search("ddim", 3)[0].compute, searched("ddim", 3)[0].compute)


def test_candidates_are_accepted_by_samples_that_nothing_is_fitted_to_as_well() -> None:
    train, held = calibration("chroma").replays[:1], calibration("chroma").replays[1:]
    tried: list[Fit] = []
    best = Search(train, held, tried=tried.append).run(3)
    assert best.score == max(f.score for f in tried)
    assert best.score == pytest.approx(np.concatenate([best.error_db, best.held_db]).mean())
    for one in tried:
        alone = fit(train, one.compute)
        assert np.array_equal(one.weights, alone.weights)  # no say in the coefficients
        assert np.array_equal(one.error_db, alone.error_db)
        assert one.held_db == pytest.approx(replayed_psnr_db(held, one.compute, one.weights), abs=1e-6)


def test_budgets_nearby_are_shown_with_what_they_gave() -> None:
    seeker = Search(calibration("flux").replays)
    best = seeker.run(3)
    front = seeker.nearby(best)
    assert list(front) == [1, 2, 3, 4, 5]
    assert front[3].score == best.score
    for computed, one in front.items():
        assert one.compute.sum() == computed
        assert one.compute[0]
        assert one.score == fit(calibration("flux").replays, one.compute).score
    two = Search(calibration("wan22").replays)
    assert list(two.nearby(two.run(2, fits=1))) == [2, 3, 4]  # two steps are always computed


def scored(own: float, held: float) -> Fit:
    nothing = np.zeros(0)
    return Fit(nothing, nothing, None, np.full(3, own), np.full(1, held), {})


@pytest.mark.parametrize(
    ("own", "held", "by", "better"),
    [(31, 31, 0, True), (34, 29.9, 0, False), (29, 34, 0, True), (30, 30, 0, False), (30.5, 30.5, 1, False)],
)
def test_a_fit_is_better_if_no_worse_for_samples_it_has_not_seen(
    own: float, held: float, by: float, better: bool
) -> None:
    assert scored(own, held).beats(scored(30, 30), by) is better
    assert scored(own, held).held_score == held


def test_the_search_of_budcache_takes_the_error_of_real_runs() -> None:
    """Reuse on the even mask is a start that it improves: of 3 steps, 2 may move."""
    replays = calibration("flux").replays
    steps = len(replays[0].steps)
    run: list[np.ndarray] = []

    def error(compute: np.ndarray) -> float:
        run.append(compute)
        ends = replayed_states(replays, compute, reuse(compute).weights)
        pairs = zip(ends, replays, strict=True)
        return float(np.mean([((end - r.reference(steps - 1)) ** 2).mean().item() for end, r in pairs]))

    found = budcache.searched(steps, 3, error, sa_iters=20, hc_iters=3)
    assert error(found) == min(map(error, run[:-1]))
    assert error(found) < max(map(error, run[:-1]))
    assert found.sum() == 3
