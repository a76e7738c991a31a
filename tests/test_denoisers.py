"""Every network of diffusers that can stand in a sampling loop: bit-equal, skipped, given back; or listed, and why."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from denoisers import NO_DENOISERS, TINY, Loop
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from pipelines import STEPS, shared
from pipelines import TINY as PIPELINES
from torch import Tensor

from diffcache import accelerate, accelerated, report, restore
from diffcache.adapters import find_sites
from diffcache.schedule import CacheSchedule, DenoiserPlan, SitePlan
from diffcache.schedulers.uniform import reuse

MASK = np.array([True, False, True, False, False, True])
GRANULARITIES = ("model", "stack", "block", "sublayer")


def walk(package: ModuleType) -> Iterator[str]:
    """Names of the networks that a package of diffusers defines."""
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__:
                yield name


def with_pipelines() -> set[str]:
    """Classes that ``pipelines`` tries in a pipeline of diffusers' own."""
    return {
        type(getattr(shared(name), component)).__name__
        for name, tiny in PIPELINES.items()
        for component in tiny.denoisers
    }


def test_no_network_of_diffusers_is_forgotten() -> None:
    known = {*walk(transformers), *walk(unets)}
    assert known == {*TINY, *NO_DENOISERS, *with_pipelines()} & known
    assert not set(TINY) & set(NO_DENOISERS)
    assert all(reason.endswith(".") for reason in NO_DENOISERS.values())


@functools.cache
def loop(name: str) -> Loop:
    return Loop.of(TINY[name])


def run(pipe: Loop, batch: int = 1) -> Tensor:
    return pipe(generator=torch.Generator().manual_seed(0), batch=batch)


@functools.cache
def plain(name: str) -> Tensor:
    return run(loop(name))


def schedule(name: str, granularity: str, compute: np.ndarray) -> CacheSchedule | None:
    """Plain reuse at all sites of a granularity; None if there are none."""
    sites = [site for site in find_sites(loop(name).transformer) if site.partition(":")[0] == granularity]
    plan: SitePlan = reuse(compute)
    return (
        CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=dict.fromkeys(sites, plan))})
        if sites
        else None
    )


everyone = pytest.mark.parametrize("name", TINY)


@everyone
def test_the_state_and_every_block_have_a_say(name: str) -> None:
    """Else everything below would pass for the wrong reason."""
    assert torch.isfinite(plain(name)).all()
    assert torch.equal(run(loop(name)), plain(name))
    pipe = loop(name)
    for module in [m for n, m in pipe.transformer.named_modules() if n.count(".") == 1 and n.split(".")[1].isdigit()]:
        kept = module.forward
        module.forward = lambda *args, module=module, kept=kept, **kwargs: scaled(kept(*args, **kwargs))  # type: ignore[method-assign]
        try:
            assert not torch.equal(run(pipe), plain(name)), type(module).__name__
        finally:
            del module.forward


def scaled(value: object) -> object:
    if isinstance(value, Tensor):
        return value * 1.1 if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(scaled(v) for v in value)
    return value


@everyone
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_computed_is_bit_equal_and_skips_skip(name: str, granularity: str) -> None:
    full = schedule(name, granularity, np.ones(STEPS, bool))
    some = schedule(name, granularity, MASK)
    if full is None or some is None:
        pytest.skip(f"no {granularity} sites")
    pipe = loop(name)
    before = {n: dict(m.__dict__) for n, m in pipe.transformer.named_modules()}
    with accelerated(pipe, full):
        assert torch.equal(run(pipe), plain(name))
        assert report(pipe).predicted == 0
    accelerate(pipe, some)
    first = run(pipe)
    seen = report(pipe)
    assert torch.equal(run(pipe), first)
    restore(pipe)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain(name))
    assert not any(row.failed_open for row in seen.rows)
    rows = [row for row in seen.rows if row.site in some.denoisers["transformer"].sites]
    assert {row.site for row in rows} == set(some.denoisers["transformer"].sites)
    for row in rows:  # a module may serve several streams in one forward
        assert row.strip == "".join("■·"[not computed] * (row.computed // 3) for computed in MASK)
    assert {n: dict(m.__dict__) for n, m in pipe.transformer.named_modules()} == before
    assert torch.equal(run(pipe), plain(name))


def test_a_module_that_serves_two_streams_predicts_each_from_its_own() -> None:
    """CogView4's feed-forward: pictures, then text."""
    pipe, outputs = Loop.of(TINY["CogView4Transformer2DModel"]), list[Tensor]()
    site = "sublayer:transformer_blocks.1.ff"
    (module,) = find_sites(pipe.transformer)[site]
    module.register_forward_hook(lambda _module, _args, value: outputs.append(value.clone()))
    plan = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites={site: reuse(MASK)})})
    with accelerated(pipe, plan):
        run(pipe)
        assert not any(row.failed_open for row in report(pipe).rows)
    for stream in (outputs[::2], outputs[1::2]):
        assert len({tuple(t.shape) for t in stream}) == 1
        for i, computed in enumerate(MASK):
            assert torch.equal(stream[i], stream[i - 1]) is not bool(computed) or i == 0
    assert outputs[0].shape != outputs[1].shape
