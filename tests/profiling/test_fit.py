"""The closed-loop fit: least squares, on the accelerated run, towards the full run's states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrated import BATCH, CALLS, calibration
from documents import mask
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from diffcache.errors import BadOption
from diffcache.profiling.fitting import Fit, replayed_psnr_db
from diffcache.profiling.fitting import fit as fitting
from diffcache.profiling.fitting.fit import Checkpoint, fit, replayed_states
from diffcache.profiling.replay import Replay
from diffcache.profiling.replay.input_share import input_share
from diffcache.schedulers.uniform import evenly


def same(a: Fit, b: Fit) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("compute", "weights", "error_db", "held_db"))


def residual(
    replays: list[Replay], i: int, here: Checkpoint, weights: np.ndarray, own: np.ndarray | None = None
) -> float:
    """How far the next states lie from the full run's, by walking there."""
    there = fitting._predicted(replays, i, here, weights, own)
    misses = [
        (p.state - r.reference(i))[: len(p.state) // r.batch_copies]
        for p, r in zip(there.positions, replays, strict=True)
    ]
    return float(sum(m.double().square().sum() for m in misses) ** 0.5)


def columns(replays: list[Replay], i: int, here: Checkpoint, branches: int) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares problem written out: one column per branch and anchor, and one for the input."""
    rows, targets = [], []
    for one, position, history in zip(replays, here.positions, here.residuals, strict=True):
        zero = torch.zeros_like(one.guided(i, one.recorded(i)))
        count = len(zero)
        at_zero = one.move(i, position, zero).state[:count].double()
        gain = (one.move(i, position, zero + 1).state[:count].double() - at_zero).mean() * one.rescaling(i)
        guidance = one.guidance[i]
        table = [[history[a][b].double() * guidance[b] * gain for b in range(one.branches)] for a in here.anchors]
        if branches == 1:
            flat = [sum(row) for row in table]  # type: ignore[arg-type]
        else:
            flat = [table[k][b] for b in range(branches) for k in range(len(here.anchors))]
        if one.input_share is not None:
            flat.append(one.input(i, position).double() * gain * sum(guidance))
        rows.append(np.stack([c.flatten().numpy() for c in flat], 1))
        targets.append((one.reference(i)[:count].double() - at_zero).flatten().numpy())
    return np.concatenate(rows), np.concatenate(targets)


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "dit", "sd15_ddim", "wan", "lumina2"])
@pytest.mark.parametrize("apart", [True, False], ids=["branches apart", "branches together"])
@pytest.mark.parametrize("sloped", [False, True], ids=["outputs", "estimates"])
def test_every_fitted_step_is_the_least_squares_solution(name: str, apart: bool, sloped: bool) -> None:
    replays = list(calibration(name).replays)
    if sloped:
        found_slopes = input_share(replays[0].trajectory)
        assert found_slopes is not None
        replays = [replay.with_input_share(found_slopes) for replay in replays]
    branches = replays[0].branches if apart else 1
    found = fit(replays, mask("■·■■·" + "·" * (len(replays[0].steps) - 5)), per_branch=apart)
    for i in np.flatnonzero(~found.compute):
        here = found.checkpoints[int(i)]
        weights = found.weights[:, i, : len(here.anchors)]
        table, target = columns(replays, int(i), here, branches)
        best, *_ = np.linalg.lstsq(table, target, rcond=None)
        own = found.input[:, i] if found.input is not None else None
        ours = weights.flatten() if own is None else np.append(weights.flatten(), own[0])
        used = np.linalg.norm(table @ best)
        near = 1e-3 if sloped else 1e-4  # estimates of neighbouring steps are nearly parallel: the ridge has a say
        assert np.linalg.norm(table @ (ours - best)) < near * used
        assert np.linalg.norm(table @ ((1 + 10 * near) * ours - best)) > near * used  # the comparison can fail
        walked = residual(replays, int(i), here, weights, own)
        exact = replays[0].rescaled_branch is None  # else the stretch is taken from the full run
        assert walked == pytest.approx(np.linalg.norm(table @ best - target), rel=1e-5 if exact else 0.2)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("sloped", [False, True], ids=["outputs", "estimates"])
def test_where_steps_clip_a_general_minimiser_comes_no_nearer(name: str, sloped: bool) -> None:
    replays = list(calibration(name).replays)
    assert replays[0].nonlinear_steps
    if sloped:
        own = input_share(replays[0].trajectory)
        assert own is not None
        replays = [replay.with_input_share(own) for replay in replays]
    found = fit(replays, mask("■·■■·" + "·" * (len(replays[0].steps) - 5)))
    gained = 0
    for i in map(int, np.flatnonzero(~found.compute)):
        here, count = found.checkpoints[i], len(found.checkpoints[i].anchors)

        def missed(c: np.ndarray, i: int = i, here: Checkpoint = here, count: int = count) -> float:
            return residual(replays, i, here, c[None, :count], c[count:] if sloped else None)

        reuse = np.append(np.eye(count)[0], [float(one) for one in replays[0].input_share[i : i + 1]] if sloped else [])
        ours = found.weights[0, i, :count]
        ours = np.append(ours, found.input[0, i]) if found.input is not None else ours
        assert missed(ours) <= missed(reuse) * (1 + 1e-6)
        gained += missed(ours) < 0.99 * missed(reuse)
        best = minimize(missed, ours, method="Nelder-Mead", options={"maxfev": 400, "xatol": 1e-6, "fatol": 1e-9})
        assert missed(ours) <= 1.1 * best.fun  # which elements clip is settled in rounds, not for good
    assert gained


@pytest.mark.parametrize("name", ["chroma", "sd15_ddim"])
def test_separate_coefficients_serve_branches_better_step_by_step(name: str) -> None:
    replays = calibration(name).replays
    found = fit(replays, evenly(len(replays[0].steps), 3))
    for i in map(int, np.flatnonzero(~found.compute)):
        here = found.checkpoints[i]
        apart = residual(replays, i, here, *fitting._solve(replays, i, here, 2))
        together = residual(replays, i, here, *fitting._solve(replays, i, here, 1))
        assert apart <= together * (1 + 1e-6)


@pytest.mark.parametrize("name", ["flux", "sd3_heun", "sd15", "wan22", "ddim"])
def test_the_fit_beats_reuse_and_knows_its_own_error(name: str) -> None:
    replays = calibration(name).replays
    steps = len(replays[0].steps)
    compute = evenly(steps, steps // 2, replays[0].first_steps)
    found = fit(replays, compute)
    assert found.error_db.shape == (CALLS * BATCH,)
    assert np.array_equal(replayed_psnr_db(replays, compute, found.weights), found.error_db)
    ends = replayed_states(replays, compute, found.weights)
    references = [r.reference(steps - 1) for r in replays]
    pairs = zip(torch.cat(ends).double().numpy(), torch.cat(references).double().numpy(), strict=True)
    errors = [10 * np.log10((b.max() - b.min()) ** 2 / ((a - b) ** 2).mean()) for a, b in pairs]
    assert found.error_db == pytest.approx(errors)
    reuse = np.where(compute, 0.0, 1.0)[None, :, None] * np.eye(fitting.ANCHORS)[0]
    assert found.score > replayed_psnr_db(replays, compute, reuse).mean()


def test_a_branch_that_has_no_say_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights fit it better than others, and all of them zero would be refused as a prediction of nothing."""
    replays = calibration("chroma").replays
    for one in replays:
        monkeypatch.setattr(one, "guidance", [[1.0, 0.0]] * len(one.steps))
    found = fit(replays, evenly(6, 3))
    predicted = ~found.compute
    assert found.weights[1, predicted] == pytest.approx(np.tile(np.eye(fitting.ANCHORS)[0], (3, 1)))
    assert not np.allclose(found.weights[0, predicted], found.weights[1, predicted], atol=0.01)


def test_with_every_step_computed_nothing_is_missing() -> None:
    for name in ("flux", "dit", "sd15"):
        replays = calibration(name).replays
        found = fit(replays, np.ones(len(replays[0].steps), bool))
        assert found.error_db.min() > 100
        assert not found.weights.any()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.booleans(), min_size=10, max_size=10), st.integers(0, 10), st.booleans())
