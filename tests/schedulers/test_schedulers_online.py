"""Schedulers of rules that decide in the run: thresholds against plain loops, and what a run makes of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from documents import of_sites, site, tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pipelines import TINY, run, shared

from diffcache import accelerated, measure, report
from diffcache.documents import Guidance, Profile
from diffcache.errors import BadOption
from diffcache.planning import plan as planned
from diffcache.schedulers import easycache, firstblockcache, teacache

STEPS = 9
BATCHED = Guidance(mode="batched", branches=2)
SEPARATE = Guidance(mode="separate", branches=2)
steps_of = st.integers(2, 8)


@st.composite
def outputs(draw: st.DrawFn, branches: int = 1) -> np.ndarray:
    steps = draw(steps_of)
    return draw(hnp.arrays(np.float64, (branches, steps, 3), elements=st.sampled_from([0.5, 1.0, 1.25, 2.0, 4.0])))


def network(outputs: np.ndarray, guidance: Guidance | None = None, **head: Any) -> Profile:
    """Ten operations: the model; nine of them in a stack, of which its first of three blocks does three."""
    return of_sites(
        {
            "model": site(outputs, flops=10),
            "stack:blocks": site(outputs, flops=9, **head),
            "block:blocks.0": site(outputs, flops=3),
        },
        guidance=guidance,
    )


def work(computed: float, steps: int, share: float) -> float:
    return computed + (steps - computed) * share


# --- first_block -----------------------------------------------------------------------------------------------------


def residual_walk(residual: np.ndarray, limit: float, most: int) -> int:
    """How many of the steps [T, C] are computed."""
    newest, computed, row = residual[0], 1, 0
    for now in residual[1:]:
        if np.abs(now - newest).mean() / np.abs(newest).mean() < limit and row < most:
            row += 1
        else:
            newest, computed, row = now, computed + 1, 0
    return computed


@given(outputs(), st.integers(1, 8), st.none() | st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_no_threshold_computes_more_of_what_the_first_block_leaves_within_the_budget(
    found: np.ndarray, budget: int, most: int | None
) -> None:
    residual = found[0] - 1
    assume((np.abs(residual).mean(1) > 0).all())
    steps = len(residual)
    limits = [*np.linspace(0, 4, 300), 1e3]
    row = steps if most is None else most
    possible = [w for limit in limits if (w := work(residual_walk(residual, limit, row), steps, 0.4)) <= budget]
    if not possible:
        with pytest.raises(BadOption, match="computed_steps"):
            firstblockcache.plan(network(found), budget, most=most)
        return
    chosen = firstblockcache.plan(network(found), budget, most=most)
    assert chosen.online is not None
    done = work(residual_walk(residual, chosen.online.limit[0], row), steps, 0.4)
    assert done <= budget + 1e-9
    assert done >= max(possible) - 1e-9
    assert float(chosen.notes["work"].split()[0]) == pytest.approx(done)
    assert chosen.online.most == most


def test_first_block_plans_every_stack_and_reuses_residuals() -> None:
    sites = {
        "model": site(np.ones((1, 4, 2)), flops=20),
        "stack:transformer_blocks": site(np.ones((1, 4, 2)), flops=6),
        "stack:single_transformer_blocks": site(np.ones((1, 4, 2)), flops=9),
    }
    chosen = firstblockcache.plan(of_sites(sites), 2, threshold=0.1)
    assert set(chosen.sites) == {"stack:transformer_blocks", "stack:single_transformer_blocks"}
    for plan in chosen.sites.values():
        assert plan.compute.tolist() == [True, False, False, False]
        assert plan.weights[0, :, 0].tolist() == [0, 1, 1, 1]
        assert plan.kappa is not None
        assert plan.kappa[0].tolist() == [0, 1, 1, 1]
    with pytest.raises(BadOption, match=r"does not hold 'block:transformer_blocks\.0'.*or threshold"):
        firstblockcache.plan(of_sites(sites), 2)


@pytest.mark.parametrize(("guidance", "computed"), [(SEPARATE, 3.0), (BATCHED, 4.0)])
def test_branches_called_apart_are_counted_apart_and_those_in_a_batch_together(
    guidance: Guidance, computed: float
) -> None:
    """The first branch never moves; the second one moves at every step but the last."""
    still = np.full((5, 2), 3.0)
    moving = np.array([[2.0, 2], [3, 3], [5, 5], [9, 9], [17, 17]])
    found = network(np.stack([still, moving]), guidance)
    kept = firstblockcache.plan(found, work(computed, 5, 0.4))
    assert float(kept.notes["work"].split()[0]) <= work(computed, 5, 0.4) + 1e-9
    if guidance is SEPARATE:  # 1 and 5 steps of 5
        assert float(kept.notes["work"].split()[0]) == pytest.approx(work(3.0, 5, 0.4))


# --- teacache --------------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 2), st.integers(2, 20)), elements=st.floats(0.01, 1.0)),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_the_polynomial_is_the_best_of_those_that_rise(change: np.ndarray, degree: int, random: Any) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    answer = np.array([[random.uniform(0, 2) for _ in row] for row in change])
    found = teacache.fitted(change, answer, degree)
    assert found.shape == (degree + 1,)
    assert (found >= 0).all()
    powers = np.vander(change[:, 1:].ravel(), degree + 1)
    _, least = optimize.nnls(powers, answer[:, 1:].ravel())
    error = np.linalg.norm(powers @ found - answer[:, 1:].ravel())
    assert error == pytest.approx(least, rel=1e-5, abs=1e-7)


def test_a_polynomial_that_is_there_is_found() -> None:
    change = np.linspace(0.1, 1.0, 30)[None]
    wanted = np.array([2.0, 0.0, 0.5, 0.0, 0.25])
    np.testing.assert_allclose(teacache.fitted(change, np.polyval(wanted, change), 4), wanted, atol=1e-6)


@given(outputs(), st.integers(2, 8), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_no_threshold_of_added_changes_computes_more_within_the_budget(
    found: np.ndarray, budget: int, warmup: int, data: st.DataObject
) -> None:
    steps = found.shape[1]
    change = data.draw(hnp.arrays(np.float64, (1, steps), elements=st.sampled_from([0.1, 0.25, 0.5])))
    profiled = network(found, modulated_change=change)

    def computed(limit: float, polynomial: np.ndarray) -> int:
        total, count = 0.0, 1
        for i in range(1, steps):
            total += float(np.polyval(polynomial, change[0, i]))
            if i < warmup or not total < limit:
                total, count = 0.0, count + 1
        return count

    try:
        chosen = teacache.plan(profiled, budget, warmup=warmup)
    except BadOption:
        assert work(min(warmup, steps), steps, 0.1) > budget
        return
    assert chosen.online is not None
    assert chosen.online.polynomial is not None
    assert chosen.sites["stack:blocks"].compute.tolist() == [i < warmup for i in range(steps)]
    limits = [*np.linspace(0, 30, 2000), 1e6]
    possible = [w for x in limits if (w := work(computed(x, chosen.online.polynomial), steps, 0.1)) <= budget]
    done = work(computed(chosen.online.limit[0], chosen.online.polynomial), steps, 0.1)
    assert done <= budget + 1e-9
    assert done >= max(possible) - 1e-9


def test_teacache_needs_what_the_first_normalisation_made() -> None:
    with pytest.raises(BadOption, match="it has no modulated_change of 'stack:blocks'"):
        teacache.plan(network(np.ones((1, 4, 2)), modulated_change=None), 2)
    with pytest.raises(BadOption, match=r"degree=9 was given\. Allowed: 0 to 8"):
        teacache.plan(network(np.ones((1, 4, 2))), 2, degree=9)


@pytest.mark.parametrize("scheduler", [firstblockcache, teacache])
def test_without_stacks_there_is_nothing_to_govern(scheduler: Any) -> None:
    with pytest.raises(BadOption, match=r"it measured model sites, and stack sites are needed"):
        scheduler.plan(of_sites({"model": site(np.ones((1, 4, 2)))}), 2)


@pytest.mark.parametrize("scheduler", [firstblockcache, teacache])
def test_stacks_that_prepare_the_text_are_left_alone(scheduler: Any) -> None:
    """Their first block could decide nothing, and they run before the one that does."""
    still = np.ones((1, 4, 2))
    sites = {
        "model": site(still, flops=20),
        "stack:context_refiner": site(still, flops=2, input_change=np.zeros((1, 4))),
        "stack:layers": site(still, flops=9),
        "stack:noise_refiner": site(still, flops=3),
    }
    chosen = scheduler.plan(of_sites(sites), 2, threshold=0.1)
    assert list(chosen.sites) == ["stack:noise_refiner", "stack:layers"]
    with pytest.raises(BadOption, match="the input of every measured stack is the same at all steps"):
        scheduler.plan(of_sites({n: s for n, s in sites.items() if n in ("model", "stack:context_refiner")}), 2)


# --- easycache -------------------------------------------------------------------------------------------------------


def rate_walk(change: np.ndarray, f: np.ndarray, limit: float, warmup: int, most: int) -> list[bool]:
    """The rule on outputs [T, C], the input moving straight on by ``change`` and staying of size 1."""
    computed, total, row, strip = [], 0.0, 0, []
    for i in range(len(f)):
        predicted = False
        if i >= warmup and len(computed) > 1:
            b, a = computed[-2:]
            moved, size = sum(change[b + 1 : a + 1]), np.abs(f[a]).mean()
            if moved > 0 and size > 0:
                total += np.abs(f[a] - f[b]).mean() / moved * change[i] / size
                predicted = total < limit and row < most
        strip.append(not predicted)
        if predicted:
            row += 1
        else:
            computed, total, row = [*computed, i], 0.0, 0
    return strip


@given(outputs(), st.data(), st.floats(0.0, 4.0), st.integers(0, 4), st.integers(1, 4))
def test_the_rate_is_played_as_a_plain_loop_does(
    found: np.ndarray, data: st.DataObject, limit: float, warmup: int, most: int
) -> None:
    steps = found.shape[1]
    change = data.draw(hnp.arrays(np.float64, steps, elements=st.sampled_from([0.0, 0.1, 0.3])))
    l1, size = tables(found).l1[0], np.abs(found[0]).mean(1)
    compute = easycache.played(change, l1, size, limit, warmup, most)
    expected = rate_walk(change, found[0], limit, warmup, most)
    near = easycache.played(change, l1, size, limit * (1 + 1e-9) + 1e-12, warmup, most)
    assert compute.tolist() == expected or near.tolist() != compute.tolist()  # a tie


@given(outputs(), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_rate_s_threshold_keeps_to_the_budget(found: np.ndarray, budget: int, warmup: int) -> None:
    steps = found.shape[1]
    profiled = of_sites({"model": site(found)})
    l1, size = profiled.denoisers["transformer"].sites["model"].output.l1[0], np.abs(found[0]).mean(1)
    change = np.full(steps, 0.25)

    def computed(limit: float) -> int:
        return int(easycache.played(change, l1, size, limit, warmup, steps).sum())

    try:
        chosen = easycache.plan(profiled, budget, warmup=warmup)
    except BadOption:
        assert computed(1e15) > budget
        return
    assert chosen.online is not None
    limit = float(chosen.online.limit[0])
    assert computed(limit) <= budget
    assert computed(limit * (1 - 1e-5) - 1e-12) > budget or limit < 1e-9
    assert chosen.notes["work"] == f"{computed(limit)} full steps"


def test_easycache_needs_a_residual() -> None:
    found = site(np.ones((1, 4, 2)), residual=None, residual_ratio=None)
    with pytest.raises(BadOption, match="it has no residual of 'model'"):
        easycache.plan(of_sites({"model": found}), 2)


# --- what a run makes of it ------------------------------------------------------------------------------------------


@functools.cache
def measured(name: str) -> Profile:
    pipe = shared(name)
    call = TINY[name].call(pipe) | {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    return measure(pipe, [call], sites="stack,block", influence=False)


@pytest.mark.parametrize("scheduler", ["firstblockcache", "teacache", "easycache"])
@pytest.mark.parametrize("name", ["flux", "dit", "wan"])
def test_a_run_does_about_as_much_as_was_planned(name: str, scheduler: str) -> None:
    """Predictions bend the trajectory, and with it what decides; random weights bend it far."""
    pipe, found = shared(name), measured(name)
    seen = []
    for budget in (5, 7):
        schedule = planned(found, scheduler, budget)
        with accelerated(pipe, schedule):
            run(pipe, TINY[name].call(pipe), num_inference_steps=STEPS)
            rows = [row for row in report(pipe).rows if scheduler == "easycache" or row.site.startswith("stack:")]
        assert not any(row.failed_open for row in rows)
        seen.append(np.mean([row.computed for row in rows]))
        assert 1 <= seen[-1] <= STEPS
        assert schedule.provenance["scheduler"] == scheduler
    assert seen[0] < STEPS
    assert seen[0] <= seen[1]


@pytest.mark.parametrize("scheduler", ["firstblockcache", "teacache", "easycache"])
def test_a_threshold_that_is_given_is_used_for_every_budget(scheduler: str) -> None:
    schedule = planned(measured("flux"), scheduler, 3, threshold=0.125, most=2)
    rule = schedule.denoisers["transformer"].online
    assert rule is not None
    assert rule.limit.tolist() == [0.125] * STEPS
    assert rule.most == 2
    for wrong in (-1, float("inf"), True):
        with pytest.raises(BadOption, match="threshold"):
            planned(measured("flux"), scheduler, 3, threshold=wrong)
    with pytest.raises(BadOption, match="most=0"):
        planned(measured("flux"), scheduler, 3, most=0)
