"""The profile as data: what is equal, what it says about itself, and that a file keeps all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import STEPS, dynamics, measured, profile, profiles, schedule, site, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffcache.documents import CacheSchedule, DenoiserProfile, Guidance, KeptProfile, Profile, container
from diffcache.errors import DocumentError

pytestmark = pytest.mark.fast

OUTPUTS = np.random.default_rng(1).normal(size=(1, STEPS, 4))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(profiles())
def test_a_file_keeps_any_valid_profile(original: Profile) -> None:
    data = original.to_bytes()
    read = Profile.from_bytes(data)
    assert read == original
    assert read.to_bytes() == data
    assert read.digest() == original.digest()


def test_save_returns_the_path_and_load_reads_it(tmp_path: Path) -> None:
    path = profile().save(tmp_path / "mine.safetensors")
    assert Profile.load(str(path)) == profile()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, seconds=0.005))}}, id="seconds"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, flops=1))}}, id="flops"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, output_bytes=1))}}, id="output_bytes"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, calls=2))}}, id="calls"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, kept={}))}}, id="kept"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, channels=None))}}, id="channels"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, influence=None))}}, id="no influence"),
        pytest.param({"denoisers": {"unet": measured(site(OUTPUTS, modulated_change=None))}}, id="no modulated change"),
        pytest.param(
            {"denoisers": {"unet": measured(site(OUTPUTS, residual=None, residual_ratio=None))}}, id="no residual"
        ),
        pytest.param(
            {"denoisers": {"unet": measured(site(OUTPUTS, residual=tables(OUTPUTS)))}}, id="tables of the residual"
        ),
        pytest.param({"denoisers": {"unet": measured(site(np.nextafter(OUTPUTS, 9)))}}, id="last bits of the tables"),
        pytest.param({"timesteps": np.linspace(998, 1, STEPS)}, id="timesteps"),
        pytest.param({"after": 1}, id="after"),
        pytest.param({"sigmas": None}, id="no sigmas"),
        pytest.param({"noise_scheduler": None}, id="no noise scheduler"),
        pytest.param({"guidance": Guidance(mode="batched", branches=2, scales={"guidance_scale": 7.5})}, id="guidance"),
        pytest.param({"dynamics": None}, id="no dynamics"),
        pytest.param({"dynamics": dynamics(peaks=np.array([2.0, 4.0]))}, id="one peak"),
        pytest.param({"seconds": 0.04}, id="seconds of the loop"),
        pytest.param({"samples": 17}, id="samples"),
        pytest.param({"provenance": {}}, id="no provenance"),
    ],
)
def test_the_smallest_difference_makes_profiles_unequal(changes: dict[str, Any]) -> None:
    usual = {"denoisers": {"unet": measured(site(OUTPUTS))}}
    assert profile(**usual) == profile(**usual)
    assert profile(**usual | changes) != profile(**usual)
    assert profile(**usual | changes).digest() != profile(**usual).digest()


@pytest.mark.parametrize(("after", "version"), [(0, 2), (1, 3)])
def test_only_a_loop_that_ends_early_needs_version_3(after: int, version: int) -> None:
    original = profile(after=after)
    tree, arrays = container.unpack("bytes", original.to_bytes())
    assert tree["version"] == version
    assert ("after" in tree) == (version == 3)
    assert Profile.from_bytes(original.to_bytes()) == original
    other = container.pack("bytes", tree | {"version": 5 - version}, arrays)
    with pytest.raises(DocumentError, match="'after': the field is"):
        Profile.from_bytes(other)


def test_a_profile_is_not_a_schedule(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"found 'diffcache.profile'"):
        CacheSchedule.load(profile().save(tmp_path / "profile.safetensors"))
    with pytest.raises(DocumentError, match=r"found 'diffcache.schedule'"):
        Profile.load(schedule().save(tmp_path / "schedule.safetensors"))
    assert profile() != schedule()


def test_nothing_in_a_profile_can_be_changed() -> None:
    for document in (profile(), copy.deepcopy(profile())):
        found, loop = document.denoisers["unet"].sites["model"], document.dynamics
        assert found.residual is not None
        assert loop is not None
        for table in (
            *(found.output.l1, found.output.relative_l1, found.residual.gram, found.residual_ratio, found.influence),
            *(found.input_change, found.modulated_change, loop.grams, loop.peaks, loop.reach),
            *(loop.response, loop.spread),
            *(document.timesteps, document.sigmas),
        ):
            assert table is not None
            with pytest.raises(ValueError, match="read-only"):
                table.flat[0] = 7
        with pytest.raises(AttributeError):
            document.samples = 7  # type: ignore[misc]


def test_sums_in_another_order_are_symmetric_enough() -> None:
    good = tables(OUTPUTS)
    noise = np.triu(np.full((STEPS, STEPS), 1e-8), 1)
    for name in ("gram", "l1"):
        table = getattr(good, name)
        tables(OUTPUTS, **{name: table * (1 + noise)})
        with pytest.raises(
            DocumentError, match=rf"field '{name}': .* its mirror image .* Average them: \({name} \+ {name}ᵀ\) / 2"
        ):
            tables(OUTPUTS, **{name: table * (1 + 1e4 * noise)})
    loop = dynamics()
    dynamics(grams=loop.grams * (1 + noise))
    with pytest.raises(DocumentError, match=r"field 'grams': sample 0, step 0, other 1 is .* its mirror image"):
        dynamics(grams=loop.grams * (1 + 1e4 * noise))


def test_a_distance_relative_to_another_step_need_not_be_symmetric() -> None:
    grown = tables(np.array([[[1.0], [4.0]]]))
    assert grown.l1[0, 0, 1] == grown.l1[0, 1, 0] == 3
    assert (grown.relative_l1[0, 0, 1], grown.relative_l1[0, 1, 0]) == (0.75, 3)


@given(hnp.arrays(np.float64, (2, 4, 5), elements=st.floats(-2, 2)))
def test_what_follows_from_a_gram_table_is_what_it_was_made_of(tensors: np.ndarray) -> None:
    found = tables(tensors)
    apart = tensors[:, :, None] - tensors[:, None]
    assert found.energy == pytest.approx((tensors**2).mean(-1), abs=1e-12)
    assert found.squared == pytest.approx((apart**2).mean(-1), abs=1e-12)
    for b, i, j in np.ndindex(found.cosine.shape):
        size = np.linalg.norm(tensors[b, i]) * np.linalg.norm(tensors[b, j])
        if size > 1e-100:  # below, the squares underflow
            assert found.cosine[b, i, j] == pytest.approx(tensors[b, i] @ tensors[b, j] / size, abs=1e-6)


def test_outputs_that_are_all_zero_can_be_measured() -> None:
    silent = tables(np.zeros((1, STEPS, 4)))
    assert not silent.squared.any()
    assert (silent.cosine == 1).all()


def test_the_table_of_a_loop_is_the_mean_over_its_samples() -> None:
    loop = dynamics()
    assert np.array_equal(loop.gram, (loop.grams[0] + loop.grams[1]) / 2)


def test_a_profile_of_one_step_is_a_profile() -> None:
    one = {"steps": 1, "timesteps": np.array([999.0]), "sigmas": np.array([1.0, 0.0])}
    single = profile(**one, denoisers={"unet": measured(site(OUTPUTS[:, :1]))})
    assert Profile.from_bytes(single.to_bytes()) == single
    assert "changes" not in str(single)


def test_a_profile_printed_shows_what_each_site_costs_and_how_fast_it_moves() -> None:
    outputs = np.full((1, 3, 2), [[1.0], [2.0], [4.0]])
    kept = {"int8": KeptProfile(bytes=130, error=7e-4), "int4": KeptProfile(bytes=70, error=0.07)}
    block = site(outputs, seconds=0.0001, flops=10**8, output_bytes=512, calls=2, kept=kept)
    sites = {"model": site(outputs, kept={}), "block:blocks.0": block}
    three = profile(
        steps=3,
        timesteps=np.arange(3.0),
        sigmas=None,
        denoisers={"unet": DenoiserProfile(class_name="Net", sites=sites)},
    )
    assert str(three).splitlines() == [
        "3 steps, 16 samples",
        "unet (Net)",
        "  block:blocks.0  changes 1 per step, 0.1 ms, 0.1 GFLOP, 512 bytes, 2 times a step, "
        "off by 10 % in int4, 1 % in int8",
        "  model           changes 1 per step, 4 ms, 3 GFLOP, 4096 bytes",
        "prompts: sixteen",
    ]
