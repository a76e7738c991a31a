"""Cuts into runs against brute force, CacheQuant's schedule against the plain recurrence, BAC's against its pitfall."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
from documents import dynamics, of_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plans import cut_of, cuts, planned

from diffcache import planning
from diffcache.documents import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import bac, cachequant
from diffcache.schedulers._cuts import Cheapest, anchored, demand_room, following
from diffcache.schedulers._partition import bounds
from diffcache.schedulers.uniform import reuse
from diffcache.simulation import Simulator

plan = functools.partial(planned, kind="cachequant")

tables_of_costs = st.integers(1, 7).flatmap(
    lambda steps: hnp.arrays(np.float64, (steps, steps + 1), elements=st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.25]))
)


def price(cost: np.ndarray, cut: tuple[int, ...]) -> float:
    return float(sum(cost[a, b] for a, b in itertools.pairwise(cut)))


def walk(seed: int, steps: int, width: int = 5) -> np.ndarray:
    """[1, T, C], faster here and slower there."""
    draw = np.random.default_rng(seed)
    speed = draw.exponential(size=(steps, 1)) ** 2
    return np.cumsum(speed * draw.normal(size=(steps, width)), axis=0)[None]


# --- cuts ------------------------------------------------------------------------------------------------------------


@given(tables_of_costs, st.data())
def test_the_cheapest_cut_is_the_cheapest_of_all(cost: np.ndarray, data: st.DataObject) -> None:
    steps = len(cost)
    least = data.draw(st.integers(1, steps))
    most = data.draw(st.integers(least, steps))
    cost = np.where(following(steps, least, most), cost, np.inf)
    found = Cheapest(cost, steps)
    for runs in range(1, steps + 1):
        best = min(price(cost, cut) for cut in cuts(steps, runs))
        assert found.total(runs) == best
        if best < np.inf:
            mask = found.compute(runs)
            assert mask.sum() == runs
            assert price(cost, cut_of(mask)) == best
        else:
            with pytest.raises(BadOption):
                demand_room(steps, runs, least, most)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_problems_side_by_side_do_not_mix(steps: int, problems: int, seed: int) -> None:
    cost = np.random.default_rng(seed).uniform(size=(problems, steps, steps + 1)) + np.where(
        following(steps), 0, np.inf
    )
    for runs in range(1, steps + 1):
        together = Cheapest(cost, steps).compute(runs)
        assert (together == np.stack([Cheapest(c, runs).compute(runs) for c in cost])).all()


def test_the_possible_numbers_of_runs_are_reported() -> None:
    with pytest.raises(BadOption, match=r"computed_steps=2 was given\. Allowed: 4 to 5 in runs of 2 to 3 steps"):
        demand_room(10, 2, least=2, most=3)
    demand_room(10, 4, least=2, most=3)


def test_errors_add_up_from_the_step_after_the_computed_one() -> None:
    error = np.array([[9.0, 1, 2, 4], [9, 9, 8, 16], [9, 9, 9, 32], [9, 9, 9, 9]])
    assert anchored(error)[0].tolist() == [np.inf, 0, 1, 3, 7]
    assert anchored(error)[1].tolist() == [np.inf, np.inf, 0, 8, 24]
    assert anchored(error)[3].tolist() == [np.inf, np.inf, np.inf, np.inf, 0]


# --- CacheQuant ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_bounds_allow_every_number_of_runs(steps: int, data: st.DataObject) -> None:
    demand_room(steps, runs := data.draw(st.integers(1, steps)), *bounds(steps, runs))


@pytest.mark.parametrize(("steps", "often"), [(250, 20), (250, 10), (50, 5), (20, 4), (20, 2)])
def test_bounds_are_those_of_the_paper(steps: int, often: int) -> None:
    """K = ceil(T/N) groups of ceil(N/2) to 2N steps."""
    assert bounds(steps, math.ceil(steps / often)) == (math.ceil(often / 2), 2 * often)


def naive(outputs: np.ndarray, runs: int, least: int, most: int) -> list[int]:
    """The recurrence as printed, every distance taken anew: M[n, k] = min over j of M[j, k-1] + D(j, n)."""
    steps = len(outputs)

    def distance(start: int, end: int) -> float:
        return sum(float(np.abs(outputs[t] - outputs[start]).mean()) for t in range(start, end))

    best = {(0, 0): (0.0, -1)}
    for k in range(1, runs + 1):
        for n in range(1, steps + 1):
            ways = [
                (best[j, k - 1][0] + distance(j, n), j)
                for j in range(max(0, n - most), n - least + 1)
                if (j, k - 1) in best
            ]
            if ways:
                best[n, k] = min(ways)
    begins, n = [], steps
    for k in range(runs, 0, -1):
        n = best[n, k][1]
        begins.append(n)
    return begins[::-1]


@pytest.mark.parametrize(("steps", "often", "seed"), [(50, 5, 0), (50, 5, 1), (40, 8, 2), (23, 3, 3)])
def test_the_schedule_is_that_of_the_plain_recurrence(steps: int, often: int, seed: int) -> None:
    outputs = walk(seed, steps)
    runs = math.ceil(steps / often)
    mask = plan(of_outputs({"model": outputs}), runs, weighted=False).sites["model"].compute
    assert np.flatnonzero(mask).tolist() == naive(outputs[0], runs, math.ceil(often / 2), 2 * often)


@given(st.integers(0, 99), st.integers(2, 24), st.data())
def test_runs_are_as_many_and_as_long_as_allowed(seed: int, steps: int, data: st.DataObject) -> None:
    runs = data.draw(st.integers(1, steps))
    mask = plan(of_outputs({"model": walk(seed, steps)}), runs).sites["model"].compute
    assert mask.sum() == runs
    least, most = bounds(steps, runs)
    assert all(least <= b - a <= most for a, b in itertools.pairwise(cut_of(mask)))


def test_without_bounds_a_run_may_be_as_short_as_it_likes() -> None:
    outputs = np.array([0.0, 50, 100, 100, 100, 100, 100, 100])[None, :, None]
    found = of_outputs({"model": outputs})
    assert np.flatnonzero(plan(found, 3, bounded=False).sites["model"].compute).tolist() == [0, 1, 2]
    assert bounds(8, 2) == (2, 8)
    assert np.flatnonzero(plan(found, 2, bounded=False).sites["model"].compute).tolist() == [0, 2]
    assert bounds(8, 3) == (2, 6)
    assert np.flatnonzero(plan(found, 3).sites["model"].compute).tolist() == [0, 2, 4]


# --- norms and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "second"),
    [("l1", 2), ("l2", 1), ("cosine", 2)],
)
def test_norms_weigh_differences_differently(norm: str, second: int) -> None:
    """From step 0 to 1 one element changes by 4: less than eight by 1 in L1, more in squares, and no turn at all."""
    outputs = np.zeros((1, 3, 9))
    outputs[0, :, 0] = [6, 10, 10]
    outputs[0, 2, 1:] = 1
    made = plan(of_outputs({"model": outputs}), 2, norm=norm, weighted=False, bounded=False)
    assert np.flatnonzero(made.sites["model"].compute).tolist() == [0, second]


def test_a_step_that_moves_nothing_may_be_wrong() -> None:
    """The output jumps at every step, but only the last ones move the final state."""
    outputs = np.array([0.0, 9, 0, 9, 1, 2])[None, :, None]
    reach = np.tril(np.tile([0.0, 0, 0, 0, 1, -1], (6, 1)))
    found = of_outputs({"model": 1 + outputs}, dynamics=dynamics(reach=reach))
    for norm in ("l1", "l2", "coherent"):
        made = plan(found, 3, norm=norm, bounded=False).sites["model"].compute
        assert made[4:].all(), norm
    assert not plan(found, 3, weighted=False, bounded=False).sites["model"].compute[4:].all()


def test_squares_are_weighed_by_squares() -> None:
    """Reusing step 0 costs (3 · 1)², reusing step 1 (1 · 2)²."""
    reach = np.tril(np.tile([0.0, -3, 1], (3, 1)))
    found = of_outputs({"model": np.array([1.0, 2, 4])[None, :, None]}, dynamics=dynamics(3, reach=reach))
    made = plan(found, 2, norm="l2", bounded=False).sites["model"].compute
    assert np.flatnonzero(made).tolist() == [0, 1]


@pytest.mark.parametrize("norm", ["l1", "l2", "coherent"])
def test_without_dynamics_steps_weigh_what_their_noise_levels_say(norm: str) -> None:
    sigmas = np.linspace(1, 0, 13) ** 2
    with_them = of_outputs(
        {"model": walk(5, 12)},
        sigmas=sigmas,
        dynamics=dynamics(12, reach=np.tril(np.broadcast_to(np.diff(sigmas), (12, 12)))),
    )
    if norm == "coherent":  # looks at the products of what the loop was handed, where it knows them
        gram = walk(5, 12)[0] @ walk(5, 12)[0].T / 5
        with_them = dataclasses.replace(
            with_them, dynamics=dataclasses.replace(with_them.dynamics, grams=gram[None], peaks=np.ones(1))
        )
    without = dataclasses.replace(with_them, dynamics=None)
    flat = dataclasses.replace(without, sigmas=np.linspace(1, 0, 13))
    masks = [plan(p, 4, norm=norm, bounded=False).sites["model"].compute for p in (with_them, without, flat)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(0, 99), st.data())
def test_the_coherent_cost_of_one_run_is_the_final_error_of_it(steps: int, seed: int, data: st.DataObject) -> None:
    """With a network that does not answer, and everything else computed."""
    draw = np.random.default_rng(seed)
    handed = draw.normal(size=(steps, 4)).cumsum(0)
    reach = np.tril(draw.normal(size=(steps, steps)))
    reach[-1] = draw.normal(size=steps)
    loop = dynamics(
        steps,
        grams=(handed @ handed.T)[None],
        peaks=np.ones(1),
        reach=reach,
        response=np.zeros(steps),
        spread=np.zeros(steps),
    )
    found = of_outputs({"model": walk(seed, steps)}, dynamics=loop)
    runs = data.draw(st.integers(1, steps))
    made = plan(found, runs, norm="coherent", bounded=False).sites["model"].compute

    def alone(a: int, b: int) -> float:
        compute = np.ones(steps, bool)
        compute[a + 1 : b] = False
        run = Simulator(loop).played(reuse(compute))
        assert run is not None
        return run.error

    totals = {cut: sum(alone(a, b) for a, b in itertools.pairwise(cut)) for cut in cuts(steps, runs)}
    assert totals[cut_of(made)] == pytest.approx(min(totals.values()), rel=1e-9, abs=1e-12)


# --- many sites, and BAC ---------------------------------------------------------------------------------------------


def test_sites_share_a_mask_or_have_one_each() -> None:
    jumps = {f"block:a.{n}": np.where(np.arange(8) < at, 0.0, 1.0)[None, :, None] for n, at in ((0, 2), (1, 6))}
    jumps["block:a.1"] = 10 * jumps["block:a.1"]
    found = of_outputs({n: 1 + o for n, o in jumps.items()} | {"model": walk(0, 8)})
    shared = plan(found, 2, sites="block", bounded=False).sites
    assert {n: np.flatnonzero(p.compute).tolist() for n, p in shared.items()} == {
        "block:a.0": [0, 6],
        "block:a.1": [0, 6],
    }
    own = plan(found, 2, sites="block", bounded=False, per_site=True).sites
    assert {n: np.flatnonzero(p.compute).tolist() for n, p in own.items()} == {"block:a.0": [0, 2], "block:a.1": [0, 6]}


def bent(seed: int, steps: int, slow: float = 0.05) -> np.ndarray:
    """[1, T, 2]: directions that turn slowly all the way and fast at two places."""
    draw = np.random.default_rng(seed)
    turn = np.full(steps, slow)
    turn[[2, 3, 4]] = draw.uniform(0.12, 0.2, 3)
    angle = np.cumsum(turn)
    return np.stack([np.cos(angle), np.sin(angle)], -1)[None]


def similarity(cut: tuple[int, ...], cosine: np.ndarray) -> float:
    return float(sum(cosine[a, t] for a, b in itertools.pairwise(cut) for t in range(a, b)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("updates", [2, 3, 4])
def test_every_sublayer_has_its_own_best_updates(seed: int, updates: int) -> None:
    outputs = {f"sublayer:a.{n}.attn": bent(seed, 10, slow) for n, slow in enumerate((0.01, 0.05, 0.2))}
    found = of_outputs(outputs)
    made = plan(found, updates, kind="bac", n=0).sites
    assert list(made) == list(outputs)
    for name, plan_ in made.items():
        cosine = found.denoisers["transformer"].sites[name].output.cosine[0]
        best = max(similarity(cut, cosine) for cut in cuts(10, updates))
        assert plan_.compute.sum() == updates
        assert similarity(cut_of(plan_.compute), cosine) == pytest.approx(best)


def best_cut(cosines: list[np.ndarray], updates: int) -> tuple[int, ...]:
    """Of all cuts, that of most similarity, added up over the tables."""
    return max(cuts(len(cosines[0]), updates), key=lambda cut: sum(similarity(cut, cosine) for cosine in cosines))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("updates", [2, 3, 4])
def test_a_unified_schedule_is_the_first_self_attentions_for_all(seed: int, updates: int) -> None:
    """Names are those of DP-T's decoder. The other sublayers turn elsewhere, and two to one would outvote the first."""
    first = "sublayer:decoder.layers.0.self_attn"
    outputs = {
        "sublayer:decoder.layers.0.linear2": 3 * bent(seed, 10)[:, ::-1],
        "sublayer:decoder.layers.0.multihead_attn": 2 * bent(seed, 10)[:, ::-1],
        first: bent(seed, 10),
    }
    found = of_outputs(outputs)
    cosine = {name: part.output.cosine[0] for name, part in found.denoisers["transformer"].sites.items()}
    of_the_first = best_cut([cosine[first]], updates)
    of_the_sum = best_cut(list(cosine.values()), updates)
    assert of_the_first != of_the_sum, "a case where it does not matter"

    made = plan(found, updates, kind="bac", unified=True)
    assert set(made.sites) == set(outputs)
    assert {cut_of(plan_.compute) for plan_ in made.sites.values()} == {of_the_first}
    assert made.notes == {"unified": first}

    summed = plan(found, updates, kind="bac", n=0, per_site=False)
    assert {cut_of(plan_.compute) for plan_ in summed.sites.values()} == {of_the_sum}
    assert not summed.notes


