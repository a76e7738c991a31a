"""Plans for language models: the drift of kept rows, the cheapest refreshes, and budgets."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from documents import token_profile

from diffcache import Budget
from diffcache.documents import DriftTables, TokenProfile
from diffcache.errors import BadOption, Unusable
from diffcache.planning import token_plans
from diffcache.planning import token_refreshes as plans
from diffcache.simulation import chances, drifted, stalest


@pytest.fixture(scope="module")
def profile() -> TokenProfile:
    return token_profile()


def tables(size: int, **given: np.ndarray) -> DriftTables:
    wide = np.zeros(2 * size - 1)
    return DriftTables(**({"masked": wide, "decoded": wide, "next": np.ones(size)} | given))


def test_drift_sums_the_table_at_the_offsets_of_the_commits() -> None:
    rng = np.random.default_rng(0)
    size = 6
    found = tables(size, masked=rng.random(11), decoded=rng.random(11))
    committed, masked = rng.random((2, size)) < 0.4, rng.random((2, size)) < 0.5
    drift = drifted(np.zeros((2, size)), committed, masked, found)
    for row, j in itertools.product(range(2), range(size)):
        table = found.masked if masked[row, j] else found.decoded
        wanted = sum(table[size - 1 + j - i] for i in range(size) if committed[row, i])
        assert drift[row, j] == pytest.approx(wanted)


def test_offsets_beyond_the_tables_count_as_the_last_one() -> None:
    found = tables(2, masked=np.array([1.0, 0, 2]))
    drift = drifted(np.zeros((1, 6)), np.eye(6, dtype=bool)[[3]], np.ones((1, 6), bool), found)
    assert drift.tolist() == [[1, 1, 1, 0, 2, 2]]


def test_the_stalest_positions_weigh_drift_by_the_chance_of_a_commit() -> None:
    found = tables(4, next=np.array([0.1, 0.9, 0.0, 0.0]))
    masked = np.array([[False, True, True, True]])
    assert chances(masked, found).tolist() == [[0, 0.1, 0.9, 0]]
    drift = np.array([[5.0, 2, 1, 9]])
    assert np.flatnonzero(stalest(drift, masked, found, 1, 0.0)).tolist() == [2]
    assert np.flatnonzero(stalest(drift, masked, found, 2, 0.0)).tolist() == [1, 2]
    assert np.flatnonzero(stalest(drift, masked, found, 1, 1.0)).tolist() == [0]
    assert not stalest(np.zeros((1, 4)), masked, found, 2, 1.0).any()


def test_plans_fit_the_budget(profile: TokenProfile) -> None:
    for goal in (Budget(speedup=1.5), Budget(speedup=3), Budget(computed_steps=8)):
        allowed = profile.full_seconds / goal.speedup if goal.speedup else goal.computed_steps
        found = token_plans(profile, goal)
        assert all(plan.seconds <= allowed * (1 + 1e-9) for plan in found)
        assert [plan.flips for plan in found] == sorted(plan.flips for plan in found)


def test_more_time_gives_fewer_predicted_flips(profile: TokenProfile) -> None:
    flips = [token_plans(profile, Budget(speedup=speed))[0].flips for speed in (1.5, 3, 5)]
    assert flips == sorted(flips)
    assert flips[0] < flips[-1]


def test_the_cheapest_refreshes_are_those_of_an_exhaustive_search(
    profile: TokenProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "PARTS", 6)
    errors = np.array([[0, 0.1, 0.2, 0.5, 0.9], [0, 0.3, 0.5, 0.6, 0.7], [0, 0.2, 0.2, 0.9, 1.0]])
    profile = dataclasses.replace(profile, errors=errors)
    for price in (0.01, 0.1, 0.3, 0.7, 2.0):

        def value(starts: tuple[int, ...], price: float = price) -> float:
            return plans.total_error(profile, starts) + price * plans.seconds_of(profile, 4, starts)

        every = [(0, *rest) for rest in itertools.product((0, 1, 3), repeat=5)]
        found = plans.cheapest(profile, 4, price, (0, 1))
        assert value(found) == pytest.approx(min(map(value, every)))


def test_a_budget_out_of_reach_is_one_error_with_the_most_there_is(profile: TokenProfile) -> None:
    with pytest.raises(Unusable, match=r"no plan is 500x as fast; .* reach \d+\.\dx"):
        token_plans(profile, Budget(speedup=500))
    with pytest.raises(Unusable, match="have no PSNR"):
        token_plans(profile, Budget(min_psnr_db=40))


def test_errors_about_computed_steps_have_their_unit(profile: TokenProfile) -> None:
    with pytest.raises(Unusable, match=r"no plan computes as little as 1 forwards; the least is \d\.\d"):
        token_plans(profile, Budget(computed_steps=1))
    with pytest.raises(BadOption, match="up to 32, the forwards of a decode"):
        token_plans(profile, Budget(computed_steps=500))


def test_a_loop_that_commits_many_tokens_has_a_part_for_each_forward(profile: TokenProfile) -> None:
    few = dataclasses.replace(profile, forwards=8.4)
    found = token_plans(few, Budget(speedup=1.5))
    assert {len(plan.starts) for plan in found} == {8}
    assert {len(plan.starts) for plan in token_plans(profile, Budget(speedup=1.5))} == {32}
