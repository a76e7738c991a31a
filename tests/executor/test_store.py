"""Outputs taken apart and put together; anchors kept as long as needed, and bytes counted to the last one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from diffcache.cli.show import table
from diffcache.documents import SitePlan
from diffcache.executor import Anchor, Output, Store
from diffcache.executor.program import compile_plan
from diffcache.executor.store import all_finite, signature
from diffcache.planning.storage import held


def anchor(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, x: tuple[int, ...] | None = None) -> Anchor:
    kept = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    return Anchor.of(Output.of(kept), () if x is None else (torch.zeros(x),), ())


OUTPUTS: dict[str, Any] = {
    "tensor": torch.ones(2, 3),
    "tuple of one": (torch.ones(2, 3),),
    "two streams": (torch.ones(2, 3), torch.zeros(2, 5)),
    "with None": (torch.ones(2, 3), None),
    "list in a tuple": ([torch.ones(1), torch.zeros(2)], {}),
    "dict": {"sample": torch.ones(2), "n": 3, "name": "x"},
    "dataclass of diffusers": Transformer2DModelOutput(sample=torch.ones(2, 3)),
    "nothing": None,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_comes_back_in_its_own_form(kind: str) -> None:
    value = OUTPUTS[kind]
    taken = Output.of(value)
    again = taken.rebuild([t + 1 for t in taken.tensors])
    assert type(again) is type(value)
    leaves, spec = pytree.tree_flatten(value)
    new_leaves, new_spec = pytree.tree_flatten(again)
    assert spec == new_spec
    for old, new in zip(leaves, new_leaves, strict=True):
        assert torch.equal(new, old + 1) if isinstance(old, torch.Tensor) else new == old


def test_what_is_kept_does_not_change_with_what_was_returned() -> None:
    value = (torch.ones(2, 3, requires_grad=True) * 1, torch.zeros(4).expand(3, 4))
    kept = Anchor.of(Output.of(value), (), ()).kept
    with torch.no_grad():
        value[0].mul_(7)
    assert torch.equal(kept[0], torch.ones(2, 3))
    assert not any(t.requires_grad for t in kept)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)


def test_a_copy_has_the_form_and_values_and_other_memory() -> None:
    value = Transformer2DModelOutput(sample=torch.ones(2, 3))
    twin = Output.of(value).copied()
    assert type(twin) is Transformer2DModelOutput
    twin.sample.zero_()
    assert float(value.sample.sum()) == 6


def test_bytes_are_exact_for_every_type_and_for_inputs() -> None:
    store = Store()
    store.put("a", 0, anchor((2, 3), (4,)))
    assert store.bytes == (6 + 4) * 4
    store.put("a", 1, anchor((2, 3), dtype=torch.bfloat16, x=(5,)))
    assert store.bytes == 40 + 12 + 20
    store.put("b", 0, anchor((3,), dtype=torch.float64))
    assert store.bytes == store.peak_bytes == 40 + 32 + 24
    store.drop("a", 0)
    assert (store.bytes, store.peak_bytes) == (56, 96)


def test_keys_and_steps_are_apart_and_an_anchor_put_twice_counts_once() -> None:
    store = Store()
    one, two, three = anchor((2,)), anchor((3,)), anchor((5,))
    store.put(("site", 0), 0, one)
    store.put(("site", 1), 0, two)
    assert store.get(("site", 0), 0) is one
    assert store.get(("site", 1), 0) is two
    assert store.get(("site", 0), 1) is store.get("other", 0) is None
    store.put(("site", 0), 0, three)
    assert store.get(("site", 0), 0) is three
    assert store.bytes == (3 + 5) * 4
    assert store.peak_bytes == (3 + 5) * 4


def test_dropping_what_is_not_there_is_harmless_and_clear_empties() -> None:
    store = Store()
    store.drop("a", 3)
    store.put("a", 0, anchor((2,)))
    store.drop("a", 1)
    assert store.bytes == 8
    store.clear()
    assert store.bytes == 0
    assert store.get("a", 0) is None
    store.drop("a", 0)
    assert store.bytes == 0


@st.composite
def plans(draw: st.DrawFn) -> SitePlan:
    steps, anchors, branches = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    compute = np.array([True, *draw(st.lists(st.booleans(), min_size=steps - 1, max_size=steps - 1))])
    weights = np.zeros((branches, steps, anchors))
    kappa = np.zeros((branches, steps))
    for i in np.flatnonzero(~compute):
        known = min(anchors, int(compute[:i].sum()))
        for b in range(branches):
            weights[b, i, :known] = draw(st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=known, max_size=known))
            kappa[b, i] = draw(st.sampled_from([0.0, 1.0]))
            if not weights[b, i].any() and not kappa[b, i]:
                weights[b, i, 0] = 1.0
    return SitePlan(compute=compute, weights=weights, kappa=kappa)


@given(plans())
def test_an_anchor_is_there_when_it_is_referred_to_and_gone_right_after_the_last_time(plan: SitePlan) -> None:
    program, store = compile_plan(plan), Store()
    for step, terms in enumerate(program.terms):
        if terms is None:
            assert plan.compute[step]
            if step in program.keeps:
                store.put("site", step, anchor((2,), x=(3,) if step in program.keeps_x else None))
        else:
            kept = [store.get("site", a) for a in terms.anchors]
            assert None not in kept
            assert not terms.needs_x or kept[0].x
            for gone in program.drops[step]:
                store.drop("site", gone)
        here = {s for s in program.keeps if store.get("site", s) is not None}
        later = {a for t in program.terms[step + 1 :] if t for a in t.anchors}
        assert here == {a for a in later if a <= step}
        assert len(here) <= plan.anchors
    assert store.bytes == 0


@given(plans())
def test_the_terms_are_those_of_the_plan(plan: SitePlan) -> None:
    for step, terms in enumerate(compile_plan(plan).terms):
        if terms is None:
            continue
        newest_first = [a for a in range(step - 1, -1, -1) if plan.compute[a]]
        assert terms.anchors[0] == newest_first[0]
        for b, row in enumerate(terms.weights):
            given_ = {a: w for a, w in zip(newest_first, plan.weights[b, step], strict=False) if w}
            assert {a: w for a, w in zip(terms.anchors, row, strict=True) if w} == given_
        assert terms.kappa == tuple(plan.kappa[:, step])
        needed = {a for a, w in zip(newest_first, plan.weights[:, step].T, strict=False) if w.any()}
        assert set(terms.anchors) == needed | {newest_first[0]}


def test_shape_type_and_device_make_the_signature() -> None:
    t = torch.zeros(2, 3)
    assert signature([t]) == signature([torch.ones(2, 3)])
    others = [[t.double()], [torch.zeros(3, 2)], [t, t], [], [torch.zeros(2, 3, device="meta")]]
    assert all(signature(other) != signature([t]) for other in others)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(bad: float) -> None:
    good, spoiled = torch.zeros(3, 4), torch.zeros(3, 4)
    spoiled[2, 1] = bad
    assert bool(all_finite([good, good.half()]))
    assert not bool(all_finite([good, spoiled]))
    assert not bool(all_finite([spoiled.bfloat16()]))
    assert all_finite([]) is None
    assert all_finite([torch.zeros(2, dtype=torch.int64)]) is None
    assert all_finite([torch.zeros(0, 3)]) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 65), (2, 33, 16)])
def test_one_bad_element_is_seen_wherever_it_is(shape: tuple[int, ...], bad: float, dtype: torch.dtype) -> None:
    for at in range(math.prod(shape)):
        spoiled = torch.randn(shape, dtype=torch.float32).to(dtype)
        assert bool(all_finite([spoiled]))
        spoiled.view(-1)[at] = bad
        assert not bool(all_finite([spoiled]))
        assert not bool(all_finite([spoiled.mT if spoiled.ndim > 1 else spoiled, torch.zeros(2)]))


@pytest.mark.parametrize(
    "work", [compile_plan, lambda plan: plan.differences, held, table], ids=["compile", "differences", "held", "table"]
)
def test_work_on_a_plan_asks_once_which_anchors_it_uses(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refers, asked = SitePlan.refers.fget, []

    def counted(plan: SitePlan) -> np.ndarray:
        asked.append(len(plan.compute))
        return refers(plan)

    monkeypatch.setattr(SitePlan, "refers", property(counted))
    counts = []
    for steps in (10, 100):
        compute = np.arange(steps) % 3 == 0
        weights = np.where(compute, 0.0, 1.0)[None, :, None]
        work(SitePlan(compute=compute, weights=weights, kappa=weights[..., 0]))
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1] <= 2