def test_a_resumed_fit_is_the_fit_from_the_start(computed: list[bool], cut: int, apart: bool) -> None:
    replays = calibration("sd3_heun").replays
    one = np.array([True, *computed])
    other = one.copy()
    other[1 + cut :] = ~other[1 + cut :]
    earlier = fit(replays, one, per_branch=apart)
    resumed = fit(replays, other, per_branch=apart, resume=earlier)
    scratch = fit(replays, other, per_branch=apart)
    assert same(resumed, scratch)
    assert resumed.checkpoints.keys() == scratch.checkpoints.keys() == set(range(11))
    assert all(resumed.checkpoints[i] is earlier.checkpoints[i] for i in range(min(cut + 1, 10) + 1))
    assert np.array_equal(one, other) or not same(earlier, scratch)  # the comparison can fail


def test_a_fit_of_other_options_is_not_resumed() -> None:
    replays = calibration("chroma").replays
    compute = evenly(6, 3)
    for before in (fit(replays, compute, per_branch=False), fit(replays, compute, anchors=2)):
        assert same(fit(replays, compute, resume=before), fit(replays, compute))


def test_fits_repeat_to_the_bit() -> None:
    replays = calibration("sd15").replays
    assert same(fit(replays, evenly(7, 3)), fit(replays, evenly(7, 3)))


