"""Paths against brute force, what an edge weighs against the simulated loop, predictions against explicit vectors."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from documents import DIGEST, dynamics, profile, site
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plans import cut_of, cuts, planned

from diffcache.documents import DenoiserProfile, Dynamics, Profile, SitePlan
from diffcache.errors import BadOption
from diffcache.planning import expected
from diffcache.schedulers import Grid, Planned
from diffcache.schedulers._cuts import Cheapest, cheapest_pairs, following, mildest
from diffcache.schedulers._path import newest
from diffcache.schedulers.dpcache import local_forecast
from diffcache.schedulers.meancache import _local, continued, mean_velocity, unfolded
from diffcache.schedulers.taylorseer import extrapolation
from diffcache.schedulers.uniform import evenly, reuse
from diffcache.simulation import Simulator
from diffcache.simulation.runs import forecast, missed, reused, step_influence, times

plan = functools.partial(planned, kind="lemica")

WIDTH = 4
KINDS = ("shortest_path", "lemica", "meancache", "dpcache")

steps_and_seed = st.tuples(st.integers(1, 9), st.integers(0, 999))


def outputs(steps: int, seed: int) -> np.ndarray:
    """[T, WIDTH]"""
    draw = np.random.default_rng(seed)
    return 2 + np.cumsum(draw.exponential(size=(steps, 1)) * draw.normal(size=(steps, WIDTH)), axis=0)


def loop(steps: int, seed: int, **changes: Any) -> Dynamics:
    """A sampler of any kind, and a network that answers to errors."""
    draw = np.random.default_rng(seed)
    handed = outputs(steps, seed)
    fields = {
        "grams": (handed @ handed.T)[None] / WIDTH,
        "peaks": np.ones(1),
        "reach": np.tril(draw.normal(size=(steps, steps))),
        "response": draw.normal(size=steps) / 2,
    }
    return dynamics(steps, **fields | changes)


def times_of(steps: int, seed: int) -> np.ndarray:
    """[T + 1], falling, irregular."""
    return 9 - np.cumsum(np.random.default_rng(seed).uniform(0.1, 1, steps + 1))


def measured(steps: int, seed: int = 0, handed: np.ndarray | None = None, **changes: Any) -> Profile:
    """``handed`` [T, C]: the model's outputs, else any."""
    handed = outputs(steps, seed) if handed is None else handed
    levels = np.linspace(1, 0, steps + 1) ** 1.5
    denoiser = DenoiserProfile(class_name="Net", config_digest=DIGEST, sites={"model": site(handed[None])})
    reach = np.tril(np.broadcast_to(np.diff(levels), (steps, steps)))
    fields: dict[str, Any] = {
        "steps": steps,
        "start": 0,
        "guidance": None,
        "timesteps": 1000 * levels[:-1],
        "sigmas": levels,
        "denoisers": {"transformer": denoiser},
        "dynamics": loop(steps, seed, grams=(handed @ handed.T)[None] / WIDTH, reach=reach),
    }
    return profile(**fields | changes)


def weights_of(cost: np.ndarray, cut: tuple[int, ...]) -> list[float]:
    return [float(cost[a, b]) for a, b in itertools.pairwise(cut)]


def only_run(steps: int, a: int, b: int) -> np.ndarray:
    """bool [T]: all computed but the steps between a and b."""
    compute = np.ones(steps, bool)
    compute[a + 1 : b] = False
    return compute


def played(found: Dynamics, compute: np.ndarray, weights: np.ndarray) -> float:
    """The simulated loop's final error."""
    run = Simulator(found, doubt=0).played(SitePlan(compute=compute, weights=weights))
    assert run is not None
    return run.error


# --- paths -----------------------------------------------------------------------------------------------------------

# few values: ties are the rule
costs = st.integers(1, 7).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n + 1), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.5]))
)


