"""BAC's bubbling union: what is downstream, and that no order of bubbling matters."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from documents import DIGEST, of_outputs, profile, site
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.documents import DenoiserProfile, Profile
from diffcache.errors import BadOption
from diffcache.schedulers.bac import bubbled, downstream, plan

pytestmark = pytest.mark.fast

DECODER = [f"sublayer:layers.{i}.{part}" for i in range(3) for part in ("attn1", "attn2", "ff")]


def walks(seed: int, names: list[str], steps: int = 12) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    size = draw.uniform(0.2, 2, len(names))
    return {
        name: 3
        + size[n] * np.cumsum(draw.exponential(size=(1, steps, 1)) ** 2 * draw.normal(size=(1, steps, 4)), axis=1)
        for n, name in enumerate(names)
    }


# --- what is downstream -----------------------------------------------------------------------------------------------


def test_downstream_are_the_feed_forwards_of_later_blocks_and_of_ones_own() -> None:
    assert downstream("sublayer:layers.1.attn1", DECODER) == ["sublayer:layers.1.ff", "sublayer:layers.2.ff"]
    assert downstream("sublayer:layers.1.attn2", DECODER) == ["sublayer:layers.1.ff", "sublayer:layers.2.ff"]
    assert downstream("sublayer:layers.1.ff", DECODER) == ["sublayer:layers.2.ff"]
    assert downstream("sublayer:layers.2.ff", DECODER) == []


def test_two_streams_of_one_block_do_not_feed_each_other() -> None:
    names = [f"sublayer:blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "ff", "ff_context")]
    assert downstream("sublayer:blocks.0.ff", names) == ["sublayer:blocks.1.ff", "sublayer:blocks.1.ff_context"]
    assert downstream("sublayer:blocks.0.ff_context", names) == downstream("sublayer:blocks.0.ff", names)
    assert len(downstream("sublayer:blocks.0.attn", names)) == 4


def test_downstream_goes_on_in_the_next_list() -> None:
    names = ["sublayer:blocks.2.attn", "sublayer:blocks.11.ff", "sublayer:single_blocks.0.mlp"]
    assert downstream("sublayer:blocks.2.attn", names) == ["sublayer:blocks.11.ff", "sublayer:single_blocks.0.mlp"]
    assert downstream("sublayer:single_blocks.0.mlp", names) == []


# --- bubbling --------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 999), st.lists(st.sampled_from(DECODER), unique=True, max_size=5), st.randoms())
def test_the_order_of_bubbling_does_not_matter(seed: int, chosen: list[str], random: Any) -> None:
    """One after the other, in place, in any order: as the algorithm is printed."""
    draw = np.random.default_rng(seed)
    masks = {name: draw.uniform(size=8) < 0.3 for name in DECODER}
    before = {name: mask.copy() for name, mask in masks.items()}
    joined = bubbled(masks, chosen)
    assert all((masks[n] == before[n]).all() for n in DECODER)
    random.shuffle(chosen)
    for name in chosen:
        for later in downstream(name, DECODER):
            before[name] |= before[later]
    assert all((joined[n] == before[n]).all() for n in DECODER)


@given(st.integers(0, 999), st.sets(st.sampled_from(DECODER)))
def test_only_the_chosen_grow_and_they_see_every_update_downstream(seed: int, chosen: set[str]) -> None:
    draw = np.random.default_rng(seed)
    masks = {name: draw.uniform(size=8) < 0.3 for name in DECODER}
    for name, joined in bubbled(masks, chosen).items():
        assert (joined >= masks[name]).all()
        if name not in chosen:
            assert (joined == masks[name]).all()
        else:
            for later in downstream(name, DECODER):
                assert (joined >= masks[later]).all()


# --- plans -----------------------------------------------------------------------------------------------------------


def updates(found: Profile, budget: float, **options: Any) -> dict[str, np.ndarray]:
    return {name: p.compute for name, p in plan(found, budget, **options).sites.items()}


def test_with_nothing_chosen_it_is_the_plain_schedule() -> None:
    found = of_outputs(walks(0, DECODER))
    for budget in (1, 4, 12):
        plain = plan(found, budget, n=0).sites
        assert all((mask == plain[name].compute).all() for name, mask in updates(found, budget, n=0).items())


def test_the_worst_are_those_whose_outputs_lie_farthest_apart() -> None:
    """Over all pairs of steps, of every kind; changes from step to step would choose another."""
    swinging = np.where(np.arange(12) % 2, 4.5, 3.0)
    drifting = np.linspace(3, 9, 12)
    outputs = {name: np.full((1, 12, 1), 3.0) + 0.1 * walks(1, DECODER)[name][..., :1] / 99 for name in DECODER}
    outputs["sublayer:layers.0.attn2"] = drifting[None, :, None]
    outputs["sublayer:layers.0.attn1"] = swinging[None, :, None]
    made = plan(of_outputs(outputs), 4, n=1)
    assert made.notes["bubbled"] == "sublayer:layers.0.attn2"
    assert plan(of_outputs(outputs), 4, n=2).notes["bubbled"] == "sublayer:layers.0.attn2, sublayer:layers.0.attn1"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 3, 9])
def test_there_are_as_many_updates_as_the_budget_allows(seed: int, n: int) -> None:
    found = of_outputs(walks(seed, DECODER))
    for budget in (2, 4, 7.5):
        made = plan(found, budget, n=n)
        chosen = [*filter(None, made.notes["bubbled"].split(", "))]
        assert len(chosen) == n
        work = {}
        for s in range(1, int(budget) + 1):
            plain = plan(found, s, n=0).sites
            joined = bubbled({name: plain[name].compute for name in DECODER}, chosen)
            work[s] = np.mean([mask.sum() for mask in joined.values()])
            if str(s) == made.notes["updates"]:
                assert all((made.sites[name].compute == joined[name]).all() for name in DECODER)
        assert int(made.notes["updates"]) == max(s for s in work if work[s] <= budget)
        assert made.notes["work"] == f"{work[int(made.notes['updates'])]:.6g} full steps"


def test_a_single_sublayer_can_bubble() -> None:
    """The authors' code does nothing for n = 1."""
    found = of_outputs(walks(0, DECODER))
    joined, plain = updates(found, 6, n=1), updates(found, 6, n=0)
    counts = sorted(mask.sum() for mask in joined.values())
    assert counts[-1] > counts[0]
    assert {mask.sum() for mask in plain.values()} == {6}


