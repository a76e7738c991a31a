"""Rules that need no measurement: which steps they compute, and the weights they predict with."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache.errors import BadOption, UnknownName
from diffcache.schedulers import Grid, Rule, function, having, parse_rule, parse_spec, rules
from diffcache.schedulers.full import rule as full
from diffcache.schedulers.taylorseer import extrapolation
from diffcache.schedulers.taylorseer import rule as taylor
from diffcache.schedulers.uniform import evenly, every_kth
from diffcache.schedulers.uniform import rule as uniform

pytestmark = pytest.mark.fast

RULES = ", ".join(rules())
SITES = {"transformer": ("model", "stack:blocks", "block:blocks.0", "block:blocks.1"), "unet": ("model",)}


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Irregular, falling, now and then visiting a time twice as second-order noise schedulers do."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.7, 4.0]), min_size=2, max_size=24))
    times = 100.0 - np.cumsum(gaps)
    return Grid(times, draw(st.integers(0, len(times) - 1)))


# --- masks -----------------------------------------------------------------------------------------------------------


@given(grids(), st.integers(1, 30))
def test_every_kth_starts_at_the_start_and_keeps_its_distance(grid: Grid, every: int) -> None:
    compute = every_kth(grid, every)
    assert compute.shape == (grid.steps,)
    assert compute.dtype == bool
    assert compute[: grid.start + 1].all()
    assert [int(i) for i in np.flatnonzero(compute[grid.start :])] == list(range(0, grid.steps - grid.start, every))


@given(st.integers(1, 60), st.data())
def test_evenly_computes_exactly_as_many_as_asked_and_spreads_them(steps: int, data: st.DataObject) -> None:
    computed = data.draw(st.integers(1, steps))
    compute = evenly(steps, computed)
    at = np.flatnonzero(compute)
    assert compute.shape == (steps,)
    assert len(at) == computed
    assert at[0] == 0
    gaps = np.diff([*at, steps])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("computed", [0, -1, 7])
def test_evenly_refuses_what_cannot_be(computed: int) -> None:
    with pytest.raises(BadOption, match=rf"computed_steps={computed} was given. Allowed: 1 to 6 \(the first step"):
        evenly(6, computed)


# --- rules -----------------------------------------------------------------------------------------------------------


@given(grids())
def test_full_computes_everything_and_keeps_nothing(grid: Grid) -> None:
    plan = full(grid)
    assert plan.compute.all()
    assert plan.anchors == 0


@given(grids(), st.integers(1, 9))
def test_uniform_reuses_the_newest_output(grid: Grid, every: int) -> None:
    plan = uniform(grid, every=every)
    assert np.array_equal(plan.compute, every_kth(grid, every))
    assert np.array_equal(plan.weights[0, :, 0], np.where(plan.compute, 0.0, 1.0))
    assert plan.weights.shape == (1, grid.steps, 1)


def anchors_at(grid: Grid, compute: np.ndarray, i: int) -> np.ndarray:
    """Computed steps of the loop before ``i``, newest first."""
    return np.array([a for a in range(i - 1, grid.start - 1, -1) if compute[a]], int)


@given(grids(), st.integers(2, 6), st.integers(0, 4), st.lists(st.integers(-3, 3), min_size=5, max_size=5))
def test_taylor_is_exact_on_polynomials_of_its_order(grid: Grid, every: int, order: int, factors: list[int]) -> None:
    """On any grid, as soon as so many different times have been computed."""
    plan = taylor(grid, every=every, order=order)
    centred = (grid.timesteps - grid.timesteps.mean()) / 10
    values = np.polynomial.polynomial.polyval(centred, factors[: order + 1])
    for i in np.flatnonzero(~plan.compute):
        anchors = anchors_at(grid, plan.compute, i)
        w = plan.weights[0, i]
        assert not w[len(anchors) :].any()
        w = w[: len(anchors)]
        # A newest anchor's time visited twice counts once; anchors beyond 2(order + 1) are ignored.
        seen = len(set(grid.timesteps[anchors[: 2 * (order + 1)]]))
        if seen > order:
            guess = w @ values[anchors[: len(w)]]
            assert abs(guess - values[i]) <= 1e-9 * (1 + np.abs(w) @ np.abs(values[anchors[: len(w)]]))


@given(grids(), st.integers(2, 6), st.integers(0, 4))
def test_taylor_weights_sum_to_one_and_use_no_time_twice(grid: Grid, every: int, order: int) -> None:
    plan = taylor(grid, every=every, order=order)
    for i in np.flatnonzero(~plan.compute):
        w = plan.weights[0, i]
        assert np.isclose(w.sum(), 1.0, rtol=0, atol=1e-9 * np.abs(w).sum())
        used = anchors_at(grid, plan.compute, i)[np.flatnonzero(w)]
        assert len(used) <= order + 1
        assert len(set(grid.timesteps[used])) == len(used)


def test_taylor_grows_to_its_order_with_the_anchors_there_are() -> None:
    plan = taylor(Grid(np.arange(9.0)[::-1]), every=2, order=2)
    assert [np.count_nonzero(plan.weights[0, i]) for i in (1, 3, 5, 7)] == [1, 2, 3, 3]
    assert plan.weights[0, 1, 0] == 1.0
    assert plan.weights[0, 3, :2].tolist() == [1.5, -0.5]


def test_taylor_of_order_0_is_reuse() -> None:
    grid = Grid(np.array([9.0, 7.0, 6.5, 2.0, 1.0]))
    assert np.array_equal(taylor(grid, every=3, order=0).weights[0, :, 0], uniform(grid, every=3).weights[0, :, 0])


def test_taylor_never_reaches_before_a_late_start() -> None:
    grid = Grid(np.arange(12.0)[::-1], start=5)
    plan = taylor(grid, every=3, order=3)
    for i in np.flatnonzero(~plan.compute):
        assert i > grid.start
        computed = np.flatnonzero(plan.compute[:i])[::-1]
        assert (computed[np.flatnonzero(plan.weights[0, i])] >= grid.start).all()


def test_the_exactness_test_can_fail() -> None:
    """Weights for even spacing are wrong on another grid."""
    grid = Grid(np.array([10.0, 9.0, 6.0, 5.5, 1.0]))
    compute = np.array([True, False, True, False, False])
    right = extrapolation(grid, compute, 1)[0, 4, :2]
    even = extrapolation(Grid(np.arange(5.0)[::-1]), compute, 1)[0, 4, :2]
    line = 3 * grid.timesteps - 2
    assert np.isclose(right @ line[[2, 0]], line[4])
    assert not np.isclose(even @ line[[2, 0]], line[4])


# --- as text ---------------------------------------------------------------------------------------------------------


def test_the_rules_are_the_files_that_have_one() -> None:
    assert {"easycache", "firstblockcache", "fora", "full", "taylorseer", "uniform"} <= set(rules())


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("full", Rule("full")),
        ("full:", Rule("full")),
        ("uniform:every=3", Rule("uniform", options={"every": 3})),
        ("uniform: every = 3 , sites = block", Rule("uniform", "block", {"every": 3})),
        ("taylorseer:every=4,order=2,sites=stack", Rule("taylorseer", "stack", {"every": 4, "order": 2})),
    ],
)
def test_a_spec_says_name_options_and_sites(spec: str, rule: Rule) -> None:
    assert parse_rule(spec) == rule
    assert parse_rule(str(rule)) == rule


REFUSED = [
    ("unifrom:every=2", UnknownName, f"no rule called 'unifrom'. Known: {RULES}. Did you mean 'uniform'?"),
    ("", UnknownName, f"no rule called ''. Known: {RULES}."),
    ("uniform:evry=2", UnknownName, "no option of 'uniform' called 'evry'. Known: every, sites. Did you mean 'every'?"),
    ("full:every=2", UnknownName, "no option of 'full' called 'every'. Known: sites."),
    ("uniform:every=0", BadOption, "every=0 was given. Allowed: a whole number, at least 1"),
    ("uniform:every=-2", BadOption, "every=-2 was given."),
    ("uniform:every=2.5", BadOption, "every=2.5 was given."),
    ("uniform:every=nan", BadOption, "every=nan was given."),
    ("uniform:every", BadOption, "every='' was given."),
    ("uniform:every=two", BadOption, "every='two' was given. Allowed: a whole number, at least 1"),
    ("uniform:every=²", BadOption, "every='²' was given."),
    ("taylorseer:order=high", BadOption, "order='high' was given. Allowed: 0 to 4."),
    ("taylorseer:order=5", BadOption, "order=5 was given. Allowed: 0 to 4."),
    ("taylorseer:order=-1", BadOption, "order=-1 was given."),
    ("uniform:sites=blocks", BadOption, "sites='blocks' was given. Allowed: one of model, stack, block, sublayer."),
    ("uniform:sites", BadOption, "sites='' was given."),
    ("uniform:every=2,every=3", BadOption, "every='3' was given. Allowed: one value, in the spec"),
]


@pytest.mark.parametrize(("spec", "error", "says"), REFUSED, ids=[spec for spec, *_ in REFUSED])
def test_a_spec_that_makes_no_sense_is_refused_at_once(spec: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as refused:
        parse_rule(spec)
    assert says in str(refused.value)


def test_values_that_look_like_numbers_are_numbers() -> None:
    assert parse_spec("closed_loop: a=3, b=0.5,c=1e-3 ,d=-2,e=text,f=x=y", "plan") == (
        "closed_loop",
        {"a": 3, "b": 0.5, "c": 1e-3, "d": -2, "e": "text", "f": "x=y"},
    )


def test_a_spec_names_a_file_that_has_such_a_function() -> None:
    assert "closed_loop" in having("plan")
    assert "full" not in having("plan")
    with pytest.raises(UnknownName, match="no rule called 'closed_loop'"):
        parse_spec("closed_loop", "rule")
    with pytest.raises(UnknownName, match=r"called 'full'\. Known: .*closed_loop.*taylor"):
        parse_spec("full:every=2", "plan")
    with pytest.raises(UnknownName, match="Did you mean 'closed_loop'"):
        parse_spec("closedloop", "plan")
    with pytest.raises(UnknownName, match=r"no option of 'closed_loop' called 'sites'\. Known: anchors"):
        function("closed_loop", "plan", ["sites"])
    assert function("closed_loop", "plan", ["anchors"]).__module__ == "diffcache.schedulers.closed_loop"


@pytest.mark.parametrize("name", having("plan"))
def test_a_scheduler_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    """What ``diffcache plan --list`` prints of it, and the head that every caller relies on."""
    module = importlib.import_module(f"diffcache.schedulers.{name}")
    assert (module.__doc__ or "").strip()
    assert module.SOURCE.strip()
    first, second, *options = inspect.signature(module.plan).parameters.values()
    assert (first.name, second.name) == ("profile", "computed_steps")
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)


# --- for a pipeline --------------------------------------------------------------------------------------------------


def test_a_rule_applies_to_the_sites_of_its_granularity_wherever_there_are_any() -> None:
    grid = Grid(np.arange(6.0)[::-1])
    schedule = Rule("uniform", "block", {"every": 2}).schedule(grid, SITES)
    assert {name: list(plan.sites) for name, plan in schedule.denoisers.items()} == {
        "transformer": ["block:blocks.0", "block:blocks.1"]
    }
    everywhere = Rule("uniform", options={"every": 2}).schedule(grid, SITES)
    assert list(everywhere.denoisers) == ["transformer", "unet"]
    assert everywhere.steps == 6
    assert everywhere.provenance["scheduler"] == "uniform:every=2"


def test_a_rule_for_sites_that_are_nowhere_says_which_there_are() -> None:
    with pytest.raises(
        BadOption, match=r"sites='sublayer' was given. Allowed: what unet of this pipeline has: model\."
    ):
        Rule("uniform", "sublayer").schedule(Grid(np.arange(6.0)[::-1]), {"unet": ("model",)})