@given(costs, st.data())
def test_the_mildest_path_is_the_first_of_all_sorted_by_their_worst_edges(
    cost: np.ndarray, data: st.DataObject
) -> None:
    steps = len(cost)
    runs = data.draw(st.integers(1, steps))
    longest = data.draw(st.integers(-(-steps // runs), steps))
    cost = np.where(following(steps, most=longest), cost, np.inf)
    mask = mildest(cost, runs)
    assert mask.sum() == runs
    best = min(sorted(weights_of(cost, cut), reverse=True) for cut in cuts(steps, runs))
    assert sorted(weights_of(cost, cut_of(mask)), reverse=True) == best


def test_the_mildest_path_is_not_the_shortest() -> None:
    cost = np.full((3, 4), np.inf)
    cost[0, 1], cost[1, 3] = 0, 5
    cost[0, 2], cost[2, 3] = 3, 3
    assert cut_of(Cheapest(cost, 2).compute(2)) == (0, 1, 3)
    assert cut_of(mildest(cost, 2)) == (0, 2, 3)


def test_of_equal_worst_edges_the_second_worst_decides() -> None:
    cost = np.full((4, 5), np.inf)
    for cut, weights in (((0, 1, 3, 4), (5, 4, 0)), ((0, 2, 3, 4), (1, 5, 2))):
        for (a, b), weight in zip(itertools.pairwise(cut), weights, strict=True):
            cost[a, b] = weight
    cost[3, 4] = 0
    assert cut_of(mildest(cost, 3)) == (0, 2, 3, 4)  # 5, 1, 0 against 5, 4, 0


@given(steps_and_seed, st.data())
def test_the_best_path_of_pairs_is_the_best_of_all(case: tuple[int, int], data: st.DataObject) -> None:
    steps, seed = case
    draw = np.random.default_rng(seed)
    runs = data.draw(st.integers(1, steps))
    first = draw.integers(0, 5, steps + 1).astype(float)
    cost = draw.integers(0, 5, (steps, steps, steps + 1)).astype(float)
    first[0] = np.inf
    cost[:, ~following(steps)] = np.inf
    cost[~following(steps)[:, :steps]] = np.inf

    def total(cut: tuple[int, ...]) -> float:
        return float(first[cut[1]] + sum(cost[p, a, b] for p, a, b in zip(cut, cut[1:], cut[2:], strict=False)))

    mask = cheapest_pairs(first, cost, runs)
    assert mask.sum() == runs
    assert total(cut_of(mask)) == min(map(total, cuts(steps, runs)))


# --- what an edge weighs ---------------------------------------------------------------------------------------------


@given(steps_and_seed)
def test_an_edge_of_reuse_weighs_what_the_loop_with_it_alone_ends_at(case: tuple[int, int]) -> None:
    found = loop(*case)
    cost = reused(found.gram, step_influence(found))
    for a, b in itertools.combinations(range(case[0] + 1), 2):
        compute = only_run(case[0], a, b)
        alone = played(found, compute, reuse(compute).weights)
        assert cost[a, b] == pytest.approx(alone, rel=1e-6, abs=1e-9 * found.gram.max())
    assert (cost[~following(case[0])] == np.inf).all()


@settings(max_examples=40)
@given(steps_and_seed)
def test_an_edge_of_the_line_weighs_what_the_loop_with_it_alone_ends_at(case: tuple[int, int]) -> None:
    """All steps before p … a are computed here too, but the line goes through p and a."""
    steps = case[0]
    found, at = loop(*case), times_of(*case)
    first, cost = forecast(found.gram, step_influence(found), at[:-1])
    for p, a, b in itertools.combinations(range(steps + 1), 3):
        compute = only_run(steps, a, b)
        weights = np.zeros((1, steps, steps))
        for t in range(a + 1, b):
            beyond = (at[t] - at[a]) / (at[a] - at[p])
            weights[0, t, [0, a - p]] = 1 + beyond, -beyond
        assert cost[p, a, b] == pytest.approx(played(found, compute, weights), rel=1e-6, abs=1e-7 * found.gram.max())
    assert first[1:] == pytest.approx(reused(found.gram, step_influence(found))[0, 1:])
    assert (cost[~following(steps)[:, :steps]] == np.inf).all()


@settings(max_examples=40)
@given(steps_and_seed, st.integers(1, 4))
def test_an_edge_of_the_mean_velocity_weighs_what_the_loop_with_it_alone_ends_at(
    case: tuple[int, int], span: int
) -> None:
    steps = case[0]
    found = loop(*case)
    rows = mean_velocity(times_of(*case), span)
    cost = missed(found.gram, step_influence(found), continued(rows))
    for a, b in itertools.combinations(range(steps + 1), 2):
        compute = only_run(steps, a, b)
        alone = played(found, compute, unfolded(rows, compute))
        assert cost[a, b] == pytest.approx(alone, rel=1e-6, abs=1e-7 * found.gram.max())


def test_at_one_time_there_is_no_line() -> None:
    """Second-order noise schedulers visit a time twice: the newest output is reused there."""
    found = loop(5, 0)
    _, cost = forecast(found.gram, step_influence(found), np.array([9.0, 7, 7, 5, 3]))
    assert cost[1, 2, 3:] == pytest.approx(reused(found.gram, step_influence(found))[2, 3:])
    assert cost[0, 2, 5] != pytest.approx(reused(found.gram, step_influence(found))[2, 5])
    assert np.isfinite(cost[1, 2, 3:]).all()


@given(steps_and_seed, st.integers(1, 4))
def test_local_edges_add_up_relative_errors(case: tuple[int, int], span: int) -> None:
    steps = case[0]
    handed, at = outputs(*case), times_of(*case)
    gram = handed @ handed.T / WIDTH
    size = np.linalg.norm(handed, axis=1)

    def off(guess: np.ndarray, t: int) -> float:
        return float(np.linalg.norm(guess - handed[t]) / size[t])

    guesses = continued(mean_velocity(at, span)) @ handed
    cost = _local(gram, continued(mean_velocity(at, span)))
    first, lines = local_forecast(gram, at[:-1])
    for a, b in itertools.combinations(range(steps + 1), 2):
        assert cost[a, b] == pytest.approx(sum(off(guesses[a, t], t) for t in range(a + 1, b)), abs=1e-6)
        for p in range(a):
            line = [handed[a] + (at[t] - at[a]) / (at[a] - at[p]) * (handed[a] - handed[p]) for t in range(a + 1, b)]
            wanted = sum(off(guess, t) for guess, t in zip(line, range(a + 1, b), strict=True))
            assert lines[p, a, b] == pytest.approx(wanted, abs=1e-6)
        if a == 0:
            assert first[b] == pytest.approx(sum(off(handed[0], t) for t in range(1, b)), abs=1e-6)


# --- the mean velocity -----------------------------------------------------------------------------------------------


@given(steps_and_seed, st.integers(1, 6), st.data())
def test_weights_are_the_method_run_with_its_states(case: tuple[int, int], span: int, data: st.DataObject) -> None:
    """MeanCache as its authors run it: velocities and states are logged, J comes from states, Euler steps."""
    steps = case[0]
    levels, velocity = times_of(*case), outputs(*case)
    compute = np.array([True, *data.draw(st.lists(st.booleans(), min_size=steps - 1, max_size=steps - 1))])
    states, handed = [np.ones(WIDTH)], []
    for i in range(steps):
        if compute[i]:
            handed.append(velocity[i])
        else:
            j = max(i - span, 0)
            mean = (states[i] - states[j]) / (levels[i] - levels[j])
            jvp = (handed[j] - mean) / (levels[i] - levels[j])
            handed.append(handed[-1] - jvp * (levels[i + 1] - levels[i]))
        states.append(states[-1] + (levels[i + 1] - levels[i]) * handed[-1])
    weights = unfolded(mean_velocity(levels, span), compute)
    for i in np.flatnonzero(~compute):
        anchors = np.flatnonzero(compute[:i])[::-1]
        assert weights[0, i, : len(anchors)] @ velocity[anchors] == pytest.approx(handed[i], rel=1e-6, abs=1e-6)
        assert weights[0, i].sum() == pytest.approx(1)


def test_a_span_of_one_is_plain_reuse() -> None:
    compute = evenly(9, 4)
    assert unfolded(mean_velocity(times_of(9, 0), 1), compute)[:, :, :1] == pytest.approx(reuse(compute).weights)
    assert plan(measured(9), 4, kind="meancache", span=1).sites["model"].anchors == 1


def test_steps_of_no_length_divide_nothing() -> None:
    rows = mean_velocity(np.array([3.0, 3, 3, 2, 1]), 2)
    assert np.isfinite(rows).all()
    assert rows[1:].sum(1) == pytest.approx(1)


def test_what_falls_on_older_anchors_goes_to_the_oldest_that_is_left() -> None:
    weights = np.array([[[0.0, 0, 0, 0], [2, -1.5, 0.75, -0.25]]])
    assert newest(weights, 2).tolist() == [[[0, 0], [2, -1]]]
    assert newest(weights, 1).tolist() == [[[0], [1]]]
    assert newest(weights, 9).tolist() == weights.tolist()


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["state", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_so_many_steps_and_no_longer_gap_than_allowed(kind: str, edge: str) -> None:
    found = measured(13)
    for runs in range(1, 14):
        assert plan(found, runs, kind=kind, edge=edge).sites["model"].steps_computed == runs
    for most in (1, 2, 5):
        compute = plan(found, 7, kind=kind, edge=edge, most=most).sites["model"].compute
        assert max(np.diff(cut_of(compute))) - 1 <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_best_of_all_by_its_own_measure(kind: str, seed: int) -> None:
    found = measured(9, seed)
    assert found.dynamics is not None
    gram, weights = found.dynamics.gram, step_influence(found.dynamics)
    reuse_cost = np.sqrt(reused(gram, weights))
    rules = [continued(mean_velocity(times(found), s)) for s in range(1, 7)]
    peak_cost = np.sqrt(np.min([missed(gram, weights, rule) for rule in rules], axis=0)) ** 4
    first, pairs = map(np.sqrt, forecast(gram, weights, found.timesteps))

    def measure(cut: tuple[int, ...]) -> Any:
        if kind == "dpcache":
            return float(first[cut[1]] + sum(pairs[c] for c in zip(cut, cut[1:], cut[2:], strict=False)))
        found_weights = weights_of(peak_cost if kind == "meancache" else reuse_cost, cut)
        return sorted(found_weights, reverse=True) if kind == "lemica" else sum(found_weights)

    made = cut_of(plan(found, 4, kind=kind).sites["model"].compute)
    assert measure(made) == pytest.approx(min(map(measure, cuts(9, 4))))


def test_local_edges_of_reuse_are_the_relative_l1_of_what_is_missed() -> None:
    found = measured(8, handed=outputs(8, 3) * np.geomspace(1, 50, 8)[:, None])
    table = found.denoisers["transformer"].sites["model"].output.relative_l1[0]

    def total(cut: tuple[int, ...]) -> float:
        return float(sum(table[a, t] for a, b in itertools.pairwise(cut) for t in range(a + 1, b)))

    made = cut_of(plan(found, 3, kind="shortest_path", edge="local").sites["model"].compute)
    assert total(made) == pytest.approx(min(map(total, cuts(8, 3))))


def test_the_peak_lies_between_the_sum_and_the_worst() -> None:
    found = measured(12, 4)
    shortest, mild = (plan(found, 4, kind=kind).sites["model"].compute for kind in ("shortest_path", "lemica"))
    assert (shortest != mild).any()
    sums = plan(found, 4, kind="meancache", span=1, gamma=1).sites["model"].compute
    worst = plan(found, 4, kind="meancache", span=1, gamma=64).sites["model"].compute
    assert (sums == shortest).all()
    assert found.dynamics is not None
    cost = np.sqrt(reused(found.dynamics.gram, step_influence(found.dynamics)))
    assert max(weights_of(cost, cut_of(worst))) == pytest.approx(max(weights_of(cost, cut_of(mild))))


def test_predictions_are_those_the_kind_names() -> None:
    found = measured(12, 1)
    for kind in ("shortest_path", "lemica"):
        made = plan(found, 4, kind=kind).sites["model"]
        assert made == reuse(made.compute)
    made = plan(found, 4, kind="dpcache").sites["model"]
    line = extrapolation(Grid(found.timesteps), made.compute, 1)
    assert made.weights == pytest.approx(line)
    assert plan(found, 4, kind="dpcache", anchors=1).sites["model"].anchors == 1
    found = measured(12, handed=1 + np.outer(np.linspace(1, 0, 12) ** 2, [1.0, 2.0, -3.0, 4.0]))
    every, two = (plan(found, 5, kind="meancache", anchors=n).sites["model"] for n in (12, 2))
    assert every.anchors > two.anchors == 2
    assert two.weights == pytest.approx(newest(every.weights, 2))
    assert two.weights.sum(-1)[0, ~two.compute] == pytest.approx(1)


def test_on_a_straight_line_two_computed_steps_are_all_that_is_needed() -> None:
    """Outputs linear in time, for any steps: then taylor is exact, and expects no error."""
    found = measured(10, handed=1 + np.outer(measured(10).timesteps, [0.001, 0.002, -0.003, 0.004]))
    for edge in ("state", "local"):
        made = plan(found, 2, kind="dpcache", edge=edge)
        assert np.flatnonzero(made.sites["model"].compute).tolist() == [0, 1]
        ends = expected(found, made)
        assert ends is not None
        assert ends.mean_db > 100


def test_the_spans_are_written_down() -> None:
    made: Planned = plan(measured(14, 2), 4, kind="meancache")
    begins = [a for a, b in itertools.pairwise(cut_of(made.sites["model"].compute)) if b > a + 1]
    assert [int(words.split()[-1]) for words in made.notes["spans"].split(", ")] == begins
    assert "spans" not in plan(measured(5), 5, kind="meancache").notes


def test_times_are_noise_levels_or_else_timesteps() -> None:
    found = measured(4)
    assert times(found) == pytest.approx(np.linspace(1, 0, 5) ** 1.5)
    assert times(measured(3, sigmas=None, timesteps=np.array([900.0, 500, 200]))).tolist() == [900, 500, 200, -100]
    assert times(measured(1, sigmas=None, timesteps=np.array([900.0]))).tolist() == [900, 0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        (2.5, {}, "computed_steps=2.5 was given. Allowed: a whole number, 1 to 9"),
        (10, {}, "computed_steps=10 was given. Allowed: a whole number, 1 to 9"),
        (2, {"most": 3}, "computed_steps=2 was given. Allowed: 3 to 9 in runs of 1 to 4 steps"),
        (2, {"most": -1}, "most=-1 was given. Allowed: a whole number, 0 or more"),
        (2, {"edge": "global"}, "edge='global' was given. Allowed: one of state, local"),
        (2, {"kind": "meancache", "gamma": 0.5}, "gamma=0.5 was given. Allowed: a number, 1 (the sum) to 64"),
        (2, {"kind": "meancache", "span": 0}, "span=0 was given. Allowed: a whole number, 1 or more"),
        (2, {"kind": "dpcache", "anchors": 0}, "anchors=0 was given. Allowed: a whole number, 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(budget: float, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan(measured(9), budget, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dynamics_edges_are_local(kind: str) -> None:
    found = measured(9, dynamics=None, provenance={"no_dynamics": "it clips"})
    with pytest.raises(BadOption, match=r"it has no dynamics \(it clips\).* with dynamics, or edge='local'"):
        plan(found, 4, kind=kind)
    assert plan(found, 4, kind=kind, edge="local").sites["model"].steps_computed == 4
