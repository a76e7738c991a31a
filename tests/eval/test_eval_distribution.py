"""Distances between sets of pictures: the formula, its numbers of pictures, several processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coloured import by_roots, gaussian, measured, pictures, small
from processes import in_processes
from torch import Tensor, nn

from diffcache.errors import BadOption
from diffcache.eval import Distribution, extractors, frechet
from diffcache.eval.distribution import Distance
from diffcache.eval.extractors import PicturesError
from diffcache.eval.features import FeatureSet
from diffcache.eval.frechet import Moments, moments
from diffcache.eval.kernel_distance import kernel_distance
from diffcache.eval.statistics import verdict_of_sets

pytestmark = pytest.mark.fast

Command = Callable[..., tuple[int, str, str]]


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(200, 5), (300, 64)])
def test_gaussian_features_lie_as_far_apart_as_scipy_and_torchmetrics_say(n: int, width: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = gaussian(n, width, 0), gaussian(n + 50, width, 1, scale=1.2)
    found = frechet.distance(moments(x), moments(y))
    assert found == pytest.approx(by_roots(moments(x), moments(y)), rel=1e-6)

    class Given(nn.Module):
        num_features = width

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    other = FrechetInceptionDistance(Given())
    other.update(torch.from_numpy(x), real=True)
    other.update(torch.from_numpy(y), real=False)
    assert found == pytest.approx(float(other.compute()), rel=1e-6)


def test_moments_are_those_of_numpy() -> None:
    x = gaussian(50, 7, 3)
    assert np.allclose(moments(x).covariance, np.cov(x, rowvar=False), rtol=1e-12)
    with pytest.raises(PicturesError, match="2 or more"):
        moments(x[:1])


def test_two_known_gaussians_lie_as_far_apart_as_the_closed_form_says() -> None:
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    product = a @ b  # of a 2 × 2 matrix, tr(M^½)² = tr(M) + 2 det(M)^½
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 5.0**2 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet.distance(Moments(np.zeros(2), a), Moments(np.array([3.0, 4.0]), b)) == pytest.approx(expected)
    variances = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    zero = np.zeros(3)
    assert frechet.distance(Moments(zero, variances[0]), Moments(zero, variances[1])) == pytest.approx(1 + 0 + 4)


@pytest.mark.parametrize(("n", "width"), [(100, 10), (20, 200)])  # more and fewer pictures than features
def test_equal_sets_are_at_zero_and_moved_ones_at_the_square_of_the_way(n: int, width: int) -> None:
    x = gaussian(n, width, 0)
    size = np.trace(moments(x).covariance)
    assert frechet.distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-12 * size)
    moved = frechet.distance(moments(x), moments(x + 0.5))
    assert moved == pytest.approx(0.25 * width, rel=1e-9, abs=1e-12 * size)


# --- how many pictures -----------------------------------------------------------------------------------------------


def test_the_interval_is_as_wide_as_other_pictures_would_scatter() -> None:
    reference = moments(gaussian(5000, 6, 7))
    sets = [np.random.default_rng(s).permutation(gaussian(6000, 6, 1))[:150] for s in range(60)]
    values = np.array([frechet.distance(moments(x), reference) for x in sets])
    spreads = [frechet.spread(x, reference, resamples=50) for x in sets[:10]]
    widths = np.array([s.high - s.low for s in spreads])
    assert 0.7 < widths.mean() / (2 * 1.96 * values.std()) < 1.4
    assert all(s.low < value < s.high for s, value in zip(spreads, values[:10], strict=True))


def test_resamples_lie_as_much_too_far_away_as_few_pictures_do_and_the_interval_leaves_that_out() -> None:
    x = gaussian(8000, 6, 0)
    true = frechet.distance(moments(x), moments(x))
    few = [x[n : n + 100] for n in range(0, 4000, 100)]
    excess = np.mean([frechet.distance(moments(y), moments(x)) for y in few]) - true
    found = frechet.spread(few[0], moments(x), resamples=100)
    assert 0.5 < found.bias / excess < 2
    assert found.low <= frechet.distance(moments(few[0]), moments(x)) <= found.high


def test_sets_in_the_same_order_share_resamples_and_are_distinguished_by_them() -> None:
    """Pictures that differ a little from the others of the same seeds: their distances lie within each other's
    intervals, and yet one is known to be the greater."""
    real, made = pictures(150, 0), pictures(150, 1)
    worse = np.clip(made.astype(int) + 2, 0, 255).astype(np.uint8)

    def of(found: np.ndarray, in_order: bool) -> Distance:
        return measured(small(), found, real, resamples=50, in_order=in_order)

    a, b = of(made, True), of(worse, True)
    assert a.spread is not None
    assert b.spread is not None
    assert a.spread.low < b.value < a.spread.high
    assert verdict_of_sets(b.value, a.value, b.spread.drawn, a.spread.drawn, "lower") == "worse"
    order = np.random.default_rng(0).permutation(150)
    assert of(made[order], False).spread == of(made, False).spread  # however they were dealt out
    assert of(made[order], True).spread != a.spread


def test_the_same_seed_draws_the_same_interval() -> None:
    x, reference = gaussian(60, 5, 0), moments(gaussian(60, 5, 1))
    assert frechet.spread(x, reference, seed=1) == frechet.spread(x, reference, seed=1)
    assert frechet.spread(x, reference, seed=1) != frechet.spread(x, reference, seed=2)
    for wrong in ({"resamples": 1}, {"level": 1.0}):
        with pytest.raises(BadOption):
            frechet.spread(x, reference, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("samples", "expected"), [(10, (10, 50)), (30, (30, 30)), (500, (30, 30)), (1, (2, 58))])
def test_the_floor_is_of_as_many_pictures_as_were_measured_or_half_the_reference(
    samples: int, expected: tuple[int, int]
) -> None:
    floor = frechet.floor(gaussian(60, 5, 0), samples)
    assert floor is not None
    assert (floor.samples, floor.against) == expected
    assert floor.value > 0
    assert frechet.floor(gaussian(3, 5, 0), samples) is None


def test_the_floor_falls_with_more_pictures_and_is_what_like_pictures_get() -> None:
    x = gaussian(4000, 6, 0)
    floors = [frechet.floor(x, n) for n in (50, 200, 2000)]
    values = [f.value for f in floors if f is not None]
    assert values[0] > values[1] > values[2]
    fresh = np.random.default_rng(5).normal(size=(2000, 6)) @ np.random.default_rng(99).normal(size=(6, 6))
    alike = frechet.distance(moments(fresh), moments(x[:2000]))
    assert 0.2 < alike / values[2] < 5


def test_the_kernel_distance_is_the_squared_discrepancy() -> None:
    x, y = gaussian(40, 6, 0) * 0.3, gaussian(50, 6, 1) * 0.3
    whole = kernel_distance(y[:40], x)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a @ b.T / 6 + 1) ** 3)

    off = 1 - np.eye(40)
    within = ((kernel(x, x) + kernel(y[:40], y[:40])) * off).sum() / (40 * 39)
    assert whole.mean == pytest.approx(within - 2 * kernel(x, y[:40]).mean(), rel=1e-9)
    assert (whole.std, whole.subsets, whole.subset_size) == (None, 1, 40)  # all pictures: there is one such subset


def test_subsets_hold_no_more_pictures_than_there_are() -> None:
    x, y = gaussian(40, 6, 0), gaussian(50, 6, 1)
    assert kernel_distance(y, x).subset_size == 40
    part = kernel_distance(y, x, subset_size=20, subsets=7)
    assert (part.subset_size, part.subsets) == (20, 7)
    assert part.std is not None
    assert part.std > 0
    with pytest.raises(BadOption, match="2 to 40"):
        kernel_distance(y, x, subset_size=41)
    with pytest.raises(PicturesError, match="2 or more"):
        kernel_distance(y, x[:1])


def test_what_is_drawn_for_the_kernel_distance_leaves_the_user_s_numbers_alone() -> None:
    x, y = gaussian(40, 6, 0), gaussian(50, 6, 1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = kernel_distance(y, x, subset_size=20)
    assert torch.equal(torch.rand(1), expected)
    assert kernel_distance(y, x, subset_size=20) == first


# --- pictures --------------------------------------------------------------------------------------------------------


def test_order_batches_and_kind_of_number_change_nothing() -> None:
    real, found = pictures(40, 0), pictures(30, 1)
    expected = measured(small(), found, real, resamples=10)
    shuffled = np.random.default_rng(0).permutation(found)
    assert measured(small(), shuffled, real, resamples=10) == expected
    near = partial(pytest.approx, rel=1e-5)
    for other in (
        measured(small(), found, real, batch_size=7),
        measured(small(), found.astype(np.float32) / 255, real),
        measured(small(), torch.from_numpy(found), real),  # type: ignore[arg-type]
    ):
        assert other.value == near(expected.value)


def test_damage_raises_the_distance() -> None:
    real, found = pictures(60, 0), pictures(60, 1)
    values = [measured(small(), np.clip(found * s, 0, 255).astype(np.uint8), real).value for s in (1, 0.9, 0.6)]
    assert values[0] < values[1] < values[2]


def test_sets_of_pictures_of_several_sizes_are_measured() -> None:
    both = Distribution(small(), resamples=0)
    for size in (8, 24, 32):
        both.add(pictures(10, size, size=size))
        both.add(pictures(10, size + 1, size=size), real=True)
    assert both.compute().samples == 30


def test_features_alone_are_kept() -> None:
    found = FeatureSet(small())
    batch = pictures(5)
    alive = weakref.ref(batch)
    found.add(batch)
    del batch
    assert alive() is None
    assert len(found) == 5
    assert found.gathered().shape == (5, 12)


def test_reset_forgets_what_was_measured_and_keeps_the_reference() -> None:
    one = Distribution(small(), resamples=0)
    one.add(pictures(20, 0), real=True)
    one.add(pictures(20, 1, noise=0.5))
    one.reset()
    one.add(pictures(20, 2))
    assert one.compute() == measured(small(), pictures(20, 2), pictures(20, 0))
    one.reset(real=True)
    one.add(pictures(20, 2))
    with pytest.raises(PicturesError, match="no pictures"):
        one.compute()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), r"shape \[2, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.float32), "nothing empty"),
        (np.zeros((8, 8, 3), np.float32), "shape"),
        (np.full((1, 8, 8, 3), 255.0), "values from 255 to 255"),
        (np.full((1, 8, 8, 3), -1.0), "values from -1"),
        (np.full((1, 8, 8, 3), np.nan), "values from nan"),
        (np.zeros((1, 8, 8, 3), np.int64), "int64"),
    ],
)
def test_something_other_than_a_set_of_pictures_is_refused(wrong: np.ndarray, words: str) -> None:
    with pytest.raises(PicturesError, match=words):
        Distribution(small()).add(wrong)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (lambda x: x, "shape"),
        (lambda x: x.flatten(1)[:1], r"Allowed: a tensor \[4, D\]"),
        (lambda x: x.flatten(1) * float("nan"), "NaN"),
        (lambda x: [1, 2, 3, 4], "list"),
        (nn.Flatten(), "training mode"),
    ],
)
def test_an_extractor_that_gives_no_features_is_refused(features: Any, words: str) -> None:
    with pytest.raises(PicturesError, match=words):
        Distribution(extractors.custom(features, name="mine")).add(pictures(4))


def test_too_few_pictures_are_refused() -> None:
    one = Distribution(small())
    one.add(pictures(1))
    one.add(pictures(9), real=True)
    with pytest.raises(PicturesError, match="2 or more"):
        one.compute()


def test_bad_options_are_refused() -> None:
    for options in ({"batch_size": 0}, {"resamples": 1}, {"resamples": -1}):
        with pytest.raises(BadOption):
            Distribution(small(), **options)  # type: ignore[arg-type]


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [13, 30])  # uneven shares; the second process has none
def test_two_processes_find_what_one_does(tmp_path: Path, cut: int) -> None:
    real, found = pictures(40, 0), pictures(30, 1)
    parts = (found[:cut], found[cut:])

    def job(rank: int) -> Any:
        both = Distribution(small(), batch_size=4, resamples=5)
        both.add(real[rank::2], real=True)
        if len(parts[rank]):
            both.add(parts[rank])
        distance, saved = both.compute(), both.statistics()
        return distance.tree(), saved.mean

    alone = measured(small(), found, real, resamples=5, batch_size=4)
    for tree, mean in in_processes(2, job, tmp_path):
        assert tree["samples"] == 30
        assert tree["value"] == pytest.approx(alone.value, rel=1e-9)
        assert tree["interval"]["high"] == pytest.approx(alone.tree()["interval"]["high"], rel=1e-9)
        assert tree["floor"]["value"] == pytest.approx(alone.tree()["floor"]["value"], rel=1e-9)
        assert tree["kernel"]["mean"] == pytest.approx(alone.tree()["kernel"]["mean"], rel=1e-9)
        assert np.allclose(mean, rows_of(real).mean(axis=0), rtol=1e-9)


def rows_of(batch: np.ndarray) -> np.ndarray:
    found = FeatureSet(small())
    found.add(batch)
    return found.gathered()
