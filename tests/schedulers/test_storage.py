"""Formats chosen in planning: what a profile measured, what fits into the memory, and the least error among that."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import command_of
from documents import hold, of_sites, site
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import TINY, run, shared
from test_planning import BYTES, measurement

from diffcache import Budget, accelerated, measure, plan, report
from diffcache.documents import CacheSchedule, KeptProfile, Profile, SitePlan
from diffcache.errors import BadOption
from diffcache.kernels import FORMATS, pack, unpack
from diffcache.planning import cache_bytes
from diffcache.planning.storage import fit_formats
from diffcache.schedulers import Planned

EVERY = ("bf16", "int8", "fp8", "int4")
STEPS = 8


def kept(size: int, error: float) -> dict[str, KeptProfile]:
    parts = {"bf16": (0.5, 1e-6), "int8": (0.25, 1e-4), "fp8": (0.25, 6e-4), "int4": (0.13, 1e-2)}
    return {name: KeptProfile(bytes=int(size * part), error=error * e) for name, (part, e) in parts.items()}


def stores(plans: Any) -> dict[str, str | None]:
    return {name: found.store for name, found in plans.items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Profile, Planned, int]:
    """Sites that weigh differently and hold at different steps, and some memory."""
    names = [f"block:b.{n}" for n in range(draw(st.integers(1, 4)))]
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    same = draw(st.booleans())
    sites, plans = {}, {}
    for name in names:
        size = 1000 if same else int(random.integers(1, 50)) * 100
        outputs = random.normal(size=(1, STEPS, 3)).cumsum(1)
        sites[name] = site(outputs, output_bytes=size, kept=kept(size, random.random() + 0.01))
        mask = "■··■··■·" if same else "■" + "".join(random.choice(["■", "·"], STEPS - 1))
        plans[name] = hold(mask)
    found = of_sites(sites)
    planned = Planned(sites=plans)
    whole = cache_bytes(found, planned)
    return found, planned, int(whole * draw(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, 1.0])))


def error_of(found: Profile, planned: Planned) -> float:
    """Return the error of the final state, as the module defines it; without dynamics all steps count equally."""
    ((_, denoiser),) = found.denoisers.items()
    total = 0.0
    for name, made in planned.sites.items():
        if made.store is not None:
            at = denoiser.sites[name]
            for t in np.flatnonzero(~made.compute):
                total += float(at.influence[t] * (made.weights[:, t] ** 2).sum() * at.kept[made.store].error)
    return total


def every_choice(planned: Planned) -> list[Planned]:
    names = list(planned.sites)
    found = []
    for choice in itertools.product((None, *EVERY), repeat=len(names)):
        sites = {
            n: SitePlan(compute=planned.sites[n].compute, weights=planned.sites[n].weights, store=s)
            for n, s in zip(names, choice, strict=True)
        }
        found.append(Planned(sites=sites))
    return found


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_choice_fits_and_is_near_the_best_there_is(problem: tuple[Profile, Planned, int]) -> None:
    found, planned, most = problem
    ((_, denoiser),) = found.denoisers.items()
    made = fit_formats(found, denoiser.sites, planned, most)
    fitting = [c for c in every_choice(planned) if cache_bytes(found, c) <= most]
    assert (made is None) == (not fitting)
    if made is None:
        return
    assert cache_bytes(found, made) <= most
    best = min(error_of(found, c) for c in fitting)
    one_step = max(error_of(found, Planned(sites={n: p})) for n, p in every_choice(planned)[-1].sites.items())
    assert best <= error_of(found, made) * (1 + 1e-9) + 1e-15
    assert error_of(found, made) <= best + one_step  # the relaxation misses by one choice at most
    for name, one in made.sites.items():  # and no single choice would do better
        for store in (None, *EVERY):
            other = Planned(sites={**made.sites, name: SitePlan(compute=one.compute, weights=one.weights, store=store)})
            assert cache_bytes(found, other) > most or error_of(found, other) >= error_of(found, made) * (1 - 1e-9)


def test_with_memory_for_everything_all_outputs_stay_exact() -> None:
    sites = {f"block:b.{n}": site(np.ones((1, STEPS, 2)), output_bytes=100, kept=kept(100, 1.0)) for n in range(3)}
    planned = Planned(sites=dict.fromkeys(sites, hold("■·■·■·■·")))
    found = of_sites(sites)
    made = fit_formats(found, sites, planned, 300)
    assert made is not None
    assert stores(made.sites) == dict.fromkeys(sites)
    assert fit_formats(found, sites, planned, 30) is None  # int4 takes 39


def test_the_site_that_matters_least_gives_its_bits_first() -> None:
    sites = {
        f"block:b.{n}": site(np.ones((1, STEPS, 2)), output_bytes=1000, kept=kept(1000, error))
        for n, error in enumerate([1.0, 100.0, 10.0])
    }
    planned = Planned(sites=dict.fromkeys(sites, hold("■·■·■·■·")))
    made = fit_formats(of_sites(sites), sites, planned, 2500)
    assert made is not None
    assert stores(made.sites) == {"block:b.0": "bf16", "block:b.1": None, "block:b.2": None}


# Plans.


def root(**changes: Any) -> Profile:
    found = measurement()
    ((name, denoiser),) = found.denoisers.items()
    import dataclasses

    model = dataclasses.replace(denoiser.sites["model"], **{"kept": kept(BYTES, 1.0)} | changes)
    return measurement(denoisers={name: dataclasses.replace(denoiser, sites={"model": model})})


@pytest.mark.parametrize("store", EVERY)
def test_a_plan_counts_bytes_in_its_format(store: str) -> None:
    found = root()
    size = found.denoisers["transformer"].sites["model"].kept[store].bytes
    made = plan(found, "closed_loop:anchors=3", Budget(computed_steps=6, memory_bytes=3 * size), store=store)
    (held,) = made.denoisers["transformer"].sites.values()
    assert (held.store, held.anchors, held.prescale) == (store, 3, None)
    fewer = plan(found, "closed_loop:anchors=3", Budget(computed_steps=6, memory_bytes=3 * size - 1), store=store)
    assert fewer.denoisers["transformer"].sites["model"].anchors == 2


def test_formats_come_before_fewer_anchors() -> None:
    made = plan(root(), "closed_loop:anchors=4", Budget(computed_steps=6, memory_bytes=2 * BYTES), store="auto")
    (held,) = made.denoisers["transformer"].sites.values()
    assert (held.store, held.anchors) == ("bf16", 4)
    tight = plan(root(), "closed_loop:anchors=4", Budget(computed_steps=6, memory_bytes=BYTES // 4), store="auto")
    (held,) = tight.denoisers["transformer"].sites.values()
    assert (held.store, held.anchors) == ("int8", 1)


def test_a_prescale_comes_from_the_profile() -> None:
    (held,) = plan(root(), "uniform", 6, store="int8", prescale=True).denoisers["transformer"].sites.values()
    np.testing.assert_array_equal(held.prescale, root().denoisers["transformer"].sites["model"].channels)
    (exact,) = plan(root(), "uniform", 6, prescale=True).denoisers["transformer"].sites.values()
    assert exact.prescale is None


@pytest.mark.parametrize(
    ("found", "store", "memory", "words"),
    [
        (root, "int3", None, r"store='int3' was given. Allowed: None, 'auto', 'bf16', 'int8', 'fp8', 'int4'"),
        (root, "auto", None, "store cannot be used: 'auto' needs a memory limit"),
        (
            lambda: root(kept={}),
            "int8",
            10**6,
            "store='int8' cannot be used: the profile measured the bytes of no format",
        ),
        (lambda: root(kept={}), "auto", 10, "the profile measured the bytes of no format"),
        (root, "auto", 10, r"memory_bytes=10 was given. Allowed: 532 or more"),
    ],
)
def test_what_cannot_be_is_refused(found: Any, store: str, memory: int | None, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        plan(found(), "closed_loop", Budget(computed_steps=6, memory_bytes=memory), store=store)


def test_the_command_plans_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = root().save(tmp_path / "profile.safetensors"), tmp_path / "schedule.safetensors"
    words = ["--steps", "6", "--memory-bytes", BYTES, "--store", "auto", "--out", out]
    code, _, _ = command_of(monkeypatch, capsys, "plan")(source, *words)
    assert not code
    made = CacheSchedule.load(out)
    assert {p.store for _, _, p in made.plans()} <= set(EVERY)
    assert "kept in" in made.describe()


# Measured, and run.


def test_a_profile_states_the_error_of_each_format() -> None:
    pipe = shared("flux")
    call = TINY["flux"].call(pipe, batch=2)
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        found = measure(pipe, [call], sites="block").denoisers["transformer"].sites["block:transformer_blocks.1"]
    finally:
        hook.remove()
    assert set(found.kept) == set(FORMATS)
    for name, how in FORMATS.items():
        outputs = seen[0]
        lost = [float((unpack(pack(t, how)) - t).double().square().sum()) for t in outputs]
        assert found.kept[name].error == pytest.approx(sum(lost) / sum(t.numel() for t in outputs), rel=1e-6)
        assert found.kept[name].bytes == sum(pack(t, how).nbytes for t in outputs)
    assert found.kept["int4"].error > found.kept["int8"].error > found.kept["bf16"].error > 0
    assert found.channels is not None
    pictures = seen[0][1].flatten(0, 1).double()
    np.testing.assert_allclose(found.channels[0], pictures.mean(0), atol=1e-6)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("part", [0.8, 0.5, 0.3])
def test_a_budget_is_kept_to_by_formats(granularity: str, part: float) -> None:
    pipe, call = shared("sd3"), TINY["sd3"].call(shared("sd3"))
    found = measure(pipe, [call | {"generator": torch.Generator().manual_seed(1)}], sites=granularity)
    spec = f"allocate:sites={granularity},cost=flops"
    exact = plan(found, spec, 4.5)
    with accelerated(pipe, exact):
        run(pipe, call)
        whole = report(pipe).peak_bytes
    made = plan(found, spec, Budget(computed_steps=4.5, memory_bytes=int(part * whole)), store="auto")
    assert [p.compute.tolist() for _, _, p in made.plans()] == [p.compute.tolist() for _, _, p in exact.plans()]
    with accelerated(pipe, made):
        run(pipe, call)
        told = report(pipe)
    assert 0 < told.peak_bytes <= part * whole
    assert len({r.kept_as for r in told.rows if r.peak_bytes}) >= 1
    assert any(r.kept_as != "exact" for r in told.rows)