def test_more_anchors_than_are_kept_are_not_used() -> None:
    replays = calibration("flux").replays
    found = fit(replays, mask("■■■■··"), anchors=2)
    assert found.weights.shape == (1, 6, 2)
    assert found.checkpoints[5].anchors == (3, 2)
    assert fit(replays, mask("■·■■··")).checkpoints[2].anchors == (0,)


def test_a_denoiser_predicts_from_its_own_outputs() -> None:
    replays = calibration("wan22").replays
    begin = replays[0].first_steps[1]
    found = fit(replays, evenly(6, 4, replays[0].first_steps))
    assert all(a >= begin for i in range(begin + 1, 6) for a in found.checkpoints[i].anchors)


@pytest.mark.parametrize(
    ("name", "compute"), [("flux", "·■■■■■"), ("flux", "■■"), ("wan22", "■······"), ("wan22", "■·····")]
)
def test_a_mask_that_cannot_be_is_refused(name: str, compute: str) -> None:
    replays = calibration(name).replays
    for attempt in (
        lambda: fit(replays, mask(compute)),
        lambda: replayed_psnr_db(replays, mask(compute), np.zeros((1, len(compute), 3))),
    ):
        with pytest.raises(
            BadOption, match=rf"compute='{compute}' was given. Allowed: one entry for each of the loop's 6"
        ):
            attempt()


# Normal equations.


def solved(columns: np.ndarray, target: np.ndarray, towards: np.ndarray) -> np.ndarray:
    return fitting._least_squares(columns.T @ columns, columns.T @ target, towards=towards)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_normal_equations_give_what_lstsq_gives(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    table = draw.normal(size=(200, count)) * 10.0 ** draw.integers(-3, 4, count)
    target = draw.normal(size=200) * 10.0 ** draw.integers(-8, 8)
    best, *_ = np.linalg.lstsq(table, target, rcond=None)
    assert np.linalg.norm(table @ (solved(table, target, np.zeros(count)) - best)) < 1e-6 * np.linalg.norm(table @ best)


def test_where_the_equations_say_nothing_the_answer_is_what_it_is_drawn_towards() -> None:
    draw = np.random.default_rng(0)
    table = np.zeros((50, 4))
    table[:, 2] = draw.normal(size=50)
    assert solved(table, 3 * table[:, 2], np.array([1.0, 0, 1, 0])) == pytest.approx([1, 0, 3, 0])
    twice = np.stack([table[:, 2], table[:, 2]], 1)  # neither of the two alone
    assert solved(twice, 3 * table[:, 2], np.array([1.0, 0])) == pytest.approx([2, 1], abs=1e-5)


@pytest.mark.parametrize("name", ["flux", "dit", "chroma", "sd15_ddim"])
@pytest.mark.parametrize("apart", [True, False], ids=["branches apart", "branches together"])
def test_a_scale_per_channel_is_the_least_squares_solution(name: str, apart: bool) -> None:
    """By a general solver, channel after channel."""
    replays = calibration(name).replays
    steps = len(replays[0].steps)
    compute = mask("■·■■·" + "·" * (steps - 5))
    found = fit(replays, compute, per_branch=apart, per_channel=True)
    assert found.scale is not None
    groups = len(found.weights)
    for i in map(int, np.flatnonzero(~compute)):
        here = found.checkpoints[i]
        tables: list[list[np.ndarray]] = []
        targets: list[np.ndarray] = []
        for one, position, history in zip(replays, here.positions, here.residuals, strict=True):
            at_zero, gain = one.affine(i, position)
            like = one.guided(i, one.recorded(i))
            columns = []
            for b in range(one.branches):
                w = found.weights[min(b, groups - 1), i]
                guess = sum(history[a][b].double() * w[k] for k, a in enumerate(here.anchors))
                columns.append(guess * one.guidance[i][b] * gain)  # type: ignore[operator]
            columns = columns if groups > 1 else [torch.stack(columns).sum(0)]
            dim = 1 if like.ndim >= 4 else like.ndim - 1
            tables.append([c.movedim(dim, 0).flatten(1).numpy() for c in columns])
            target = (one.reference(i).double() - at_zero)[: len(like)]
            targets.append(target.movedim(dim, 0).flatten(1).numpy())
        for channel in range(targets[0].shape[0]):
            table = np.concatenate([np.stack([c[channel] for c in t], 1) for t in tables])
            target = np.concatenate([t[channel] for t in targets])
            pull = np.sqrt(fitting.CHANNEL_RIDGE) * np.diag(np.linalg.norm(table, axis=0))  # towards 1
            best, *_ = np.linalg.lstsq(np.vstack([table, pull]), np.append(target, pull @ np.ones(groups)), rcond=None)
            assert found.scale[:, i, channel] == pytest.approx(best, abs=1e-5)
    walked = replayed_psnr_db(replays, compute, found.weights, found.scale)
    assert walked == pytest.approx(found.error_db, abs=1e-6)
    assert abs(replayed_psnr_db(replays, compute, found.weights) - found.error_db).max() > 1e-3  # the scale matters