def test_the_first_is_the_first_that_runs_not_the_first_by_name() -> None:
    """As text, block 10 comes before block 2, and a feed-forward before the self-attention that feeds it."""
    early, late = bent(0, 10), bent(0, 10)[:, ::-1]
    names = ("blocks.10.attn", "blocks.2.ff", "blocks.2.self_attn")
    found = of_outputs({f"sublayer:{name}": early if name == "blocks.2.self_attn" else late for name in names})
    made = plan(found, 3, kind="bac", unified=True)
    assert made.notes == {"unified": "sublayer:blocks.2.self_attn"}
    alone = plan(of_outputs({"sublayer:a.0.attn": early}), 3, kind="bac", n=0).sites["sublayer:a.0.attn"]
    other = plan(of_outputs({"sublayer:a.0.attn": late}), 3, kind="bac", n=0).sites["sublayer:a.0.attn"]
    assert alone != other
    assert all(plan_ == alone for plan_ in made.sites.values())


def test_a_unified_schedule_is_asked_for_in_a_spec() -> None:
    found = of_outputs({f"sublayer:a.{n}.attn": bent(n, 12, slow) for n, slow in enumerate((0.01, 0.2))})
    schedule = planning.plan(found, "bac:n=0,unified=1", 3)
    first, second = schedule.denoisers["transformer"].sites.values()
    assert first == second == plan(found, 3, kind="bac", n=0).sites["sublayer:a.0.attn"]
    assert schedule.provenance["unified"] == "sublayer:a.0.attn"
    assert schedule.provenance["scheduler"] == "bac:n=0,unified=1"


