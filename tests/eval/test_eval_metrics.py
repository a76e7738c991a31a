"""Metrics of pairs agree with independent computations, know the known answers, and fall as damage grows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import skimage.metrics
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcache.errors import BadOption, DiffCacheError, UnknownName
from diffcache.eval import metrics
from diffcache.eval.metrics import About, SamplesError, Scorer, class_accuracy, scorer
from diffcache.eval.metrics.lpips import BACKBONES, MissingWeightsError, WeightsError

ROOT = Path(__file__).parents[2]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def emoji() -> np.ndarray:
    """Four of the demo's pictures of the full run, float64 [4, 80, 80, 3]."""
    page = np.asarray(Image.open(ROOT / "docs" / "demo.png").convert("RGB")) / 255
    pictures = np.stack([page[52:132, left : left + 80] for left in (348, 482, 750, 884)])
    assert pictures.std(axis=(1, 2, 3)).min() > 0.1  # not the white of the page
    return pictures


def noisy(pictures: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(pictures.shape)
    return np.clip(pictures + 0.3 * amount * noise, 0, 1)


def blurred(pictures: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(pictures, sigma=(0, 6 * amount, 6 * amount, 0))


def shifted(pictures: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    return np.roll(pictures, round(6 * amount), axis=2)  # further away, patterns can meet themselves again


def shuffled(pictures: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    """A share of the 8×8 tiles change places."""
    n, height, width, _ = pictures.shape
    tiles = pictures.reshape(n, height // 8, 8, width // 8, 8, 3).swapaxes(2, 3).reshape(n, -1, 8, 8, 3).copy()
    moved = np.random.default_rng(seed).permutation(tiles.shape[1])[: round(amount * tiles.shape[1])]
    tiles[:, moved] = tiles[:, np.roll(moved, 1)]
    return tiles.reshape(n, height // 8, width // 8, 8, 8, 3).swapaxes(2, 3).reshape(pictures.shape)


DAMAGES = {"noise": noisy, "blur": blurred, "shift": shifted, "shuffle": shuffled}


# --- the registry of metrics --------------------------------------------------------------------------------------


def test_every_metric_is_listed_and_says_what_it_is() -> None:
    assert {"action", "latent", "lpips", "psnr", "spectral", "ssim", "state"} <= set(metrics.available())
    better = {}
    for name in metrics.available():
        about = metrics.load(name).ABOUT
        assert about.title
        assert about.about.endswith(".")
        better[name] = about.better
    assert {better[name] for name in ("psnr", "ssim", "state")} == {"higher"}
    assert {better[name] for name in ("action", "latent", "lpips", "spectral")} == {"lower"}
    assert metrics.load("psnr").ABOUT.unit == metrics.load("spectral").ABOUT.unit == "dB"


def test_an_unknown_metric_or_option_is_reported_with_what_is_known() -> None:
    with pytest.raises(UnknownName, match=r"no metric called 'pnsr'. Known: action, .* Did you mean 'psnr'"):
        metrics.load("pnsr")
    with pytest.raises(UnknownName, match=r"no option of 'ssim' called 'rimm'. Known: rim"):
        metrics.score("ssim", np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 3)), rimm=True)


def test_about_refuses_a_third_way_and_a_column_without_head() -> None:
    with pytest.raises(BadOption, match=r"better='more' was given. Allowed: higher or lower"):
        About("x", "", "more", "")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="title"):
        About("", "", "lower", "")


def test_a_metric_of_another_package_is_reached_by_its_address_and_its_results_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([[1.0, 2.0], [1.0], [1.0, np.nan], ["a", "b"]])
    mine = SimpleNamespace(ABOUT=About("mine", "", "lower", "Mine."), score=lambda found, reference: next(answers))
    monkeypatch.setitem(sys.modules, "stranger_of_metrics", SimpleNamespace(mine=mine, other=SimpleNamespace()))
    two = np.zeros((2, 3))
    values = metrics.score("stranger_of_metrics:mine", two, two)
    assert values.dtype == np.float64
    assert values.tolist() == [1.0, 2.0]
    for words in (r"shape \[1\]. Allowed: numbers, one per sample: \[2\]", "nan for sample 1", r"numbers, one per"):
        with pytest.raises(SamplesError, match=words):
            metrics.score("stranger_of_metrics:mine", two, two)
    with pytest.raises(UnknownName, match="A metric has ABOUT"):
        metrics.load("stranger_of_metrics:other")


# --- pictures -----------------------------------------------------------------------------------------------------


def pairs(emoji: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    random, other = rng().random((2, 3, 40, 48, 3))
    return [(noisy(random, 0.4), random), (other, random), (blurred(emoji, 0.5), emoji)]


def test_psnr_agrees_with_scikit_image(emoji: np.ndarray) -> None:
    for found, reference in pairs(emoji):
        expected = [
            skimage.metrics.peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in zip(found, reference, strict=True)
        ]
        np.testing.assert_allclose(metrics.score("psnr", found, reference), expected, rtol=0, atol=1e-6)


def skimage_ssim(found: np.ndarray, reference: np.ndarray) -> list[float]:
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return [
        skimage.metrics.structural_similarity(a, b, data_range=1.0, channel_axis=2, **window)
        for a, b in zip(found, reference, strict=True)
    ]


def test_ssim_agrees_with_scikit_image(emoji: np.ndarray) -> None:
    for found, reference in pairs(emoji):
        values = metrics.score("ssim", found, reference)
        np.testing.assert_allclose(values, skimage_ssim(found, reference), rtol=0, atol=1e-6)


def test_ssim_with_its_rim_is_torchmetrics_own(emoji: np.ndarray) -> None:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    for found, reference in pairs(emoji):
        own = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
        own.update(*(torch.from_numpy(x).permute(0, 3, 1, 2) for x in (found, reference)))
        values = metrics.score("ssim", found, reference, rim=True)
        np.testing.assert_allclose(values, own.compute().numpy(), rtol=0, atol=1e-12)
        assert np.abs(values - metrics.score("ssim", found, reference)).max() > 1e-4


def test_an_offset_of_a_tenth_is_20_db_and_of_a_hundredth_40() -> None:
    reference = np.full((2, 16, 16, 3), 0.5)
    for offset, db in ((0.1, 20), (-0.01, 40)):
        np.testing.assert_allclose(metrics.score("psnr", reference + offset, reference), db, rtol=0, atol=1e-9)


def test_identical_pictures_get_the_best_there_is(emoji: np.ndarray) -> None:
    assert metrics.score("psnr", emoji, emoji).tolist() == [120.0] * 4
    np.testing.assert_allclose(metrics.score("ssim", emoji, emoji), 1, rtol=0, atol=1e-12)


def test_pictures_of_32_and_16_bits_are_scored_in_64(emoji: np.ndarray) -> None:
    for name in ("psnr", "ssim"):
        exact = metrics.score(name, noisy(emoji, 0.2), emoji)
        for dtype, near in ((np.float32, 1e-4), (np.float16, 2e-2)):
            values = metrics.score(name, noisy(emoji, 0.2).astype(dtype), emoji.astype(dtype))
            assert values.dtype == np.float64
            np.testing.assert_allclose(values, exact, rtol=0, atol=near)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@settings(max_examples=4, deadline=None)
@given(amounts=st.tuples(*[st.integers(1, 9)] * 2).filter(lambda x: abs(x[0] - x[1]) > 2), seed=st.integers(0, 99))
def test_more_damage_is_a_lower_score(
    name: str, damage: Callable[..., np.ndarray], emoji: np.ndarray, amounts: tuple[int, int], seed: int
) -> None:
    emoji = emoji[:, 16:64, 16:64]
    less, more = (metrics.score(name, damage(emoji, a / 10, seed), emoji) for a in sorted(amounts))
    assert more.mean() < less.mean()


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_a_video_scores_the_mean_of_its_frames(name: str, emoji: np.ndarray) -> None:
    """Also where it is too long to be scored in one go, and its frames are not equally good."""
    video = np.stack([emoji, emoji[::-1]])
    worse = np.stack([[noisy(frame, 0.1 * (f + 1)) for f, frame in enumerate(one)] for one in video])
    frames = [metrics.score(name, a, b).mean() for a, b in zip(worse, video, strict=True)]
    np.testing.assert_allclose(metrics.score(name, worse, video), frames, rtol=1e-12)
    assert abs(frames[0] - frames[1]) > 1e-6
    if name == "psnr":  # the mean of decibels, not the decibels of the mean
        whole = -10 * np.log10(np.square(worse - video).mean(axis=(1, 2, 3, 4)))
        assert (np.abs(whole - frames) > 0.1).all()


def test_scores_do_not_depend_on_how_many_are_scored_at_once(
    emoji: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = metrics.score("ssim", noisy(emoji, 0.5), emoji)
    monkeypatch.setattr("diffcache.eval.metrics._checks.AT_ONCE", 3 * emoji[0].size)  # three, and one
    np.testing.assert_allclose(metrics.score("ssim", noisy(emoji, 0.5), emoji), whole, rtol=1e-12)


def test_what_filters_leave_beyond_the_range_is_let_pass() -> None:
    values = metrics.score("psnr", np.full((1, 16, 16, 3), 1 + 1e-7), np.full((1, 16, 16, 3), -1e-7))
    assert values == pytest.approx(0, abs=1e-5)


GOOD = np.full((2, 16, 16, 3), 0.5)
WITH_NAN = GOOD.copy()
WITH_NAN[1, 2, 3, 0] = np.nan
REFUSED = {
    "a tensor": (torch.zeros(2, 16, 16, 3), "psnr: found: Tensor. Allowed: a numpy array.*cpu"),
    "bytes": ((GOOD * 255).astype(np.uint8), "dtype uint8. Allowed: float.*divided by 255"),
    "no colours": (GOOD[..., 0], r"shape \[2, 16, 16\]. Allowed: \[N, H, W, 3\] or \[N, F, H, W, 3\]"),
    "channels first": (GOOD.transpose(0, 3, 1, 2), r"shape \[2, 3, 16, 16\]"),
    "none": (GOOD[:0], "nothing empty"),
    "NaN": (WITH_NAN, "sample 1 holds NaN or Inf"),
    "-1..1": (2 * GOOD - 1.5, r"values from -0.5 to -0.5. Allowed: 0..1. Pictures in -1..1 are halved"),
    "0..255": (255 * GOOD, r"values from 127.5 to 127.5. Allowed: 0..1"),
    "one less": (GOOD[:1], r"shapes \[1, 16, 16, 3\] and \[2, 16, 16, 3\]. Allowed: one shape"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pictures_that_cannot_be_compared_are_refused_and_named(kind: str) -> None:
    found, words = REFUSED[kind]
    with pytest.raises(SamplesError, match=words):
        metrics.score("psnr", found, GOOD)
    with pytest.raises(SamplesError):
        metrics.score("psnr", GOOD, found)


def test_pictures_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(SamplesError, match=r"shape \[1, 10, 64, 3\].*sides of 11 pixels or more"):
        metrics.score("ssim", np.zeros((1, 10, 64, 3)), np.zeros((1, 10, 64, 3)))
    assert metrics.score("ssim", np.zeros((1, 11, 11, 3)), np.zeros((1, 11, 11, 3))) == pytest.approx(1)


# --- latents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 16, 2, 4, 4), (3, 5), (3,)])
def test_the_latent_error_is_the_share_of_the_length_that_is_wrong(shape: tuple[int, ...]) -> None:
    reference = rng().standard_normal(shape)
    np.testing.assert_allclose(metrics.score("latent", 1.25 * reference, reference), 0.25, rtol=1e-12)
    assert metrics.score("latent", reference, reference).tolist() == [0, 0, 0]
    assert metrics.score("latent", np.zeros(shape), reference).tolist() == [1, 1, 1]
    found = reference + np.random.default_rng(1).standard_normal(shape)
    flat, right = found.reshape(3, -1), reference.reshape(3, -1)
    expected = np.sqrt(((flat - right) ** 2).sum(axis=1) / (right**2).sum(axis=1))
    np.testing.assert_allclose(metrics.score("latent", found, reference), expected, rtol=1e-12)


def test_latents_in_16_bits_do_not_overflow() -> None:
    reference = np.full((1, 1000), 300, np.float16)  # its square is beyond float16
    assert metrics.score("latent", reference * np.float16(0.5), reference) == pytest.approx(0.5)


def test_a_reference_without_length_is_refused() -> None:
    reference = np.ones((3, 4))
    reference[2] = 0
    with pytest.raises(SamplesError, match="sample 2 is all zeros"):
        metrics.score("latent", np.ones((3, 4)), reference)


# --- audio --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    """Noise and a chord, float64 [2, 2 channels, 9000 samples]; the last of them fills no whole hop."""
    noise = np.random.default_rng(5)
    chord = sum(np.sin(2 * np.pi * f * np.arange(9000) / 16000) for f in (220, 277, 330)) / 4
    return np.stack([0.1 * noise.standard_normal((2, 9000)), chord + 0.01 * noise.standard_normal((2, 9000))])


def by_hand(found: np.ndarray, reference: np.ndarray, window: int, hop: int, floor: float) -> float:
    """One channel: the definition in the file's head, with scipy's window and numpy's transform."""

    def levels(audio: np.ndarray) -> np.ndarray:
        weights = scipy.signal.get_window("hann", window)
        padded = np.pad(audio, window // 2)
        frames = [padded[i : i + window] * weights for i in range(0, len(padded) - window + 1, hop)]
        power = np.abs(np.fft.rfft(frames)) ** 2 / (weights.sum() / 2) ** 2
        return 10 * np.log10(np.maximum(power, 10 ** (floor / 10)))

    return float(np.sqrt(((levels(found) - levels(reference)) ** 2).mean(axis=1)).mean())


@pytest.mark.parametrize(("window", "hop", "floor"), [(2048, 512, -100.0), (256, 100, -40.0)])
def test_the_spectral_distance_is_its_definition(sound: np.ndarray, window: int, hop: int, floor: float) -> None:
    found = 0.7 * sound + 0.02 * np.random.default_rng(6).standard_normal(sound.shape)
    values = metrics.score("spectral", found, sound, window=window, hop=hop, floor_db=floor)
    expected = [
        np.mean([by_hand(a, b, window, hop, floor) for a, b in zip(x, y, strict=True)])
        for x, y in zip(found, sound, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_half_as_loud_is_6_db_and_identical_is_0(sound: np.ndarray) -> None:
    assert metrics.score("spectral", sound, sound).tolist() == [0, 0]
    halved = metrics.score("spectral", sound / 2, sound, floor_db=-300)
    np.testing.assert_allclose(halved, 20 * np.log10(2), rtol=1e-9)


def test_a_full_scale_sine_stands_at_0_db() -> None:
    """Against silence its strongest frequency is as far as the floor is deep."""
    from diffcache.eval.metrics.spectral import _levels

    sine = np.sin(2 * np.pi * 64 / 2048 * np.arange(16384))[None]
    levels = _levels(sine, 2048, 512, -100.0)
    assert levels[0, :, 8].max() == pytest.approx(0, abs=1e-6)
    assert levels[0, 64, 8] == levels[0, :, 8].max()
    assert levels.min() == pytest.approx(-100)


def test_filtered_audio_is_farther_the_more_is_cut(sound: np.ndarray) -> None:
    values = []
    for cutoff in (0.9, 0.6, 0.3):
        b, a = scipy.signal.butter(6, cutoff)
        values.append(metrics.score("spectral", scipy.signal.lfilter(b, a, sound), sound))
    assert (values[0] > 0.1).all()
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()


def test_phases_do_not_count_but_noise_does(sound: np.ndarray) -> None:
    assert metrics.score("spectral", -sound, sound).tolist() == [0, 0]
    noise = np.random.default_rng(7).standard_normal(sound.shape)
    less, more = (metrics.score("spectral", sound + amount * noise, sound) for amount in (0.01, 0.1))
    assert (0 < less).all()
    assert (less < more).all()


def test_silence_and_a_few_samples_are_finite() -> None:
    silence = np.zeros((1, 1, 4096))
    loud = np.random.default_rng(8).standard_normal(silence.shape)
    assert 50 < metrics.score("spectral", silence, loud)[0] < 130
    assert metrics.score("spectral", silence, silence) == 0
    assert metrics.score("spectral", loud[..., :3] / 2, loud[..., :3])[0] == pytest.approx(20 * np.log10(2))


def test_spectra_that_make_no_sense_are_refused(sound: np.ndarray) -> None:
    for options, words in (
        ({"window": 1}, "window=1 was given"),
        ({"window": 512}, "hop=512 was given. Allowed: 1 to 256 samples"),
        ({"hop": 0}, "hop=0"),
        ({"floor_db": -np.inf}, "floor_db=-inf"),
    ):
        with pytest.raises(BadOption, match=words):
            metrics.score("spectral", sound, sound, **options)
    with pytest.raises(SamplesError, match=r"\[N, channels, samples\]"):
        metrics.score("spectral", sound[0], sound[0])


# --- LPIPS --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as torch.hub has it, with randomly initialised backbones under torchvision's names."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for net in ("alex", "squeeze"):
            model = getattr(torchvision.models, BACKBONES[net].network)(weights=None)
            torch.save(model.state_dict(), folder / BACKBONES[net].file)
    return folder


@pytest.fixture
def hub(backbones: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(backbones.parent))
    return backbones


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download was tried"))
    return tmp_path


def test_the_names_of_the_backbones_are_torchvision_s() -> None:
    weights = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
    for net, backbone in BACKBONES.items():
        url = getattr(torchvision.models, weights[net]).DEFAULT.url
        assert url == f"https://download.pytorch.org/models/{backbone.file}"


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_torchmetrics_own_with_the_same_backbone(net: str, emoji: np.ndarray, hub: Path) -> None:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    own = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True, reduction="none")  # finds it in the hub
    found = noisy(emoji, 0.4)
    own.update(*(torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (found, emoji)))
    values = metrics.score("lpips", found, emoji, net=net, at_once=3)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, own.compute().numpy(), rtol=1e-5)
    assert (values > 1e-4).all()


def test_lpips_takes_a_file_by_path_and_another_file_gives_other_numbers(
    emoji: np.ndarray, backbones: Path, empty_hub: Path
) -> None:
    own = empty_hub / "mine.pth"
    state = torch.load(backbones / BACKBONES["squeeze"].file, weights_only=True)
    torch.save(state, own)
    first = metrics.score("lpips", noisy(emoji, 0.4), emoji, net="squeeze", weights=str(own))
    torch.save({key: -x for key, x in state.items()}, own)
    assert (metrics.score("lpips", noisy(emoji, 0.4), emoji, net="squeeze", weights=own) != first).all()


@pytest.mark.parametrize("damage", [noisy, blurred, shuffled])
def test_lpips_grows_with_damage(damage: Callable[..., np.ndarray], emoji: np.ndarray, hub: Path) -> None:
    values = [metrics.score("lpips", damage(emoji, amount), emoji) for amount in (0.0, 0.1, 0.4, 0.9)]
    assert np.abs(values[0]).max() < 1e-7
    assert (np.diff(values, axis=0) > 0).all()


def test_lpips_of_a_video_is_the_mean_of_its_frames(emoji: np.ndarray, hub: Path) -> None:
    video, worse = emoji.reshape(2, 2, 80, 80, 3), noisy(emoji, 0.3).reshape(2, 2, 80, 80, 3)
    frames = metrics.score("lpips", noisy(emoji, 0.3), emoji, net="squeeze").reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(metrics.score("lpips", worse, video, net="squeeze"), frames, rtol=1e-4)


def test_lpips_leaves_the_user_s_random_numbers_alone(emoji: np.ndarray, hub: Path) -> None:
    from diffcache.eval.metrics import lpips

    lpips._network.cache_clear()
    before = torch.get_rng_state()
    metrics.score("lpips", emoji, emoji, net="squeeze")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("net", BACKBONES)
def test_missing_weights_are_named_with_the_place_and_the_way_and_never_fetched(net: str, empty_hub: Path) -> None:
    with pytest.raises(MissingWeightsError) as caught:
        metrics.score("lpips", GOOD, GOOD, net=net)
    file = BACKBONES[net].file
    kept = empty_hub / "checkpoints" / file
    for words in (
        f"LPIPS with net={net!r} needs {file}",
        f"not in torch.hub's folder: {kept}",
        f"https://download.pytorch.org/models/{file}",
        f"pass weights='…/{file}', or put it at {kept}",
    ):
        assert words in str(caught.value)
    assert isinstance(caught.value, DiffCacheError)
    with pytest.raises(MissingWeightsError, match=r"It is not there: nowhere\.pth"):
        metrics.score("lpips", GOOD, GOOD, net=net, weights="nowhere.pth")


def test_a_file_of_something_else_is_refused_and_not_run(tmp_path: Path, backbones: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, ("raise SystemExit('the file ran code')",)

    path = tmp_path / "alex.pth"
    for content, words in (
        ({"features.0.weight": Bomb()}, "cannot be read as tensors"),
        ({"weight": torch.zeros(2)}, r"it has no 'features\.0\.weight'"),
        ({f"features.{i}.{part}": torch.zeros(2) for i in range(14) for part in ("weight", "bias")}, "size mismatch"),
        (torch.zeros(3), "net='alex' asks for"),
        (torch.tensor(3.0), "net='alex' asks for"),
        ([1, 2], "net='alex' asks for"),
        (3, "net='alex' asks for"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=words):
            metrics.score("lpips", GOOD, GOOD, weights=path)
    path.write_bytes(b"not found")
    with pytest.raises(WeightsError, match=r"cannot be read as tensors.*Allowed: alexnet-owt-7be5be79\.pth, whole"):
        metrics.score("lpips", GOOD, GOOD, weights=path)
    with pytest.raises(WeightsError, match=r"not the weights of alexnet.*it has no|size mismatch"):
        metrics.score("lpips", GOOD, GOOD, weights=backbones / BACKBONES["squeeze"].file)


def test_lpips_refuses_other_nets_and_small_pictures(hub: Path) -> None:
    with pytest.raises(BadOption, match=r"net='resnet' was given. Allowed: one of alex, vgg, squeeze"):
        metrics.score("lpips", GOOD, GOOD, net="resnet")
    with pytest.raises(BadOption, match="at_once=0"):
        metrics.score("lpips", GOOD, GOOD, at_once=0)
    with pytest.raises(SamplesError, match="sides of 32 pixels or more"):
        metrics.score("lpips", GOOD, GOOD)
    small = np.full((1, 32, 32, 3), 0.5)
    for net in ("alex", "squeeze"):
        assert metrics.score("lpips", small, small, net=net) == pytest.approx(0)


@pytest.mark.parametrize(("name", "package"), [("ssim", "torchmetrics"), ("lpips", "torchvision")])
def test_a_package_that_is_not_installed_is_one_clear_error(
    name: str, package: str, emoji: np.ndarray, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffcache.eval.metrics import lpips

    lpips._network.cache_clear()
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DiffCacheError, match=rf"{name} needs the package '{package}'.*pip install 'diffcache\[eval\]'"):
        metrics.score(name, emoji, emoji)


# --- scorers ------------------------------------------------------------------------------------------------------


def brightness(pictures: np.ndarray, prompts: list[str]) -> list[float]:
    """A scorer for the tests, also reached by its address."""
    assert isinstance(prompts, list)
    return [float(p.mean()) + len(prompt) for p, prompt in zip(pictures, prompts, strict=True)]


def test_a_scorer_is_an_object_or_an_address(emoji: np.ndarray) -> None:
    prompts = ["a", "bb", "ccc", "dddd"]
    expected = emoji.mean(axis=(1, 2, 3)) + np.arange(1, 5)
    for judge in (brightness, f"{__name__}:brightness"):
        made = scorer(judge, title="brightness", unit="cd", better="lower")
        assert (made.name, made.about.title, made.about.unit, made.about.better) == (
            *("brightness", "brightness"),
            *("cd", "lower"),
        )
        assert made.about.about
        values = made(emoji, prompts)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected)
    assert scorer(made) == made
    assert scorer(made, name="other").name == "other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float32])
def test_a_scorer_may_return_a_tensor(dtype: torch.dtype) -> None:
    answer = torch.tensor([1, 2]).to(dtype)
    if dtype.is_floating_point:
        answer.requires_grad_()
    assert scorer(lambda *_: answer)(GOOD, ["a", "b"]).tolist() == [1.0, 2.0]


def test_a_scorer_s_answers_are_looked_at() -> None:
    for answer, words in (
        ([1.0], r"scorer 'x'.*shape \[1\]. Allowed: numbers, one per sample: \[2\]"),
        ([[1.0], [2.0]], r"shape \[2, 1\]"),
        (1.0, r"shape \[\]"),
        (None, "object"),
        (["1", "2"], "numbers"),
        ([1.0, np.nan], "it returned nan for sample 1. Allowed: finite numbers"),
        ([np.inf, 1.0], "it returned inf for sample 0"),
    ):
        with pytest.raises(SamplesError, match=words):
            scorer(lambda *_, answer=answer: answer, name="x")(GOOD, ["a", "b"])
    with pytest.raises(SamplesError, match=r"1 prompts for 2 pictures. Allowed: a prompt per picture"):
        scorer(brightness)(GOOD, ["a"])
    with pytest.raises(SamplesError, match="one text for 2 pictures"):
        scorer(brightness)(GOOD, "ab")


def test_something_other_than_a_scorer_is_refused() -> None:
    for judge in (3, "brightness", f"{__name__}:ROOT"):
        with pytest.raises(BadOption, match=r"a callable \(pictures, prompts\) -> scores, or its address"):
            scorer(judge)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="There is no module 'not_there_of_scorers'"):
        scorer("not_there_of_scorers:score")


def test_class_accuracy_counts_what_the_classifier_recognises() -> None:
    def classifier(pictures: np.ndarray) -> torch.Tensor:
        """Reddest, greenest, bluest."""
        return torch.from_numpy(pictures.mean(axis=(1, 2)))

    colours = np.zeros((4, 16, 16, 3))
    for i, channel in enumerate((0, 1, 2, 0)):
        colours[i, ..., channel] = 1
    named = class_accuracy(classifier, ["red", "green", "blue"])
    assert isinstance(named, Scorer)
    assert named.about.better == "higher"
    assert named(colours, ["red", "green", "blue", "red"]).tolist() == [1, 1, 1, 1]
    assert named(colours, ["red", "blue", "blue", "green"]).tolist() == [1, 0, 1, 0]
    assert class_accuracy(classifier)(colours, ["0", "2", "2", "0"]).tolist() == [1, 0, 1, 1]
    with pytest.raises(UnknownName, match=r"no class called 'rad'. Known: red, green, blue. Did you mean 'red'"):
        named(colours, ["rad"] * 4)
    with pytest.raises(SamplesError, match=r"it returned shape \[4, 3\]. Allowed: \[4, 2\]"):
        class_accuracy(classifier, ["red", "green"])(colours, ["red"] * 4)
    with pytest.raises(SamplesError, match=r"it returned shape \[4\]. Allowed: \[4, classes\]"):
        class_accuracy(lambda x: [0, 1, 2, 0])(colours, ["0"] * 4)
    with pytest.raises(SamplesError, match="it returned NaN"):
        class_accuracy(lambda x: np.full((4, 2), np.nan))(colours, ["0"] * 4)
    with pytest.raises(BadOption, match="a different name for each class"):
        class_accuracy(classifier, ["red", "red", "blue"])
