"""Moved noise levels: the algebra of the remaining grid as worked facts, how far each step goes, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from documents import measured, online, profile, site
from hypothesis import given
from hypothesis import strategies as st

from diffcache import planning
from diffcache.documents import NoiseSchedulerId, Profile, SitePlan
from diffcache.errors import BadOption, UnknownName
from diffcache.schedulers import Planned, timestep_adjustment
from diffcache.schedulers.timestep_adjustment import factors, moved, plan
from diffcache.schedulers.uniform import evenly, reuse

pytestmark = pytest.mark.fast


@st.composite
def grids(draw: st.DrawFn) -> np.ndarray:
    """Falling noise levels, of any spacing, ending at 0 or above."""
    gaps = draw(st.lists(st.sampled_from([1e-3, 0.3, 1.0, 1.7, 40.0]), min_size=1, max_size=20))
    end = draw(st.sampled_from([0.0, 0.02, 5.0]))
    return end + np.append(np.cumsum(gaps[::-1])[::-1], 0)


@st.composite
def moves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    sigmas = draw(grids())
    steps = len(sigmas) - 1
    return sigmas, np.array(draw(st.lists(st.floats(0, 1), min_size=steps, max_size=steps)))


# --- the algebra of levels -------------------------------------------------------------------------------------------


@given(grids())
def test_steps_that_go_all_the_way_leave_the_levels_as_they_are(sigmas: np.ndarray) -> None:
    assert (moved(sigmas, np.ones(len(sigmas) - 1)) == sigmas).all()


@given(moves())
def test_levels_never_rise_and_the_ends_are_kept(move: tuple[np.ndarray, np.ndarray]) -> None:
    sigmas, reach = move
    levels = moved(sigmas, reach)
    assert levels.shape == sigmas.shape
    assert levels[0] == sigmas[0]
    assert levels[-1] == sigmas[-1]
    assert (np.diff(levels) <= 0).all()
    assert (levels >= sigmas - 1e-9 * sigmas[0]).all()  # nothing ever runs ahead


@given(moves())
def test_each_step_is_its_share_of_what_is_left_times_its_reach(move: tuple[np.ndarray, np.ndarray]) -> None:
    """step_i = s_i (σ_i − σ_{i+1}) / σ_i φ_i, on levels counted from the last one."""
    sigmas, reach = move
    levels = [sigmas[0]]
    for i in range(len(reach) - 1):
        share = (sigmas[i] - sigmas[i + 1]) / (sigmas[i] - sigmas[-1])
        levels.append(levels[i] - (levels[i] - sigmas[-1]) * share * reach[i])
    np.testing.assert_allclose(moved(sigmas, reach), [*levels, sigmas[-1]], rtol=0, atol=1e-9 * sigmas[0])


@given(st.integers(1, 30), st.data())
def test_on_a_uniform_grid_a_step_is_the_distance_left_over_the_steps_left(steps: int, data: st.DataObject) -> None:
    reach = np.array(data.draw(st.lists(st.floats(0, 1), min_size=steps, max_size=steps)))
    levels = [1.0]
    for i in range(steps):
        levels.append(levels[i] - levels[i] / (steps - i) * (reach[i] if i < steps - 1 else 1))
    np.testing.assert_allclose(moved(np.linspace(1, 0, steps + 1), reach), levels, rtol=0, atol=1e-9)


def test_a_worked_grid() -> None:
    """Step 1 goes half its way: of 0.75 left, a third is 0.25, half of that 0.125. The rest share what is left."""
    levels = moved(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), np.array([1, 0.5, 1, 1]))
    np.testing.assert_allclose(levels, [1, 0.75, 0.625, 0.3125, 0], atol=1e-15)


def test_a_grid_that_reaches_its_last_level_early_still_ends_there() -> None:
    levels = moved(np.array([1.0, 0.5, 0.1, 0.1]), np.array([1, 0.5, 1]))
    np.testing.assert_allclose(levels, [1, 0.5, 0.3, 0.1])


# --- how far a step may go -------------------------------------------------------------------------------------------


def outputs(steps: int = 6, branches: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(branches, steps, 8)).cumsum(axis=1)


def l1(a: np.ndarray) -> float:
    return float(np.abs(a).mean())


def test_the_reach_is_that_of_the_paper_for_plain_reuse() -> None:
    f = outputs(branches=2)
    f[:, 3:] *= 9  # so that step 2 of 6 is small against what comes after it
    compute = np.array([True, True, False, False, True, False])
    reach = factors(site(f), reuse(compute))
    wanted = [
        1,
        1,
        1 - l1(f[:, 1] - f[:, 2]) / l1(f[:, 2] - f[:, 3]),
        1 - l1(f[:, 1] - f[:, 3]) / l1(f[:, 3] - f[:, 4]),
    ]
    assert 0 < wanted[2] < 1
    np.testing.assert_allclose(reach, [*np.clip(wanted, 0, 1), 1, 1], atol=1e-12)


def test_a_reused_residual_is_measured_by_the_residuals() -> None:
    f = outputs()
    x = np.linspace(0, 0.3, 6)[None, :, None] * np.ones(8)
    compute = np.array([True, False, True, True, True, True])
    plan = SitePlan(compute=compute, weights=reuse(compute).weights, kappa=np.where(compute, 0.0, 1.0)[None])
    found = dataclasses.replace(site(f), residual=site(f - x).output)
    missed = l1(f[:, 0] + x[:, 1] - x[:, 0] - f[:, 1])
    np.testing.assert_allclose(factors(found, plan)[1], max(1 - missed / l1(f[:, 1] - f[:, 2]), 0), atol=1e-12)


def test_several_anchors_are_measured_by_the_two_norm() -> None:
    f = np.arange(6)[None, :, None] ** 1.5 * np.ones((1, 6, 8))
    compute = np.array([True, True, False, True, True, True])
    weights = np.zeros((1, 6, 2))
    weights[0, 2] = [2, -1]
    missed = np.sqrt(((2 * f[:, 1] - f[:, 0] - f[:, 2]) ** 2).mean())
    step = np.sqrt(((f[:, 2] - f[:, 3]) ** 2).mean())
    reach = factors(site(f), SitePlan(compute=compute, weights=weights))
    assert 0 < reach[2] < 1
    np.testing.assert_allclose(reach, [1, 1, 1 - missed / step, 1, 1, 1], atol=1e-12)


def test_scale_and_bias_do_not_count() -> None:
    compute = np.array([True, False, True, False, True, True])
    plan = reuse(compute)
    corrected = dataclasses.replace(plan, scale=np.full((1, 6), 0.5), bias=np.full((1, 6, 8), 3.0))
    assert (factors(site(outputs()), corrected) == factors(site(outputs()), plan)).all()


def test_outputs_that_stand_still_let_a_step_go_all_the_way() -> None:
    f = np.ones((1, 6, 8))
    assert (factors(site(f), reuse(evenly(6, 2))) == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kappa": np.full((1, 6), 1.0)}, "it reuses residuals, and the profile has none. Reuse outputs"),
        (
            {"kappa": np.full((1, 6), 1.0), "weights": 2 * reuse(evenly(6, 2)).weights},
            "Use weights of outputs, or one reused",
        ),
        ({"inputs": reuse(evenly(6, 2)).weights}, "Use weights of outputs, or one reused"),
    ],
)
def test_predictions_that_the_tables_do_not_cover_are_refused(change: dict[str, np.ndarray], words: str) -> None:
    bare = dataclasses.replace(site(outputs()), residual=None, residual_ratio=None)
    with pytest.raises(BadOption, match=words):
        factors(bare, dataclasses.replace(reuse(evenly(6, 2)), **change))


# --- the plan --------------------------------------------------------------------------------------------------------


def flat(**changes: object) -> Profile:
    return profile(start=0, **changes)


def test_the_plan_is_the_masks_own_on_moved_levels() -> None:
    mine, its = plan(flat(), 4, mask="taylorseer:order=1", strength=1), planning.plan(flat(), "taylorseer:order=1", 4)
    theirs = its.denoisers["unet"].sites["model"]
    assert (mine.sites["model"].weights == theirs.weights).all()
    (denoiser,) = flat().denoisers.values()
    assert mine.sigmas is not None
    assert (mine.sigmas == moved(flat().sigmas, factors(denoiser.sites["model"], theirs))).all()
    assert (mine.sigmas != flat().sigmas).any()


def test_strength_goes_from_the_grid_as_it_is_to_the_whole_move() -> None:
    none, half, whole = (plan(flat(), 3, mask="uniform", strength=s).sigmas for s in (0, 0.5, 1))
    assert (none == flat().sigmas).all()
    assert (none[1:-1] <= half[1:-1]).all()
    assert (half[1:-1] <= whole[1:-1]).all()
    assert (half < whole).any()


def test_a_full_run_stays_on_its_grid() -> None:
    assert (plan(flat(), 6, mask="uniform").sigmas == flat().sigmas).all()


def test_the_schedule_says_so_and_expects_nothing() -> None:
    schedule = planning.plan(flat(), "timestep_adjustment:mask=taylorseer:order=1,strength=0.5", 4)
    assert (schedule.sigmas != flat().sigmas).any()
    assert schedule.expected is None  # the simulation knows the grid that was measured, no other
    assert schedule.provenance["mask"] == "taylorseer:order=1"
    assert "noise levels moved" in schedule.describe()


def test_a_mask_may_have_several_options() -> None:
    plan(flat(), 4, mask="closed_loop:anchors=2;anchors=2".partition(";")[0])
    with pytest.raises(BadOption, match="one value, in the spec"):
        plan(flat(), 4, mask="closed_loop:anchors=2;anchors=2")


HEUN = np.array([14, 8, 8, 3, 3, 1, 0.0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 2}, r"its loop takes \d+ of \d+ steps, from step 2 on"),
        ({"after": 2}, r"its loop takes \d+ of \d+ steps, from step 0 on"),
        ({"sigmas": None}, r"its noise scheduler \(Euler\) has no noise levels.*DDIM, DDPM and PNDM"),
        ({"sigmas": None, "noise_scheduler": None}, r"\(an unknown noise scheduler\)"),
        ({"sigmas": np.linspace(0, 1, 7)}, "the noise levels of Euler rise"),
        ({"sigmas": HEUN}, "visits the noise level 8 twice, .*second-order"),
    ],
)
def test_levels_that_cannot_be_moved_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        plan(profile(**{"start": 0} | changes), 3, mask="uniform")


def test_a_last_level_that_is_kept_does_not_count_as_a_second_visit() -> None:
    """UniPC with final_sigmas_type "sigma_min"."""
    assert plan(flat(sigmas=np.array([1, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1])), 3, mask="uniform").sigmas is not None


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), "much"])
def test_a_strength_that_cannot_be_is_refused(strength: float) -> None:
    with pytest.raises(BadOption, match=r"strength=.* Allowed: 0"):
        plan(flat(), 3, mask="uniform", strength=strength)


def test_masks_that_are_no_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="noise levels can be moved only once"):
        plan(flat(), 3, mask="timestep_adjustment:mask=uniform")
    with pytest.raises(UnknownName, match="no option of 'uniform' called 'order'"):
        plan(flat(), 3, mask="uniform:order=1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": {"block:b.0": reuse(evenly(6, 3))}}, "it plans other sites than 'model'"),
        ({"sigmas": np.linspace(1, 0, 7)}, "chooses all computed steps before the run, on unmoved levels"),
        ({"online": online()}, "before the run"),
    ],
)
def test_masks_that_cannot_be_measured_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    planned = Planned(**{"sites": {"model": reuse(evenly(6, 3))}} | change)
    monkeypatch.setattr(timestep_adjustment.schedulers, "function", lambda *_: lambda *_, **__: planned)
    with pytest.raises(BadOption, match=words):
        plan(flat(), 3, mask="uniform")


def test_the_class_is_named_where_there_are_no_levels() -> None:
    ddim = NoiseSchedulerId(class_name="DDIMScheduler", config_digest="0" * 64)
    with pytest.raises(BadOption, match=r"\(DDIMScheduler\)"):
        planning.plan(flat(sigmas=None, noise_scheduler=ddim), "timestep_adjustment:mask=uniform", 3)


def test_measured_is_the_model_site() -> None:
    only_blocks = flat(
        denoisers={
            "unet": dataclasses.replace(measured(site(outputs(branches=2))), sites={"block:b.0": site(outputs())})
        }
    )
    with pytest.raises(BadOption, match="measured block sites, and model sites are needed"):
        plan(only_blocks, 3, mask="uniform")