def test_similarity_to_the_step_before_would_only_pick_the_largest_changes() -> None:
    """The degenerate objective is a top-k: here it updates three times in a row, and then never again."""
    outputs = bent(0, 12)
    found = of_outputs({"sublayer:a.0.attn": outputs})
    cosine = found.denoisers["transformer"].sites["sublayer:a.0.attn"].output.cosine[0]
    before = np.array([1, *np.diagonal(cosine, offset=1)])

    def consecutive(cut: tuple[int, ...]) -> float:
        return float(sum(before[t] for a, b in itertools.pairwise(cut) for t in range(a + 1, b)))

    largest_changes = [0, *sorted(np.argsort(before)[:3].tolist())]
    assert largest_changes == [0, 2, 3, 4]
    assert max(cuts(12, 4), key=consecutive) == (*largest_changes, 12)

    ours = plan(found, 4, kind="bac", n=0).sites["sublayer:a.0.attn"].compute
    assert np.flatnonzero(ours).tolist() != largest_changes
    assert similarity(cut_of(ours), cosine) > similarity((*largest_changes, 12), cosine) + 0.05


def test_outputs_are_reused_as_they_are() -> None:
    for made, name in ((cachequant.plan, "model"), (functools.partial(bac.plan, n=0), "sublayer:a.0.ff")):
        plan_: SitePlan = made(of_outputs({name: walk(1, 9)}), 4).sites[name]
        assert plan_ == reuse(plan_.compute)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        (2.5, {}, "computed_steps=2.5 was given. Allowed: a whole number, 1 to 6"),
        (7, {}, "computed_steps=7 was given. Allowed: a whole number, 1 to 6"),
        (0, {}, "computed_steps=0 was given"),
        (2, {"kind": "bac", "n": 0}, "it measured model sites, and sublayer sites are needed"),
        (2, {"norm": "l3"}, "norm='l3' was given. Allowed: one of l1, l2, cosine, coherent"),
        (2, {"bounded": "False"}, "bounded='False' was given. Allowed: True or False, in a spec 1 or 0"),
        (2, {"weighted": 2}, "weighted=2 was given"),
        (2, {"kind": "bac", "unified": "yes"}, "unified='yes' was given. Allowed: True or False, in a spec 1 or 0"),
        (2, {"kind": "bac", "norm": "l1"}, "n=5 was given. Allowed: 0 with norm=l1"),
    ],
)
def test_options_that_cannot_be_are_refused(budget: float, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan(of_outputs({"model": walk(0, 6)}), budget, **options)
    assert words in str(caught.value)
