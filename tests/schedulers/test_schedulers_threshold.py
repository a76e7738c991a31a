"""Greedy thresholds: the walk against a plain loop, the threshold against all others, and what each kind looks at."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from documents import of_sites, profile, site, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plans import planned

from diffcache.documents import DenoiserProfile, Profile, SiteProfile
from diffcache.errors import BadOption
from diffcache.schedulers._threshold import CANDIDATES, candidates, walks

pytestmark = pytest.mark.fast


plan = functools.partial(planned, kind="ertacache")

# few values: ties are the rule, and errors need not grow with distance
errors = st.tuples(st.integers(1, 3), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(
        np.float64, (shape[0], shape[1], shape[1]), elements=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.5])
    )
)


def walk(error: np.ndarray, limit: float, most: int, first: int) -> list[bool]:
    """One group, one limit, in so many words."""
    computed, newest, reused = [], 0, 0
    for i in range(len(error)):
        if i == 0 or i < first or reused == most or not error[newest, i] < limit:
            computed.append(True)
            newest, reused = i, 0
        else:
            computed.append(False)
            reused += 1
    return computed


def moving(*positions: float, **changes: Any) -> SiteProfile:
    """A site whose output has one element, at these places step by step."""
    return site(np.array(positions, float)[None, :, None], **changes)


def strip(mask: np.ndarray) -> str:
    return "".join("■" if computed else "·" for computed in mask)


def strips(found: Profile, budget: float, **options: Any) -> dict[str, str]:
    return {name: strip(p.compute) for name, p in plan(found, budget, **options).sites.items()}


# --- the walk --------------------------------------------------------------------------------------------------------


@given(
    errors,
    st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 9.0]), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_all_walks_at_once_are_each_walk_alone(error: np.ndarray, limits: list[float], most: int, first: int) -> None:
    masks = walks(error, np.array(limits), most, first)
    for n, limit in enumerate(limits):
        for g, table in enumerate(error):
            assert masks[n, g].tolist() == walk(table, limit, most, first)


def test_a_higher_threshold_may_compute_more() -> None:
    """The reason that all thresholds are tried instead of halving an interval."""
    error = np.zeros((1, 4, 4))
    error[0, 0] = [0, 1, 3, 3]  # reused at step 1, nothing after it is like step 0; computed there, all after it is
    assert strip(walks(error, np.array([1.0]), 9, 0)[0, 0]) == "■■··"
    error[0, 2] = [0, 0, 0, 3]
    assert strip(walks(error, np.array([2.0]), 9, 0)[0, 0]) == "■·■■"


@settings(max_examples=60)
@given(errors, st.data())
def test_no_threshold_comes_nearer_to_the_budget_from_below(error: np.ndarray, data: st.DataObject) -> None:
    steps = error.shape[1]
    budget = data.draw(st.floats(1, steps))
    limits = candidates(error)
    work = walks(error, limits, steps, 0).sum(-1).mean(-1)
    values = np.unique(error)
    tried = np.concatenate([values, values + 1e-6, [0.0, 99.0]])
    anything = [np.mean([sum(walk(table, limit, steps, 0)) for table in error]) for limit in tried]
    assert max(w for w in work if w <= budget + 1e-9) == max(w for w in anything if w <= budget + 1e-9)


def test_thresholds_rise_from_computing_all_to_computing_once() -> None:
    error = np.random.default_rng(0).uniform(0.1, 1, (2, 12, 12))
    limits = candidates(error)
    assert (np.diff(limits) > 0).all()
    masks = walks(error, limits, 12, 0)
    assert masks[0].all()
    assert (masks[-1].sum(-1) == 1).all()


def test_of_too_many_thresholds_some_are_tried_and_the_ends_stay() -> None:
    error = np.random.default_rng(0).uniform(0.1, 1, (1, 200, 200))
    limits = candidates(error)
    assert len(limits) == CANDIDATES + 2
    assert limits[0] == 0
    assert limits[-1] > error.max()


# --- the budget ------------------------------------------------------------------------------------------------------


def test_work_is_time_and_how_often_it_is_spent() -> None:
    """The feed-forward takes three quarters of a step and changes once; the attention is called twice."""
    sites = {
        "sublayer:blocks.0.attn": moving(1, 2, 4, 8, seconds=0.5, calls=2),
        "sublayer:blocks.0.ff": moving(1, 1, 99, 99, seconds=3.0, calls=1),
    }
    found = of_sites(sites)
    made = plan(found, 3.0, kind="smoothcache")
    assert strips(found, 3.0, kind="smoothcache") == {
        "sublayer:blocks.0.attn": "■■■■",
        "sublayer:blocks.0.ff": "■·■·",
    }
    assert made.notes["work"] == "2.5 full steps"
    assert 0 < float(made.notes["threshold"]) < 0.5  # the attention's error of one step
    assert strips(found, 2.4, kind="smoothcache")["sublayer:blocks.0.attn"] == "■·■·"


def test_without_time_work_is_operations() -> None:
    sites = {
        "sublayer:blocks.0.attn": moving(1, 2, 4, 8, seconds=0.0, flops=1),
        "sublayer:blocks.0.ff": moving(1, 1, 99, 99, seconds=1.0, flops=7),
    }
    assert plan(of_sites(sites), 3, kind="smoothcache").notes["work"] == "2.25 full steps"


def test_where_the_budget_cannot_be_met_it_stays_below() -> None:
    """All steps alike: one computed step, or all."""
    assert strips(of_sites({"model": moving(1, 1, 1, 1, 1)}), 4) == {"model": "■····"}
    assert strips(of_sites({"model": moving(1, 1, 1, 1, 1)}), 5) == {"model": "■■■■■"}


def test_the_least_budget_is_reported_if_the_budget_is_too_small() -> None:
    found = of_sites({"model": moving(*range(1, 11))})
    with pytest.raises(
        BadOption, match=r"computed_steps=4 was given. Allowed: 6 or more with retention=0.4 and most=2"
    ):
        plan(found, 4, retention=0.4, most=2)
    mask = strips(found, 6, retention=0.4, most=2)["model"]
    assert mask.startswith("■■■■")
    assert "···" not in mask
    assert mask.count("■") == 6


# --- what the kinds look at ------------------------------------------------------------------------------------------


def test_smoothcache_has_a_mask_for_each_type_of_layer_over_all_lists_of_blocks() -> None:
    sites = {
        "sublayer:transformer_blocks.0.attn": moving(1, 1, 1, 9),
        "sublayer:single_transformer_blocks.0.attn": moving(1, 1, 1, 9),
        "sublayer:transformer_blocks.0.ff": moving(1, 9, 9, 9),
        "sublayer:transformer_blocks.0.attn2": moving(1, 1, 9, 9),
        "model": moving(1, 2, 3, 4),
    }
    found = of_sites(sites)
    assert strips(found, 2, kind="smoothcache") == {
        "sublayer:single_transformer_blocks.0.attn": "■··■",
        "sublayer:transformer_blocks.0.attn": "■··■",
        "sublayer:transformer_blocks.0.attn2": "■·■·",
        "sublayer:transformer_blocks.0.ff": "■■··",
    }
    for plan_ in plan(found, 2, kind="smoothcache").sites.values():
        assert plan_.kappa is None
        assert (plan_.weights[0, :, 0] == ~plan_.compute).all()


def test_smoothcache_averages_over_the_layers_of_a_type() -> None:
    """Neither layer's own changes would do: 0.5 here and 0.9 there, 0.9 here and 0 there."""
    sites = {"sublayer:a.0.ff": moving(1, 2, 20), "sublayer:a.1.ff": moving(1, 10, 10)}
    assert set(strips(of_sites(sites), 2, kind="smoothcache").values()) == {"■■·"}


