"""How much memory a cache takes, measured from outside: all tensors of the process that are alive, with the cache and
without it. ``estimate`` states it before the run and ``report`` after it; budgets hold; nothing remains."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import TINY, fresh, run, shared
from probes import bound, hold, offered
from torch import Tensor

from diffcache import Budget, accelerated, estimate, measure, plan, report
from diffcache.documents import SitePlan
from diffcache.errors import BadOption

NAMES = ("flux", "sd3", "wan", "dit", "sdxl", "cogvideox", "stable_audio")
PLACES = [(name, granularity) for name in NAMES for granularity in offered(shared(name))]
RULES = {
    "reuse": "uniform:every=2",
    "two anchors": "taylorseer:every=2,order=1",
    "with inputs": "",  # made below
    "first block": "firstblockcache:threshold=1e9",
    "change of outputs": "easycache:threshold=1e9,warmup=2",
}
KINDS: list[tuple[str, str, str, str | None]] = [(*place, "reuse", None) for place in PLACES]
KINDS += [
    (*place, kind, None)
    for place in PLACES
    if place[0] in ("flux", "sd3")
    for kind in ("two anchors", "with inputs", "weights of inputs")
]
KINDS += [(name, "stack", "first block", store) for name in ("flux", "wan") for store in (None, "int8")]
KINDS += [(name, "model", "change of outputs", store) for name in ("flux", "sdxl") for store in (None, "int8")]
OFTEN = ("flux", "dit", "ltx2", "sdxl", "wan", "z_image")
KINDS += [(*place, "reuse", "int8") for place in PLACES if place[0] in OFTEN]
KINDS += [
    ("flux", granularity, kind, store)
    for granularity in offered(shared("flux"))
    for kind in ("two anchors", "with inputs", "weights of inputs")
    for store in ("bf16", "fp8", "int4")
]


@pytest.fixture
def only_what_is_new() -> None:
    """What exists already is left out when objects are listed, which makes it fast.

    It stays left out in later tests too: a collection of all objects of the process takes longer than most runs here.
    """
    gc.collect()
    gc.freeze()


def alive() -> int:
    """Bytes of all tensors that were made since; memory that several share counts once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def at_each_step(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Bytes alive at the end of each step of one run."""
    seen: list[int] = []
    step = pipe.scheduler.step

    def listening(*args: Any, **kwargs: Any) -> Any:
        seen.append(alive())
        return step(*args, **kwargs)

    pipe.scheduler.step = listening
    try:
        run(pipe, call)
    finally:
        del pipe.scheduler.step
    return np.array(seen)


def planned(pipe: Any, name: str, granularity: str, kind: str) -> Any:
    if kind == "weights of inputs":  # two anchors with what they were given
        mask = np.arange(TINY[name].steps) % 3 == 0
        reused = hold(mask).weights
        second = reused * (np.cumsum(mask) > 1)[:, None]
        weights = np.concatenate([reused, 0.5 * second], axis=2)
        return bound(pipe, SitePlan(compute=mask, weights=weights, inputs=-0.5 * weights), granularity)
    if kind != "with inputs":
        return RULES[kind] + f",sites={granularity}" * (kind in ("reuse", "two anchors"))
    mask = np.arange(TINY[name].steps) % 3 == 0
    return bound(pipe, hold(mask, kappa=np.where(mask, 0.0, 1.0)[None]), granularity)


@pytest.mark.parametrize(("name", "granularity", "kind", "store"), KINDS)
@pytest.mark.usefixtures("only_what_is_new")
def test_what_is_estimated_and_reported_is_what_is_alive(
    name: str, granularity: str, kind: str, store: str | None
) -> None:
    pipe = shared(name)
    call = TINY[name].call(pipe, batch=2)
    schedule = planned(pipe, name, granularity, kind)
    told = estimate(pipe, schedule, store=store, **call).cache_bytes
    run(pipe, call)  # everything that is made once exists now
    before = at_each_step(pipe, call)
    with accelerated(pipe, schedule, store=store):
        cache = at_each_step(pipe, call) - before
        counted = report(pipe).peak_bytes
    assert told > 0
    assert told == pytest.approx(cache.max(), rel=0.05)
    assert counted == pytest.approx(cache.max(), rel=0.05)


@pytest.mark.parametrize(("name", "granularity", "kind", "store"), KINDS)
@pytest.mark.usefixtures("only_what_is_new")
def test_nothing_is_alive_when_a_run_is_over(name: str, granularity: str, kind: str, store: str | None) -> None:
    pipe = shared(name)
    call = TINY[name].call(pipe)
    run(pipe, call)
    with accelerated(pipe, planned(pipe, name, granularity, kind), store=store):
        before = alive()
        run(pipe, call)
        assert alive() == before


@pytest.mark.parametrize("granularity", ["model", "block"])
@pytest.mark.usefixtures("only_what_is_new")
def test_nothing_is_alive_when_a_run_has_failed(granularity: str) -> None:
    pipe = fresh("flux")
    call = TINY["flux"].call(pipe)
    run(pipe, call)

    def fail(_pipe: Any, step: int, _timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise MemoryError("planted")
        return found

    with accelerated(pipe, planned(pipe, "flux", granularity, "two anchors")):
        before = alive()
        with pytest.raises(MemoryError, match="planted"):
            run(pipe, call, callback_on_step_end=fail)
        assert alive() == before


PLANNED = {
    "model": ("closed_loop", 4),
    "stack": ("cachequant:sites=stack", 4),
    "block": ("allocate:sites=block", 5.5),
    "sublayer": ("allocate:sites=sublayer", 5.5),
}


@pytest.mark.parametrize("granularity", PLANNED)
@pytest.mark.usefixtures("only_what_is_new")
def test_a_budget_of_memory_is_kept_to(granularity: str) -> None:
    scheduler, steps = PLANNED[granularity]
    pipe, call = shared("sd3"), TINY["sd3"].call(shared("sd3"))
    profile = measure(pipe, [call | {"generator": torch.Generator().manual_seed(1)}], sites=granularity)
    with pytest.raises(BadOption, match="memory_bytes=1 ") as refused:
        plan(profile, scheduler, Budget(computed_steps=steps, memory_bytes=1))
    least = int(str(refused.value).partition("Allowed: ")[2].partition(" or more")[0])
    run(pipe, call)
    before = at_each_step(pipe, call)
    with accelerated(pipe, plan(profile, scheduler, Budget(computed_steps=steps, memory_bytes=least))):
        assert (at_each_step(pipe, call) - before).max() == pytest.approx(least, rel=0.05)
