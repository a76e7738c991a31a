"""Every network of diffusers that can stand in a sampling loop: bit-equal, skipped, given back; or listed, and why."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import NO_DENOISERS, TINY, Loop
from denoisers import unets as unet_room
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from pipelines import TINY as PIPELINES
from pipelines import shared
from torch import Tensor

from diffcache import accelerate, accelerated, report, restore
from diffcache.documents import GRANULARITIES, CacheSchedule, DenoiserPlan
from diffcache.host import find_sites
from diffcache.schedulers.uniform import reuse

MASK = np.array([True, False, False, True])  # an output is reused twice, then replaced
STEPS = len(MASK)
HAVE = {  # where it is not all granularities: a U-Net has its deep branch, Stable Cascade nothing inside
    **dict.fromkeys(("HiDreamImageTransformer2DModel", "T5FilmDecoder"), GRANULARITIES[:3]),
    **dict.fromkeys((one.name for one in unet_room.DENOISERS), GRANULARITIES[:2]),
    "StableCascadeUNet": GRANULARITIES[:1],
    "UVit2DModel": GRANULARITIES,
}
PLACES = [(name, g) for name in TINY for g in HAVE.get(name, GRANULARITIES)]


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


def run(pipe: Loop, batch: int = 1, **options: Any) -> Tensor:
    options = {"num_inference_steps": STEPS} | options
    return pipe(generator=torch.Generator().manual_seed(0), batch=batch, **options)


@functools.cache
def plain(name: str) -> Tensor:
    return run(loop(name))


def schedule(name: str, granularity: str, compute: np.ndarray) -> CacheSchedule:
    """Plain reuse at all sites of a granularity."""
    sites = [site for site in find_sites(loop(name).transformer) if site.partition(":")[0] == granularity]
    return CacheSchedule(
        steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=dict.fromkeys(sites, reuse(compute)))}
    )


@functools.cache
def called(name: str) -> set[str]:
    """Sites that a forward runs: some networks hold parts for their checkpoints' sake."""
    found: set[str] = set()
    pipe = loop(name)
    hooks = [
        modules[-1].register_forward_hook(lambda *_, site=site: found.add(site))
        for site, modules in find_sites(pipe.transformer).items()
    ]
    run(pipe)
    for hook in hooks:
        hook.remove()
    return found


everyone = pytest.mark.parametrize("name", TINY)


@everyone
def test_the_state_and_every_block_have_a_say(name: str) -> None:
    """Else everything below would pass for the wrong reason."""
    assert torch.isfinite(plain(name)).all()
    pipe = loop(name)
    assert torch.equal(run(pipe), plain(name))
    one_step = run(pipe, num_inference_steps=1)
    members = [m for n, m in pipe.transformer.named_modules() if n.count(".") == 1 and n.split(".")[1].isdigit()]
    for module in members:
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            continue
        kept = module.forward
        module.forward = lambda *args, module=module, kept=kept, **kwargs: disturbed(kept(*args, **kwargs))  # type: ignore[method-assign]
        try:
            assert not torch.equal(run(pipe, num_inference_steps=1), one_step), type(module).__name__
        finally:
            del module.forward


def disturbed(value: object) -> object:
    """By a wave along the channels, which no norm behind it undoes."""
    if isinstance(value, Tensor):
        wave = torch.sin(torch.arange(value.shape[-1])) if value.ndim else torch.zeros(())
        return value + 0.1 * wave if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(disturbed(v) for v in value)
    return value


@everyone
def test_sites_of_these_granularities_are_found_and_no_others(name: str) -> None:
    found = {site.partition(":")[0] for site in find_sites(loop(name).transformer)}
    assert found == {granularity for place, granularity in PLACES if place == name}


@pytest.mark.parametrize(("name", "granularity"), PLACES)
def test_all_computed_is_bit_equal_and_skips_skip(name: str, granularity: str) -> None:
    full, some = schedule(name, granularity, np.ones(STEPS, bool)), schedule(name, granularity, MASK)
    pipe, untouched = loop(name), plain(name)  # run once: some networks keep tables that their first forward makes
    before = {n: dict(m.__dict__) for n, m in pipe.transformer.named_modules()}
    with accelerated(pipe, full):
        assert torch.equal(run(pipe), untouched)
        assert not any(row.predicted or row.failed_open for row in report(pipe).rows)
    accelerate(pipe, some)
    first = run(pipe)
    seen = report(pipe)
    assert torch.equal(run(pipe), first)
    restore(pipe)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, untouched)
    assert not any(row.failed_open for row in seen.rows)
    rows = [row for row in seen.rows if row.site in some.denoisers["transformer"].sites]
    assert {row.site for row in rows} == set(some.denoisers["transformer"].sites) & called(name)
    for row in rows:  # a module may serve several streams in one forward
        assert row.strip == "".join("■·"[not computed] * (row.computed // int(MASK.sum())) for computed in MASK)
    assert {n: dict(m.__dict__) for n, m in pipe.transformer.named_modules()} == before
    assert torch.equal(run(pipe), untouched)


@everyone
def test_where_nothing_moves_reuse_is_exact(name: str) -> None:
    """Every stack alone, all blocks together, all parts of blocks together: a site whose output is not all that the
    rest of the network sees of it would show."""
    pipe = loop(name)
    sites = [site for site in find_sites(pipe.transformer) if site != "model"]
    alone = [[site] for site in sites if site.startswith("stack:")]
    together = [[s for s in sites if s.startswith(granularity)] for granularity in ("block:", "sublayer:")]
    for some in filter(None, (*alone, *together)):
        plan = CacheSchedule(
            steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=dict.fromkeys(some, reuse(MASK)))}
        )
        with accelerated(pipe, plan):
            outputs = run(pipe, batch=2, still=True)
            assert not any(row.failed_open for row in report(pipe).rows)
        for output in outputs:
            assert torch.equal(output, outputs[0]), some


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


def parts(name: str) -> list[str]:
    """Paths of the parts of a U-Net's deep branch."""
    network = loop(name).transformer
    paths = {id(module): path for path, module in network.named_modules()}
    return [paths[id(module)] for module in find_sites(network)["stack:up_blocks"]]


def test_the_deep_branch_of_a_unet_ends_before_the_last_layer() -> None:
    found = parts("UNetSpatioTemporalConditionModel")
    assert found[0] == "down_blocks.0"
    assert "mid_block" in found
    assert found[-1].startswith("up_blocks.1.")
    assert not any(path.endswith(f"up_blocks.1.{column}.2") for path in found for column in ("resnets", "attentions"))


@pytest.mark.parametrize("name", ["UNet1DModel", "Kandinsky3UNet"])
def test_if_layers_have_no_skips_the_deep_branch_lies_between_the_outer_blocks(name: str) -> None:
    found = parts(name)
    assert "down_blocks.0" not in found
    assert "down_blocks.1" in found
    last = len(loop(name).transformer.up_blocks) - 1
    assert found[-1] == f"up_blocks.{last - 1}"


@pytest.mark.parametrize(
    "name", ["UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet"]
)
def test_the_parts_of_a_deep_branch_run_in_its_order(name: str) -> None:
    pipe, order = loop(name), list[int]()
    modules = find_sites(pipe.transformer)["stack:up_blocks"]
    hooks = [m.register_forward_hook(lambda *_, i=i: order.append(i)) for i, m in enumerate(modules)]
    try:
        pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    finally:
        for hook in hooks:
            hook.remove()
    assert order == list(range(len(modules)))