def test_errors_are_relative_to_the_output_that_is_missed() -> None:
    """10 in the place of 1 is nine times what should be there, 1 in the place of 10 nine tenths of it."""
    sites = {"sublayer:a.0.attn": moving(10, 1), "sublayer:a.0.ff": moving(1, 10)}
    assert strips(of_sites(sites), 1.5, kind="smoothcache") == {"sublayer:a.0.attn": "■■", "sublayer:a.0.ff": "■·"}


def test_blocks_of_a_list_share_a_mask_and_stacks_do_not() -> None:
    sites = {
        "block:a.0": moving(1, 1, 9, 9),
        "block:a.10": moving(1, 1, 9, 9),
        "block:b.0": moving(1, 9, 9, 9),
        "stack:a": moving(1, 1, 1, 9),
        "stack:b": moving(1, 9, 9, 9),
    }
    found = of_sites(sites)
    expected = {"block:a.0": "■·■·", "block:a.10": "■·■·", "block:b.0": "■■··"}
    assert strips(found, 2, kind="smoothcache", sites="block") == expected
    assert strips(found, 2, kind="smoothcache", sites="stack") == {"stack:a": "■··■", "stack:b": "■■··"}


def test_ertacache_looks_at_residuals_and_reuses_them() -> None:
    """The output moves at once; the residual later."""
    residuals = np.array([1.0, 1.0, 5.0, 5.0])[None, :, None]
    found = of_sites({"model": moving(10, 99, 99, 99, residual=tables(residuals))})
    made = plan(found, 2).sites["model"]
    assert strip(made.compute) == "■·■·"
    assert made.kappa is not None
    assert (made.kappa[0] == ~made.compute).all()
    assert (made.weights[0, :, 0] == ~made.compute).all()