def test_work_is_weighed_by_time() -> None:
    """Where what bubbles costs next to nothing, it may have all the updates it likes."""
    outputs = walks(3, DECODER)
    worst = plan(of_outputs(outputs), 4, n=1).notes["bubbled"]
    sites = {n: site(o, seconds=1e-6 if n == worst else 1.0) for n, o in outputs.items()}
    cheap = DenoiserProfile(class_name="Net", config_digest=DIGEST, sites=sites)
    found = profile(steps=12, start=0, guidance=None, dynamics=None, denoisers={"transformer": cheap})
    assert plan(found, 4 + 1e-4, n=1).notes["updates"] == "4"
    sites = {n: site(o, seconds=1.0 if n == worst else 1e-6) for n, o in outputs.items()}
    dear = DenoiserProfile(class_name="Net", config_digest=DIGEST, sites=sites)
    found = profile(steps=12, start=0, guidance=None, dynamics=None, denoisers={"transformer": dear})
    assert downstream(worst, DECODER)
    assert int(plan(found, 4, n=1).notes["updates"]) < 4


def test_which_list_comes_first_decides_what_bubbles() -> None:
    """The attention of one list and the feed-forwards of another."""
    outputs = walks(5, ["sublayer:left.0.attn", "sublayer:right.0.ff"])
    outputs["sublayer:left.0.attn"] *= 99
    found = of_outputs(outputs)
    first, last = updates(found, 5, n=1, stacks="left+right"), updates(found, 5, n=1, stacks="right+left")
    assert (first["sublayer:left.0.attn"] >= first["sublayer:right.0.ff"]).all()
    assert last["sublayer:left.0.attn"].sum() == last["sublayer:right.0.ff"].sum() == 5


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        (0.5, {}, "computed_steps=0.5 was given. Allowed: 1 to 12"),
        (4, {"n": -1}, "n=-1 was given. Allowed: a whole number, 0 or more"),
        (4, {"n": 2.5}, "n=2.5 was given"),
        (
            4,
            {"stacks": "blocks"},
            "stacks='blocks' was given. Allowed: each of these at most once, joined by '+': layers",
        ),
        (4, {"stacks": "layers+layers"}, "stacks='layers+layers' was given"),
    ],
)
def test_options_that_cannot_be_are_refused(budget: float, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan(of_outputs(walks(0, DECODER)), budget, **options)
    assert words in str(caught.value)


def test_sublayers_must_have_been_measured() -> None:
    with pytest.raises(BadOption, match=r"it measured model sites, and sublayer sites are needed"):
        plan(of_outputs({"model": next(iter(walks(0, ["model"]).values()))}), 4)


def test_an_update_downstream_is_joined_in_where_it_was_asked_for() -> None:
    masks = {name: np.zeros(4, bool) for name in DECODER}
    masks["sublayer:layers.2.ff"][3] = True
    joined = bubbled(masks, ["sublayer:layers.0.attn1"])
    assert joined["sublayer:layers.0.attn1"].tolist() == [False, False, False, True]
    assert not any(joined[name].any() for name in itertools.islice(DECODER, 1, 8))
