"""A budget spread over sites and steps: exact for each site at a price, within the budget, no better than the best."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest
from documents import DIGEST, dynamics, profile, site
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache import planning
from diffcache.documents import DenoiserProfile, Profile, SiteProfile
from diffcache.errors import BadOption
from diffcache.schedulers.allocate import at_price, counts_within, errors, plan

STEPS = 6


def walk(seed: int, steps: int = STEPS, branches: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(branches, steps, 8)).cumsum(axis=1)


def measured(sites: dict[str, SiteProfile], outside: float = 1.0, steps: int = STEPS, **changes: Any) -> Profile:
    """These sites, and a model whose time is theirs and ``outside`` seconds more."""
    seconds = sum(s.seconds * s.calls for s in sites.values()) + outside
    flops = sum(s.flops * s.calls for s in sites.values()) + int(outside * 1e9)
    model = site(walk(99, steps), seconds=seconds, flops=flops)
    denoiser = DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": model, **sites})
    fields = {
        "steps": steps,
        "start": 0,
        "timesteps": np.linspace(999, 1, steps),
        "sigmas": np.linspace(1, 0, steps + 1),
        "denoisers": {"unet": denoiser},
        "guidance": None,
        "dynamics": dynamics(steps),
    }
    return profile(**fields | changes)


def blocks(number: int = 3, seed: int = 0, steps: int = STEPS, **changes: Any) -> dict[str, SiteProfile]:
    draw = np.random.default_rng(seed)
    return {
        f"block:b.{n}": site(
            walk(seed + n, steps) * draw.uniform(0.1, 3),
            **{"seconds": float(draw.integers(1, 4)), "influence": draw.uniform(0, 2, steps)} | changes,
        )
        for n in range(number)
    }


def error_of(masks: np.ndarray, table: np.ndarray) -> float:
    """Of masks [S, T] by the table [S, T, T], step by step."""
    total = 0.0
    for mask, rows in zip(masks, table, strict=True):
        kept = 0
        for t, computed in enumerate(mask):
            kept = t if computed else kept
            total += 0.0 if computed else rows[kept, t]
    return total


def masks_of(steps: int) -> list[np.ndarray]:
    return [np.array([True, *rest]) for rest in itertools.product([False, True], repeat=steps - 1)]


def by_count(table: np.ndarray) -> np.ndarray:
    """[S, T] by brute force: the least error with exactly k computed steps."""
    found = np.full(table.shape[:2], np.inf)
    for j, rows in enumerate(table):
        for mask in masks_of(len(rows)):
            k = mask.sum() - 1
            found[j, k] = min(found[j, k], error_of(mask[None], rows[None]))
    return found


# --- the table of errors ---------------------------------------------------------------------------------------------


def test_an_error_is_reach_times_influence_times_what_the_output_moved() -> None:
    """By a loop of numbers: step t is handed an error, every later step answers that of the state before it."""
    sites = blocks(2)
    found = measured(sites)
    loop = found.dynamics
    assert loop is not None
    table = errors(found, sites)
    for t in range(STEPS):
        handed = np.zeros(STEPS)
        handed[t] = 1
        for i in range(t + 1, STEPS):
            handed[i] = loop.response[i] * (loop.reach[i - 1] @ handed)
        reach = loop.reach[-1] @ handed
        for j, measured_site in enumerate(sites.values()):
            assert measured_site.influence is not None
            wanted = reach**2 * measured_site.influence[t] * measured_site.output.squared[0, :, t]
            np.testing.assert_allclose(table[j, :, t], wanted, rtol=1e-12, atol=1e-15)


def test_without_dynamics_every_step_reaches_as_far() -> None:
    sites = blocks(1)
    table = errors(measured(sites, dynamics=None), sites)
    (one,) = sites.values()
    np.testing.assert_allclose(table[0], one.influence * one.output.squared[0])


def test_branches_are_averaged() -> None:
    f = walk(1, branches=2)
    both, apart = site(f), [site(f[[n]]) for n in (0, 1)]
    found = measured({"block:b.0": apart[0]}, dynamics=None)
    mean = sum(errors(found, {"block:b.0": s}) for s in apart) / 2
    np.testing.assert_allclose(errors(found, {"block:b.0": both}), mean)


def test_a_reused_residual_is_measured_by_the_residuals_and_adds_the_drift_of_the_input() -> None:
    sites = {
        name: dataclasses.replace(s, residual=site(walk(50)).output)
        for name, s in blocks(1, influence=np.ones(STEPS)).items()
    }
    found = measured(sites, dynamics=None)
    np.testing.assert_allclose(errors(found, sites, "residual")[0], sites["block:b.0"].residual.squared[0])
    made = plan(found, 3, sites="block", reuse="residual").sites["block:b.0"]
    assert (made.kappa == ~made.compute).all()
    assert made.kappa.sum() > 0
    assert plan(found, 3, sites="block", reuse="output").sites["block:b.0"].kappa is None


def test_blocks_reuse_residuals_and_sublayers_outputs_unless_asked_otherwise() -> None:
    sites = {**blocks(1), "sublayer:b.0.attn": site(walk(1), seconds=1.0)}
    found = measured(sites)
    assert plan(found, 5, sites="block").sites["block:b.0"].kappa is not None
    assert plan(found, 5, sites="sublayer").sites["sublayer:b.0.attn"].kappa is None


# --- each site for itself --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([None, 0, 1, 2]), st.floats(1e-3, 3))
def test_at_a_price_each_site_is_what_brute_force_finds(
    seed: int, steps: int, max_age: int | None, price: float
) -> None:
    sites = blocks(2, seed, steps)
    found = measured(sites, steps=steps)
    table = errors(found, sites)
    if max_age is not None:
        age = np.arange(steps) - np.arange(steps)[:, None]
        table = np.where(age > max_age, np.inf, table)
    costs = np.array([s.seconds for s in sites.values()])
    counts = at_price(by_count(table), costs, price)
    for j in range(2):
        best = min(error_of(mask[None], table[[j]]) + price * costs[j] * mask.sum() for mask in masks_of(steps))
        np.testing.assert_allclose(by_count(table)[j, counts[j] - 1] + price * costs[j] * counts[j], best)
    budget = float(costs @ counts) + steps  # the outside costs 1 second a step
    made = plan(found, budget / (1 + costs.sum()), sites="block", **({} if max_age is None else {"max_age": max_age}))
    masks = np.stack([p.compute for p in made.sites.values()])
    spent_at_price = sum(by_count(table)[j, counts[j] - 1] for j in range(2))
    assert error_of(masks, table) <= spent_at_price * (1 + 1e-9) + 1e-12  # a price's plan is the best of its budget


@given(st.integers(0, 10**6), st.lists(st.floats(0, 10), min_size=2, max_size=6).map(sorted))
def test_the_dearer_the_work_the_less_of_it(seed: int, prices: list[float]) -> None:
    draw = np.random.default_rng(seed)
    table, costs = draw.uniform(0, 10, (4, 7)), draw.uniform(0.5, 2, 4)
    counts = np.stack([at_price(table, costs, price) for price in prices])
    assert (np.diff(counts, axis=0) <= 0).all()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_the_budget_is_kept_and_spent_as_long_as_that_helps(seed: int, share: float, bumpy: bool) -> None:
    draw = np.random.default_rng(seed)
    table = draw.uniform(0, 10, (4, 7))
    if not bumpy:
        table = -np.sort(-table, axis=1)
    table[0, :2] = np.inf  # a greatest age forbids few computed steps
    costs = draw.integers(1, 4, 4).astype(float)
    least = costs @ [3, 1, 1, 1]
    budget = least + share * (7 * costs.sum() - least)
    counts = counts_within(table, costs, budget)
    left = budget - costs @ counts
    assert left >= -1e-6
    assert counts[0] >= 3
    here = table[np.arange(4), counts - 1]
    for j in range(4):  # no change that still fits would help
        for k in range(counts[j] + 1, 8):
            assert (k - counts[j]) * costs[j] > left - 1e-6 or table[j, k - 1] >= here[j]
    best = min(
        sum(table[j, k - 1] for j, k in enumerate(choice))
        for choice in itertools.product(range(1, 8), repeat=4)
        if costs @ choice <= budget + 1e-6
    )
    assert here.sum() >= best - 1e-9


def test_the_least_budget_is_kept_for_every_rounding() -> None:
    for seed in range(300):
        draw = np.random.default_rng(seed)
        table, costs = -np.sort(-draw.uniform(0, 1, (2, 3)), axis=1), draw.uniform(0.1, 1, 2)
        assert (counts_within(table, costs, float(costs.sum())) == 1).all()


def test_a_price_between_two_budgets_loses_to_the_best_by_less_than_a_step() -> None:
    """Two equal sites and work for three computed steps: one of them gets two."""
    counts = counts_within(np.array([[4.0, 1, 0], [4.0, 1, 0]]), np.ones(2), 3.0)
    assert sorted(counts) == [1, 2]
    assert (counts_within(np.array([[4.0, 1, 0], [4.0, 1, 0]]), np.ones(2), 2.0) == 1).all()
    assert (counts_within(np.array([[4.0, 1, 0], [4.0, 1, 0]]), np.ones(2), 100.0) == 3).all()


# --- the plan --------------------------------------------------------------------------------------------------------


def spent(found: Profile, schedule: Any, outside: float) -> float:
    """Seconds of all that runs."""
    ((_, denoiser),) = found.denoisers.items()
    inside = sum(
        denoiser.sites[name].seconds * denoiser.sites[name].calls * p.steps_computed for _, name, p in schedule.plans()
    )
    return float(inside + outside * found.steps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(3.0, STEPS))
def test_the_budget_is_met_within_one_call_of_the_cheapest_site(seed: int, computed: float) -> None:
    sites = blocks(3, seed)
    found = measured(sites)
    full = 1 + sum(s.seconds for s in sites.values())
    schedule = planning.plan(found, "allocate:sites=block", computed)
    seconds = spent(found, schedule, 1.0)
    assert seconds <= computed * full + 1e-6
    if not all(p.compute.all() for _, _, p in schedule.plans()):
        unfinished = [name for _, name, p in schedule.plans() if not p.compute.all()]
        assert computed * full - seconds < min(sites[name].seconds for name in unfinished) + 1e-6
    assert schedule.provenance["work"] == f"{seconds / full:.4g} of {STEPS} full steps"


def test_more_goes_to_sites_that_matter_more_and_cost_less() -> None:
    f = walk(3)
    sites = {
        "sublayer:b.0.attn": site(f, seconds=1.0, influence=np.full(STEPS, 4.0)),
        "sublayer:b.0.ff": site(f, seconds=1.0, influence=np.full(STEPS, 1.0)),
        "sublayer:b.1.attn": site(f, seconds=4.0, influence=np.full(STEPS, 1.0)),
    }
    made = plan(measured(sites, dynamics=None), 3.5, sites="sublayer")
    counts = [made.sites[name].steps_computed for name in sites]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]


def test_sites_of_one_granularity_are_planned() -> None:
    costs = {"seconds": 1.0}
    sites = {**blocks(1), **{f"sublayer:b.0.{part}": site(walk(n), **costs) for n, part in enumerate(("attn", "ff"))}}
    assert set(plan(measured(sites), 5, sites="sublayer").sites) == {"sublayer:b.0.attn", "sublayer:b.0.ff"}
    assert set(plan(measured(sites), 5).sites) == {"block:b.0"}


def test_operations_count_where_no_time_was_measured_or_where_they_are_asked_for() -> None:
    f = walk(3)
    dear = {"seconds": 3.0, "flops": 10**9, "influence": np.ones(STEPS)}
    sites = {"block:b.0": site(f, **dear), "block:b.1": site(f, **dear | {"seconds": 1.0, "flops": 3 * 10**9})}
    found = measured(sites, dynamics=None)
    first, second = (plan(found, 4, sites="block").sites[n].steps_computed for n in sites)
    assert first < second
    by_flops = plan(found, 4, sites="block", cost="flops").sites
    assert [by_flops[n].steps_computed for n in sites] == [second, first]
    timeless = {n: dataclasses.replace(s, seconds=0.0) for n, s in sites.items()}
    assert (
        plan(measured(timeless, dynamics=None), 4, sites="block").notes["work"]
        == plan(found, 4, sites="block", cost="flops").notes["work"]
    )
    with pytest.raises(
        BadOption, match=r"cost='seconds' cannot be used: the profile did not measure it for every site"
    ):
        plan(measured(timeless), 4, sites="block", cost="seconds")


def test_parts_that_add_up_to_more_than_the_whole_leave_nothing_outside() -> None:
    sites = blocks(2)
    made = plan(measured(sites, outside=-1.0), 3, sites="block")
    assert made.notes["always runs"].startswith("0.0%")


def test_memory_is_reported() -> None:
    sites = blocks(3, output_bytes=1000, calls=2)
    assert plan(measured(sites), STEPS, sites="block").notes["memory"] == "0 bytes kept"
    kept = [p for p in plan(measured(sites), 3, sites="block").sites.values() if not p.compute.all()]
    assert kept
    by_output = plan(measured(sites), 3, sites="block", reuse="output").notes["memory"]
    assert by_output == f"{2000 * len(kept)} bytes kept"
    assert plan(measured(sites), 3, sites="block").notes["memory"] == f"{4000 * len(kept)} bytes kept"  # and inputs


def test_a_greatest_age_is_kept_to() -> None:
    sites = blocks(2, influence=np.zeros(STEPS))
    for p in plan(measured(sites), 5, sites="block", max_age=1).sites.values():
        assert "··" not in "".join("■" if c else "·" for c in p.compute)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"influence": None}, {}, "it has no influence of 'block:b.0'.*sites='block'"),
        ({}, {"sites": "stack"}, "measured model, block sites, and stack sites are needed"),
        ({}, {"reuse": "input"}, "reuse='input'.*output, residual"),
        ({}, {"cost": "money"}, "cost='money'.*measured, seconds, flops"),
        ({}, {"max_age": -1}, "max_age=-1"),
        ({"residual": None, "residual_ratio": None}, {"reuse": "residual"}, "'block:b.0' has no residual"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        plan(measured(blocks(2, **changes)), 4, **{"sites": "block"} | options)


def test_a_budget_that_what_always_runs_uses_up_is_refused_with_what_is_possible() -> None:
    found = measured(blocks(2, seconds=2.0), outside=4.0)  # 8 seconds a step, half of them outside
    with pytest.raises(BadOption, match=re.escape("3.5 to 6 for block sites: 50% of a step lies outside them")):
        plan(found, 3.4, sites="block")
    masks = [p.compute for p in plan(found, 3.5, sites="block").sites.values()]
    assert all(mask.sum() == 1 for mask in masks)
    with pytest.raises(BadOption, match="5 to 6"):  # every second step at least
        plan(measured(blocks(1, seconds=1.0), outside=2.0), 4.9, sites="block", max_age=1)


def test_a_profile_without_the_whole_model_is_refused() -> None:
    found = measured(blocks(2))
    denoiser = dataclasses.replace(found.denoisers["unet"], sites=blocks(2))
    with pytest.raises(BadOption, match="measured block sites, and model sites are needed"):
        plan(dataclasses.replace(found, denoisers={"unet": denoiser}), 4, sites="block")