def test_magcache_adds_up_how_far_the_product_of_ratios_is_from_one() -> None:
    """After a computed step: |1 - 0.9| = 0.1, + |1 - 0.81| = 0.29, + |1 - 0.729| = 0.561."""
    ratios = np.array([[1.0, 0.9, 0.9, 0.9, 0.9, 0.9]])
    found = of_sites({"model": moving(*range(1, 7), residual_ratio=ratios)})
    made = plan(found, 2, kind="magcache")
    assert strip(made.sites["model"].compute) == "■··■··"
    assert 0.29 < float(made.notes["threshold"]) < 0.561
    assert strip(plan(found, 3, kind="magcache").sites["model"].compute) == "■·■·■·"
    assert made.sites["model"].kappa is not None


def test_magcache_forgets_what_cancels() -> None:
    """The product is what counts, not each ratio: twice and then half as long is as long as it was."""
    ratios = np.array([[1.0, 2.0, 0.5, 1.0, 1.0, 3.0]])
    found = of_sites({"model": moving(*range(1, 7), residual_ratio=ratios)})
    assert strip(plan(found, 2, kind="magcache").sites["model"].compute) == "■····■"


def test_branches_share_a_mask() -> None:
    outputs = np.array([[1.0, 1.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]])[:, :, None]
    found = profile(
        steps=4,
        start=0,
        dynamics=None,
        denoisers={"transformer": DenoiserProfile(class_name="Net", sites={"model": site(outputs)})},
    )
    assert strips(found, 2, kind="smoothcache", sites="model") == {"model": "■·■·"}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "smoothcache"}, "it measured model sites, and sublayer sites are needed"),
        ({"sites": "layer"}, "sites='layer' was given. Allowed: one of model, stack, block, sublayer"),
        ({"most": 0}, "most=0 was given. Allowed: a whole number, 1 or more"),
        ({"most": 1.5}, "most=1.5 was given"),
        ({"retention": 1.5}, "retention=1.5 was given. Allowed: a share of the steps, 0 to 1"),
        ({"retention": "some"}, "retention='some' was given"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan(of_sites({"model": moving(1, 2, 3)}), 2, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["ertacache", "magcache"])
def test_a_site_without_a_residual_is_named(kind: str) -> None:
    found = of_sites({"model": moving(1, 2, 3, residual=None, residual_ratio=None)})
    with pytest.raises(BadOption, match="it has no residual of 'model'"):
        plan(found, 2, kind=kind)
