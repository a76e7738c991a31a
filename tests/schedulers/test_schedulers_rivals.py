"""BudCache, CEM and OTCache: a search against all masks, costs against outputs, transport against all assignments."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import STEPS, WIDTH, measurement, only, trajectory
from plans import cut_of, cuts, planned

from diffcache.errors import BadOption
from diffcache.schedulers import Grid
from diffcache.schedulers._sites import at
from diffcache.schedulers.budcache import moved, neighbours, searched
from diffcache.schedulers.cem import gap_costs
from diffcache.schedulers.closed_loop import improve
from diffcache.schedulers.meancache import edges
from diffcache.schedulers.otcache import between, quantile
from diffcache.schedulers.taylorseer import extrapolation
from diffcache.schedulers.uniform import evenly
from diffcache.simulation import Simulator

budcache = functools.partial(planned, kind="budcache")
cem = functools.partial(planned, kind="cem")
otcache = functools.partial(planned, kind="otcache")

OUTPUTS = trajectory(0)  # [B, T, C], the model's outputs in ``measurement``
FOUND = measurement()
HANDED = np.concatenate(
    [trajectory(99 + n, branches=1)[0] for n in range(3)], axis=1
)  # [T, samples · C], its guided ones


def mask_of(steps: int, computed: tuple[int, ...]) -> np.ndarray:
    """bool [T]"""
    return np.isin(np.arange(steps), computed)


# --- BudCache --------------------------------------------------------------------------------------------------------


@functools.cache
def final_error(cut: tuple[int, ...], response: bool = True) -> float:
    """The loop of ``measurement`` run step by step with explicit outputs; predicted steps reuse the newest output.

    Each row is an output: those of three samples, then what the network adds in a separate direction at each step.
    """
    found = FOUND.dynamics
    assert found is not None
    rows = 3 * WIDTH + STEPS
    full = np.zeros((STEPS, rows))
    full[:, : 3 * WIDTH] = HANDED / np.sqrt(3 * WIDTH)
    missed, newest = np.zeros((STEPS, rows)), full[0]
    for i in range(1, STEPS):
        if i in cut:
            state = found.reach[i - 1, :i] @ missed[:i]
            missed[i] = response * found.response[i] * state
            missed[i, 3 * WIDTH + i] += response * np.sqrt(found.spread[i] * (state @ state))
            newest = full[i] + missed[i]
        else:
            missed[i] = newest - full[i]
    end = found.reach[-1] @ missed
    return float(end @ end)


def error_of(compute: np.ndarray) -> float:
    return final_error(cut_of(compute))


@pytest.mark.parametrize("computed", [3, 4])
@pytest.mark.parametrize("response", [True, False])
def test_the_search_finds_the_mask_of_least_error_among_all(computed: int, response: bool) -> None:
    """Three searches: one may stop at a mask that no single move improves."""
    errors = [final_error(cut, response) for cut in cuts(STEPS, computed)]
    made = budcache(FOUND, computed, restarts=3, response=response)
    found = final_error(cut_of(made.sites["model"].compute), response)
    assert found == pytest.approx(min(errors), rel=1e-9)
    assert np.median(errors) > 2 * found


@pytest.mark.parametrize(("annealed", "climbed"), [(0, 20), (200, 0)])
def test_each_half_of_the_search_lowers_the_error(annealed: int, climbed: int) -> None:
    start = budcache(FOUND, 6, sa_iters=0, hc_iters=0).sites["model"].compute
    end = budcache(FOUND, 6, sa_iters=annealed, hc_iters=climbed).sites["model"].compute
    assert error_of(end) < 0.8 * error_of(start)


@pytest.mark.parametrize(("temperature", "stays"), [(1e-6, True), (1e6, False)])
def test_a_cold_search_refuses_worse_masks_and_a_hot_one_accepts_them(temperature: float, stays: bool) -> None:
    """Each mask is worse than all before it. A search that stays sees masks at one move from the first only."""
    seen: list[np.ndarray] = []

    def error(compute: np.ndarray) -> float:
        seen.append(compute)
        return float(len(seen))

    searched(30, 8, error, sa_iters=100, hc_iters=0, t_max=temperature, t_min=temperature)
    furthest = max(int((compute ^ seen[0]).sum()) for compute in seen)
    assert (furthest <= 4) == stays


def test_a_search_cools_down() -> None:
    """Only the second half of 200 moves is too cold to accept a worse mask. It sees fewer new masks."""
    seen: list[np.ndarray] = []

    def error(compute: np.ndarray) -> float:
        seen.append(compute)
        return float(len(seen))

    best = searched(30, 8, error, sa_iters=200, hc_iters=0, t_max=1e9, t_min=1e-9)
    late = seen[-30:]
    assert max(int((compute ^ late[0]).sum()) for compute in late) <= 8  # all at one move from the same mask
    early = seen[:30]
    assert max(int((compute ^ early[0]).sum()) for compute in early) > 8
    assert (best == seen[0]).all()


@settings(max_examples=30)
@given(st.integers(2, 14), st.data())
def test_moves_keep_the_budget_and_the_beginning(steps: int, data: st.DataObject) -> None:
    computed = data.draw(st.integers(1, steps - 1))
    first = data.draw(st.integers(1, computed))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    now = np.arange(steps) < first
    now[draw.choice(np.arange(first, steps), computed - first, replace=False)] = True
    tried = neighbours(now, first, draw)
    if first < computed:
        tried += [moved(now, first, draw) for _ in range(20)]
        changes = {int((candidate ^ now).sum()) for candidate in tried}
        assert changes <= {2, 4}
    for candidate in tried:
        assert candidate.sum() == computed
        assert candidate[:first].all()


def test_annealing_moves_one_step_nine_times_in_ten_and_mostly_near() -> None:
    now, draw = evenly(40, 8), np.random.default_rng(0)
    changed = [np.flatnonzero(moved(now, 2, draw) ^ now) for _ in range(4000)]
    single = [pair for pair in changed if len(pair) == 2]
    assert len(single) / len(changed) == pytest.approx(0.9, abs=0.02)
    near = np.mean([abs(a - b) <= 3 for a, b in single])
    assert 0.7 < near < 0.85  # random places are near too, now and then


def test_every_mask_is_run_once() -> None:
    seen: list[bytes] = []

    def error(compute: np.ndarray) -> float:
        seen.append(compute.tobytes())
        return float(np.flatnonzero(compute).sum())

    searched(12, 4, error, restarts=2)
    assert len(seen) == len(set(seen)) > 10


def test_all_steps_and_one_step_leave_nothing_to_search() -> None:
    for computed in (1, STEPS):
        assert budcache(FOUND, computed).sites["model"].steps_computed == computed


def test_stacks_reuse_the_residual_and_share_the_mask_of_the_model() -> None:
    inside, whole = (budcache(FOUND, 6, sites=sites) for sites in ("stack", "model"))
    assert set(inside.sites) == {"stack:transformer_blocks", "stack:single_transformer_blocks"}
    for made in inside.sites.values():
        assert (made.compute == whole.sites["model"].compute).all()
        assert made.kappa is not None
        assert (made.kappa[0] == ~made.compute).all()


# --- CEM -------------------------------------------------------------------------------------------------------------


def cosine_error(outputs: np.ndarray, step: int, before: int) -> float:
    """Mean over branches of 1 − cosine similarity. Outputs are [B, T, C]."""
    pairs = [(o[step], o[step - before]) for o in outputs]
    return float(np.mean([1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]))


def gap_cost(outputs: np.ndarray, a: int, b: int, power: int, accumulated: bool) -> float:
    """As CEM states it: the error at step b of the interval b − a − 1, added up over the steps so far."""
    interval = b - a - 1
    if interval == 0:
        return 0.0
    steps = range(interval, b + 1) if accumulated else [b]
    return interval**power * sum(cosine_error(outputs, step, interval) for step in steps)


@pytest.mark.parametrize("accumulated", [True, False])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_gap_costs_the_errors_of_its_interval(power: int, accumulated: bool) -> None:
    cosine = at(FOUND, "model")["model"].output.cosine.mean(0)
    cost = gap_costs(cosine, power, accumulated)
    for a, b in itertools.combinations(range(STEPS), 2):
        assert cost[a, b] == pytest.approx(gap_cost(OUTPUTS, a, b, power, accumulated), abs=1e-9)


@pytest.mark.parametrize(
    ("computed", "weighter", "accumulated", "interval"),
    [(4, "quadratic", True, 2), (6, "linear", False, 2), (7, "none", True, 1), (9, "quadratic", False, 1)],
)
def test_the_gaps_are_the_cheapest_of_all(computed: int, weighter: str, accumulated: bool, interval: int) -> None:
    power = ("none", "linear", "quadratic").index(weighter)
    usual = round(STEPS / computed)

    def cost(steps: tuple[int, ...]) -> float:
        return sum(gap_cost(OUTPUTS, a, b, power, accumulated) for a, b in itertools.pairwise(steps))

    ways = [
        (0, *middle, STEPS - 1)
        for middle in itertools.combinations(range(1, STEPS - 1), computed - 2)
        if all(abs(b - a - usual) <= interval for a, b in itertools.pairwise((0, *middle, STEPS - 1)))
    ]
    options: dict[str, Any] = {"weighter": weighter, "accumulated": accumulated, "interval": interval}
    found = cem(FOUND, computed, **options).sites["model"].compute
    made = tuple(np.flatnonzero(found).tolist())
    assert made in ways
    assert cost(made) == pytest.approx(min(map(cost, ways)))
    assert cost(made) < max(map(cost, ways))


def test_the_loop_may_end_before_the_last_step_is_computed() -> None:
    """Eight gaps of 2 to 4 steps from 0 reach no step after 14, and the last step is 15."""
    options: dict[str, Any] = {"interval": 0}
    with pytest.raises(BadOption, match="computed_steps"):
        cem(FOUND, 8, last=True, **options)
    found = np.flatnonzero(cem(FOUND, 8, **options).sites["model"].compute)
    assert found.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert cem(FOUND, 4).sites["model"].compute[-1]
    relaxed = np.flatnonzero(cem(FOUND, 4, last=False).sites["model"].compute)
    assert STEPS - 1 - relaxed[-1] < 3


def test_a_gap_that_is_too_long_is_not_taken() -> None:
    longest_of = [
        np.diff(np.flatnonzero(cem(FOUND, 8, interval=5, longest=n, weighter="none").sites["model"].compute)).max()
        for n in (3, 4, 10)
    ]
    assert longest_of[0] <= 3
    assert longest_of[1] <= 4
    assert longest_of[2] > 4


def test_the_host_method_does_not_change_the_steps() -> None:
    found = FOUND
    held, line = (cem(found, 5, order=order).sites["model"] for order in (0, 1))
    assert (held.compute == line.compute).all()
    assert held.anchors == 1
    assert line.weights == pytest.approx(extrapolation(Grid(found.timesteps), line.compute, 1))
    assert (line.weights != 0).sum() > (held.weights != 0).sum()


# --- OTCache ---------------------------------------------------------------------------------------------------------


def transported(one: np.ndarray, other: np.ndarray, way: float) -> np.ndarray:
    """Solve the transport between two sets of equally many places by trying every assignment, and go part of it."""
    best = min(itertools.permutations(other), key=lambda to: sum((a - b) ** 2 for a, b in zip(one, to, strict=True)))
    return np.sort((1 - way) * one + way * np.array(best))


@settings(max_examples=40)
@given(st.integers(0, 999))
def test_the_way_between_two_schedules_is_the_optimal_transport(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = (np.sort(draw.choice(np.arange(1, 30), 5, replace=False)) for _ in range(2))
    masks = [mask_of(30, (0, *places)) for places in (one, other)]
    at_ = np.arange(1, 6) / 6
    for way in (0.25, 0.5):
        mean = (1 - way) * quantile(masks[0], at_) + way * quantile(masks[1], at_)
        assert mean == pytest.approx(transported(one.astype(float), other.astype(float), way))


def test_the_way_begins_and_ends_at_the_two_schedules() -> None:
    many, few = mask_of(20, (0, 1, 2, 3, 5, 9, 10, 14, 18, 19)), mask_of(20, (0, 2, 9, 17))
    assert (between(many, few, 10) == many).all()
    assert (between(many, few, 4) == few).all()


def test_a_schedule_half_way_has_the_mean_of_both_densities() -> None:
    """Reference: every second step. Anchor: early steps. Half way, with 9 steps, the places are means of quantiles."""
    many, few = mask_of(24, tuple(range(0, 24, 2))), mask_of(24, (0, 1, 2, 3, 4, 5))
    found = np.flatnonzero(between(many, few, 9))
    # anchor's quantiles at k/9: k·6/9 up to step 5, then the line from 5 to 24
    wanted = [0.5 * (24 * k / 9) + 0.5 * (6 * k / 9 if k <= 7 else 5 + 19 * (6 * k / 9 - 5)) for k in range(9)]
    assert found.tolist() == np.floor(np.array(wanted) + 0.5).astype(int).tolist()


@settings(max_examples=60)
@given(st.integers(2, 24), st.data())
def test_every_budget_between_is_met_and_begins_at_the_first_step(steps: int, data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    few = data.draw(st.integers(1, steps - 1))
    many = data.draw(st.integers(few + 1, steps))

    def any_mask(computed: int) -> np.ndarray:
        return mask_of(steps, (0, *draw.choice(np.arange(1, steps), computed - 1, replace=False)))

    one, other = any_mask(many), any_mask(few)
    for computed in range(few, many + 1):
        found = between(one, other, computed)
        assert found.sum() == computed
        assert found[0]


def test_the_stages_are_the_path_the_search_and_the_way_between() -> None:
    found = FOUND
    options: dict[str, Any] = {"reference": 0.5, "anchor": 0.2}  # 8 and 3 of 16 steps
    masks = {k: otcache(found, k, **options).sites["model"].compute for k in (3, 5, 8, 9)}
    for k in (8, 9):
        path = planned(found, k, kind="meancache").sites["model"]
        assert (masks[k] == path.compute).all()
    assert (masks[5] == between(masks[8], masks[3], 5)).all()
    assert (masks[5] != planned(found, 5, kind="meancache").sites["model"].compute).any()


@pytest.mark.parametrize(("steps", "computed"), [(16, 3), (24, 4), (32, 4)])
def test_the_anchor_ends_nearer_to_the_full_run_than_masks_around_it(steps: int, computed: int) -> None:
    """Searches from the even mask and from the path stop at different masks of 24 and of 32 steps."""
    found = measurement(steps)
    assert found.dynamics is not None
    simulator, paths = Simulator(found.dynamics), edges(found, "state", 6)

    def error(compute: np.ndarray) -> float:
        run = simulator.played(paths.along(compute, 6)[0])
        assert run is not None
        return run.error

    own = error(otcache(found, computed, anchor=computed / steps).sites["model"].compute)
    ends = [error(improve(start, error)) for start in (evenly(steps, computed), paths.path(computed, 4.0))]
    assert own <= min(ends)
    assert (steps == 16) == (ends[0] == pytest.approx(ends[1]))
    if steps == 16:
        assert own == pytest.approx(min(error(mask_of(steps, cut)) for cut in cuts(steps, computed)))


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "budget", "options", "words"),
    [
        ("budcache", 5, {"sites": "block"}, "sites='block' was given. Allowed: one of model, stack"),
        ("budcache", 5, {"sa_iters": -1}, "sa_iters=-1 was given. Allowed: a whole number, 0 or more"),
        ("budcache", 5, {"hc_iters": 1.5}, "hc_iters=1.5 was given. Allowed: a whole number, 0 or more"),
        ("budcache", 5, {"restarts": 0}, "restarts=0 was given. Allowed: a whole number, 1 or more"),
        ("budcache", 5, {"t_min": 0}, "t_min=0 was given. Allowed: a number above 0, up to t_max=0.05"),
        ("budcache", 5, {"t_min": 0.1}, "t_min=0.1 was given. Allowed: a number above 0, up to t_max=0.05"),
        ("budcache", 5, {"prefix": 2}, "prefix=2 was given. Allowed: a share of the computed steps, 0 to 1"),
        ("budcache", 5, {"seed": -3}, "seed=-3 was given. Allowed: a whole number, 0 or more"),
        ("budcache", 5, {"response": 2}, "response=2 was given. Allowed: True or False, in a spec 1 or 0"),
        ("cem", 5, {"order": 7}, "order=7 was given. Allowed: 0 to 4"),
        ("cem", 5, {"weighter": "cubic"}, "weighter='cubic' was given. Allowed: one of none, linear, quadratic"),
        ("cem", 5, {"interval": -1}, "interval=-1 was given. Allowed: a whole number, 0 or more"),
        ("cem", 5, {"longest": 0}, "longest=0 was given. Allowed: a whole number, 1 or more"),
        ("cem", 5, {"last": 3}, "last=3 was given. Allowed: True or False, in a spec 1 or 0"),
        ("cem", 1, {}, "computed_steps=1 was given. Allowed: 2 or 3, the nearest with interval=1, longest=10"),
        ("otcache", 5, {"anchor": 0.5}, "anchor=0.5 was given. Allowed: a share of the steps, below reference=0.5"),
        ("otcache", 5, {"reference": 1.5}, "reference=1.5 was given. Allowed: a share of the steps, 0 to 1"),
        ("otcache", 9, {"gamma": 0}, "gamma=0 was given. Allowed: a number, 1 (the sum) to 64"),
        ("otcache", 5, {"span": 0}, "span=0 was given. Allowed: a whole number, 1 or more"),
        ("otcache", 5, {"anchors": 0}, "anchors=0 was given. Allowed: a whole number, 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(kind: str, budget: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as caught:
        planned(FOUND, budget, kind=kind, **options)
    assert words in str(caught.value)


def test_budgets_that_cem_names_are_possible() -> None:
    for computed in (2, 3):
        assert cem(FOUND, computed).sites["model"].steps_computed == computed


def test_stacks_must_be_measured() -> None:
    with pytest.raises(BadOption, match="stack sites are needed"):
        budcache(only(FOUND, "model"), 5, sites="stack")
