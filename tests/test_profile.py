"""The profile as data: what is equal, what it says about itself, and that a file keeps all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import STEPS, measured, profile, profiles, schedule, tables
from hypothesis import HealthCheck, given, settings

from diffcache.errors import DocumentError
from diffcache.profile import DenoiserProfile, Profile
from diffcache.schedule import CacheSchedule, Guidance

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
        pytest.param({"denoisers": {"unet": measured(tables(OUTPUTS, seconds=0.005))}}, id="seconds"),
        pytest.param({"denoisers": {"unet": measured(tables(OUTPUTS, flops=1))}}, id="flops"),
        pytest.param({"denoisers": {"unet": measured(tables(OUTPUTS, output_bytes=1))}}, id="output_bytes"),
        pytest.param({"denoisers": {"unet": measured(tables(OUTPUTS, cosine=None))}}, id="no cosine"),
        pytest.param({"denoisers": {"unet": measured(tables(np.nextafter(OUTPUTS, 9)))}}, id="last bits of the tables"),
        pytest.param({"timesteps": np.linspace(998, 1, STEPS)}, id="timesteps"),
        pytest.param({"sigmas": None}, id="no sigmas"),
        pytest.param({"noise_scheduler": None}, id="no noise scheduler"),
        pytest.param({"guidance": Guidance(mode="batched", branches=2, scale=7.5)}, id="guidance"),
        pytest.param({"samples": 17}, id="samples"),
        pytest.param({"provenance": {}}, id="no provenance"),
    ],
)
def test_the_smallest_difference_makes_profiles_unequal(changes: dict[str, Any]) -> None:
    usual = {"denoisers": {"unet": measured(tables(OUTPUTS))}}
    assert profile(**usual) == profile(**usual)
    assert profile(**usual | changes) != profile(**usual)
    assert profile(**usual | changes).digest() != profile(**usual).digest()


def test_a_profile_is_no_schedule(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"found 'diffcache.profile'"):
        CacheSchedule.load(profile().save(tmp_path / "profile.safetensors"))
    with pytest.raises(DocumentError, match=r"found 'diffcache.schedule'"):
        Profile.load(schedule().save(tmp_path / "schedule.safetensors"))
    assert profile() != schedule()


def test_nothing_in_a_profile_can_be_changed() -> None:
    for document in (profile(), copy.deepcopy(profile())):
        site = document.denoisers["unet"].sites["model"]
        for table in (site.distance, site.gram, site.cosine, document.timesteps, document.sigmas):
            assert table is not None
            with pytest.raises(ValueError, match="read-only"):
                table.flat[0] = 7
        with pytest.raises(AttributeError):
            document.samples = 7  # type: ignore[misc]


def test_sums_in_another_order_are_symmetric_enough() -> None:
    good = tables(OUTPUTS)
    noise = np.triu(np.full((STEPS, STEPS), 1e-8), 1)
    tables(OUTPUTS, gram=good.gram * (1 + noise))
    with pytest.raises(
        DocumentError, match=r"field 'gram': .* its mirror image .* Average them: \(gram \+ gramᵀ\) / 2"
    ):
        tables(OUTPUTS, gram=good.gram * (1 + 1e4 * noise))


def test_outputs_that_are_all_zero_can_be_measured() -> None:
    silent = {"distance": np.zeros((1, STEPS, STEPS)), "gram": np.zeros((1, STEPS, STEPS)), "cosine": None}
    assert tables(OUTPUTS, **silent).gram.any() == np.False_


def test_a_profile_of_one_step_is_a_profile() -> None:
    one = {"steps": 1, "timesteps": np.array([999.0]), "sigmas": np.array([1.0, 0.0])}
    single = profile(**one, denoisers={"unet": measured(tables(OUTPUTS[:, :1]))})
    assert Profile.from_bytes(single.to_bytes()) == single
    assert "changes" not in str(single)


def test_a_profile_printed_shows_what_each_site_costs_and_how_fast_it_moves() -> None:
    outputs = np.full((1, 3, 2), [[1.0], [2.0], [4.0]])
    sites = {"model": tables(outputs), "block:blocks.0": tables(outputs, seconds=0.0001, flops=10**8, output_bytes=512)}
    three = profile(
        steps=3,
        timesteps=np.arange(3.0),
        sigmas=None,
        denoisers={"unet": DenoiserProfile(class_name="Net", sites=sites)},
    )
    assert str(three).splitlines() == [
        "3 steps, 16 samples",
        "unet (Net)",
        "  block:blocks.0  changes 1 per step, 0.1 ms, 0.1 GFLOP, 512 bytes",
        "  model           changes 1 per step, 4 ms, 3 GFLOP, 4096 bytes",
        "prompts: sixteen",
    ]
