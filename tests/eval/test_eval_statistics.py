"""Intervals hold what they say, do not care for the order, and no verdict is drawn from too little."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.errors import BadOption, DiffCacheError
from diffcache.eval.statistics import (
    ENOUGH,
    FEW,
    Interval,
    ValuesError,
    enough,
    interval,
    paired,
    verdict,
    verdict_of_sets,
)

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def holds(sets: np.ndarray, truth: float, **options: float) -> float:
    """The share of sets [sets, N] whose interval holds the truth."""
    found = [interval(values, resamples=1000, seed=i, **options) for i, values in enumerate(sets)]  # type: ignore[arg-type]
    return float(np.mean([i.low <= truth <= i.high for i in found]))


def test_of_100_intervals_about_95_hold_the_true_mean() -> None:
    draw = np.random.default_rng(0)
    sets = 3 + 2 * draw.standard_normal((1000, 100))
    assert 0.92 < holds(sets, 3) < 0.965
    assert holds(sets, 3.6) < 0.4  # three standard errors off
    assert 0.75 < holds(sets, 3, level=0.8) < 0.84


def test_few_values_hold_it_less_often_as_the_head_of_the_module_says() -> None:
    draw = np.random.default_rng(0)
    assert holds(draw.standard_normal((800, 4)), 0) < 0.87
    sets = draw.standard_normal((800, ENOUGH))
    by_formula = np.mean(np.abs(sets.mean(axis=1)) <= 1.96 * sets.std(axis=1) / np.sqrt(ENOUGH))
    assert holds(sets, 0) == pytest.approx(by_formula, abs=0.015)


def test_the_interval_is_the_percentile_bootstrap_s() -> None:
    draw = np.random.default_rng(0)
    values = draw.gamma(2, size=200)
    ours = interval(values)
    other = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, random_state=3)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(other.confidence_interval.low, rel=0.02)
    assert ours.high == pytest.approx(other.confidence_interval.high, rel=0.02)


def test_ten_thousand_values_give_the_same_again() -> None:
    draw = np.random.default_rng(0)
    values = draw.random(10_000)
    first = interval(values)
    assert interval(values) == first
    assert interval(values, seed=1) != first
    assert first.high - first.low == pytest.approx(2 * 1.96 * values.std() / 100, rel=0.1)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, seed=st.integers(0, 9))
def test_the_order_does_not_matter_and_the_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    found = interval(values, resamples=200)
    assert interval(np.random.default_rng(seed).permutation(values), resamples=200) == found
    assert min(values) <= found.low <= found.high <= max(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=30))
def test_the_order_of_pairs_does_not_matter_and_the_sides_mirror_each_other(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    found = paired(a, b, resamples=200)
    assert paired(a[::-1], b[::-1], resamples=200) == found
    assert paired(b, a).mean == pytest.approx(-found.mean)
    assert paired(a, a) == Interval(0, 0, 0)


@pytest.mark.parametrize("value", [0.1, -7.3, 0.0, 1e300])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_one_value_or_equal_ones_give_themselves_exactly(value: float, n: int) -> None:
    assert interval([value] * n) == Interval(value, value, value)


def test_whole_numbers_and_yes_or_no_are_values_too() -> None:
    assert interval([1, 2, 3]).mean == 2
    assert interval([True, False]).mean == 0.5
    assert all(isinstance(x, float) for x in interval(np.array([1, 2, 3], np.float32)))


@pytest.mark.parametrize("resamples", [1, 7, 999])
def test_drawing_in_parts_draws_as_many(resamples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    from diffcache.eval import statistics

    values = np.sort(draw.random(50))
    whole = statistics._means(values, resamples, 0)
    assert len(whole) == resamples
    monkeypatch.setattr(statistics, "AT_ONCE", 250)
    parts = statistics._means(values, resamples, 0)
    assert len(parts) == resamples
    assert np.array_equal(parts, whole)


REFUSED = {
    "NaN": ([1.0, np.nan], "nan at sample 1. Allowed: finite numbers"),
    "Inf": ([np.inf, 1.0], "inf at sample 0"),
    "none": ([], r"shape \[0\]. Allowed: numbers, one per sample, 1 or more"),
    "a table": ([[1.0, 2.0]], r"shape \[1, 2\]"),
    "one number": (1.0, r"shape \[\]"),
    "texts": (["1", "2"], "Allowed: numbers"),
    "gaps": ([None, 1.0], "object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_mean_is_refused(kind: str) -> None:
    values, words = REFUSED[kind]
    for refused in (
        lambda: interval(values),  # type: ignore[arg-type]
        lambda: paired(values, [1.0, 2.0]),  # type: ignore[arg-type]
        lambda: paired([1.0, 2.0], values),  # type: ignore[arg-type]
        lambda: verdict(values, [1.0, 2.0], "higher"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValuesError, match=words) as caught:
            refused()
        assert isinstance(caught.value, DiffCacheError)


def test_options_out_of_range_are_refused() -> None:
    for options, words in (
        ({"level": 1.0}, "level=1.0"),
        ({"level": 95}, "level=95"),
        ({"resamples": 0}, "resamples=0"),
    ):
        with pytest.raises(BadOption, match=words):
            interval([1.0, 2.0], **options)
    with pytest.raises(BadOption, match=r"better='more' was given. Allowed: higher or lower"):
        verdict([1.0], [1.0], "more")  # type: ignore[arg-type]
    with pytest.raises(ValuesError, match="2 values and 3 of the reference"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(BadOption, match="n=0"):
        enough(0)


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_a_verdict_follows_the_interval_and_which_way_is_good() -> None:
    draw = np.random.default_rng(0)
    reference = 30 + 5 * draw.standard_normal(100)
    ahead = reference + 1 + 0.5 * draw.standard_normal(100)
    assert verdict(ahead, reference, "higher") == "better"
    assert verdict(ahead, reference, "lower") == "worse"
    assert verdict(reference, ahead, "higher") == "worse"
    assert verdict(reference, ahead, "lower") == "better"
    assert verdict(reference, reference, "higher") == "no difference"


def test_pairs_show_what_two_intervals_hide() -> None:
    draw = np.random.default_rng(0)
    reference = 30 + 5 * draw.standard_normal(100)
    ahead = reference + 0.5 + 0.5 * draw.standard_normal(100)
    assert interval(ahead).low < interval(reference).high  # they overlap
    assert verdict(ahead, reference, "higher") == "better"
    assert verdict(draw.permutation(ahead), reference, "higher") == "no difference"  # pairs torn apart


def test_without_a_difference_about_one_verdict_in_twenty_is_wrong() -> None:
    draw = np.random.default_rng(0)
    pairs = draw.standard_normal((600, 2, 80))
    wrong = [verdict(a, b, "higher", resamples=1000, seed=i) != "no difference" for i, (a, b) in enumerate(pairs)]
    assert 0.02 < np.mean(wrong) < 0.09


@pytest.mark.parametrize("n", [1, 2, FEW - 1, FEW])
def test_no_verdict_is_drawn_from_too_few(n: int) -> None:
    reference = np.arange(n, dtype=float)
    assert verdict(reference + 1, reference, "higher") == ("no difference" if n < FEW else "better")


def test_the_rounding_of_sums_does_not_count_as_a_difference() -> None:
    draw = np.random.default_rng(0)
    reference = 30 + draw.random(100)
    assert verdict(reference * (1 + 4e-16), reference, "higher") == "no difference"
    assert verdict(reference * (1 + 1e-9), reference, "higher") == "better"


def test_the_warning_says_how_few_and_how_many_are_wanted() -> None:
    assert enough(1).startswith("Only 1 sample:")
    for n in (1, FEW - 1):
        assert f"fewer than {FEW}" in enough(n)
        assert "no verdict" in enough(n)
        assert f"Take {ENOUGH} or more" in enough(n)
    for n in (FEW, ENOUGH - 1):
        assert f"Only {n} samples" in enough(n)
        assert "verdicts weak" in enough(n)
    assert enough(ENOUGH) == enough(10_000) == ""


def test_two_sets_are_distinguished_by_what_resamples_do_to_their_difference() -> None:
    """Both distances move a lot from resample to resample, but together."""
    random = np.random.default_rng(0)
    shared, own = random.normal(0, 1, 50), random.normal(0, 0.01, 50)
    a, b = shared, shared + own
    assert verdict_of_sets(10.0, 10.05, a, b, "lower") == "better"
    assert verdict_of_sets(10.0, 10.05, a, b, "higher") == "worse"
    assert verdict_of_sets(10.05, 10.0, a, b, "lower") == "worse"
    assert verdict_of_sets(10.0, 10.01, a, b, "lower") == "no difference"
    assert verdict_of_sets(10.0, 10.05, a, random.permutation(b), "lower") == "no difference"  # not drawn alike
    with pytest.raises(ValuesError, match="3 and 4 resamples"):
        verdict_of_sets(1.0, 2.0, [1, 2, 3], [1, 2, 3, 4], "lower")
    with pytest.raises(BadOption):
        verdict_of_sets(1.0, 2.0, a, b, "more")  # type: ignore[arg-type]
