"""Runs whose kept outputs lie in fewer bytes: nearly the same pictures, by the formula and the formats that were asked
for, in the bytes that are reported."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import STEPS, TINY, fresh, run, shared
from probes import PLACES, bound, hold, offered
from torch import Tensor

from diffcache import accelerate, accelerated, estimate, report
from diffcache.documents import SitePlan
from diffcache.errors import BadOption
from diffcache.executor import Anchor, Output
from diffcache.executor.prediction import predict_output
from diffcache.executor.program import Terms, compile_plan
from diffcache.executor.store import Packer, signature
from diffcache.kernels import FORMATS, Packed, unpack
from diffcache.profiling.calibration import correct

FEWER = [name for name in FORMATS if name != "bf16"]
NEAR = {"bf16": 0.02, "int8": 0.05, "fp8": 0.15, "int4": 0.7}  # of the pictures' own size; tiny networks amplify


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")  # wan22: a second denoiser without anchors
@pytest.mark.parametrize(("name", "granularity"), PLACES)
def test_every_pipeline_keeps_its_outputs_in_eight_bits(name: str, granularity: str) -> None:
    pipe, call = shared(name), TINY[name].call(shared(name))
    rule = f"uniform:every=2,sites={granularity}"
    with accelerated(pipe, rule):
        exact, before = run(pipe, call), report(pipe)
    with accelerated(pipe, rule, store="int8"):
        found, told = run(pipe, call), report(pipe)
    assert not torch.equal(found, exact)
    assert off(found, exact) < NEAR["int8"]
    assert told.peak_bytes < 0.52 * before.peak_bytes  # of float32, with scales of short rows
    assert [r.failed_open for r in told.rows] == [r.failed_open for r in before.rows]
    assert {r.kept_as for r in told.rows if r.predicted} == {"int8"}
    assert told.backend == "torch"
    assert before.backend == ""
    assert "int8" in str(told)
    assert "by plain torch" in str(told)
    assert told.bytes_held == 0


@pytest.mark.parametrize("store", FORMATS)
@pytest.mark.parametrize("rule", ["uniform:every=2", "taylorseer:every=3,order=1"])
@pytest.mark.parametrize("granularity", offered(shared("flux")))
def test_every_format_is_as_near_as_it_is_fine(store: str, rule: str, granularity: str) -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"), batch=2)
    rule = f"{rule},sites={granularity}"
    with accelerated(pipe, rule):
        exact, before = run(pipe, call), report(pipe)
    with accelerated(pipe, rule, store=store):
        found, told = run(pipe, call), report(pipe)
    assert 0 < off(found, exact) < NEAR[store]
    assert told.peak_bytes < before.peak_bytes
    assert estimate(pipe, rule, store=store, **call).cache_bytes == told.peak_bytes


def test_the_schedule_says_which_site_is_kept_in_what() -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"))
    made = bound(pipe, hold("#.#.#."), "block")
    plans = made.denoisers["transformer"].sites
    stores = dict(zip(plans, (None, *FORMATS), strict=False))
    sites = {name: dataclasses.replace(plan, store=stores.get(name)) for name, plan in plans.items()}
    made = dataclasses.replace(
        made, denoisers={"transformer": dataclasses.replace(made.denoisers["transformer"], sites=sites)}
    )
    with accelerated(pipe, made):
        run(pipe, call)
        said = {r.site: r.kept_as for r in report(pipe).rows if r.site != "model"}
        bytes_ = {r.site: r.peak_bytes for r in report(pipe).rows}
    assert said == {name: stores.get(name) or "exact" for name in plans}
    widths = sorted((bytes_[name] for name, store in stores.items() if store != "exact"), reverse=True)
    assert len(set(widths)) > 2  # exact, sixteen, eight and four bits
    with accelerated(pipe, made, store="exact"):
        run(pipe, call)
        assert {r.kept_as for r in report(pipe).rows} == {"exact"}
    assert made.stored("int8").stored("exact") == made.stored("exact")


def test_exactly_kept_outputs_give_the_bits_they_always_gave() -> None:
    pipe, call = shared("sd3"), TINY["sd3"].call(shared("sd3"))
    with accelerated(pipe, "uniform:every=2,sites=block"):
        before = run(pipe, call)
    with accelerated(pipe, "uniform:every=2,sites=block", store="exact", backend="torch"):
        assert torch.equal(run(pipe, call), before)


def test_in_bfloat16_the_format_bf16_changes_nothing() -> None:
    pipe = fresh("flux").to(torch.bfloat16)
    call = TINY["flux"].call(pipe)
    call = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    with accelerated(pipe, "uniform:every=2,sites=block"):
        before, told = run(pipe, call), report(pipe)
    with accelerated(pipe, "uniform:every=2,sites=block", store="bf16"):
        assert torch.equal(run(pipe, call), before)
        assert report(pipe).peak_bytes == told.peak_bytes


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_runs_it_does_not_show(backend: Any) -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"))
    with accelerated(pipe, "taylorseer:every=2,order=1", store="int8"):
        first = run(pipe, call)
    with accelerated(pipe, "taylorseer:every=2,order=1", store="int8", backend=backend):
        assert torch.equal(run(pipe, call), first)


# Bad input: one error, nothing patched.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": "int3"}, r"store='int3' was given. Allowed: 'exact', 'bf16', 'int8', 'fp8', 'int4'"),
        ({"store": 8}, r"store=8 was given"),
        ({"backend": "cuda"}, r"backend='cuda' was given. Allowed: 'auto', 'torch', 'compiled', 'triton'"),
    ],
)
@pytest.mark.parametrize("source", ["uniform:every=2", "schedule"])
def test_what_there_is_not_is_refused_with_what_there_is(options: Any, words: str, source: str) -> None:
    pipe = shared("flux")
    found = dict(pipe.__dict__)
    with pytest.raises(BadOption, match=words):
        accelerate(pipe, bound(pipe, hold("#.#.#.")) if source == "schedule" else source, **options)
    assert pipe.__dict__ == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_refused() -> None:
    with pytest.raises(BadOption, match=r"backend='triton' cannot be used: .*GPU.* Use 'auto', 'torch' or 'compiled'"):
        accelerate(shared("flux"), "uniform:every=2", store="int8", backend="triton")


# Values that are not finite.


@pytest.mark.parametrize("store", FEWER)
def test_what_is_not_finite_is_computed_again(store: str) -> None:
    pipe, call = fresh("flux"), TINY["flux"].call(fresh("flux"))
    steps: list[int] = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        steps.append(len(steps))
        return (output[0] * torch.nan, *output[1:]) if len(steps) == 3 else output

    pipe.transformer.register_forward_hook(poison)
    accelerate(pipe, "uniform:every=2", store=store)
    with pytest.warns(RuntimeWarning, match="an anchor is missing"):
        run(pipe, call)
    (row,) = report(pipe).rows
    assert sum(row.failed_open.values()) == 1


# The formula.


def packed(value: Tensor, store: str, prescale: Tensor | None = None) -> Any:
    return Packer(FORMATS[store], prescale).keep(value)


def anchor(value: Tensor, x: Tensor, store: str, prescale: Tensor | None = None) -> Anchor:
    form = Output.of((value,)).form()
    return Anchor(form, (packed(value, store, prescale),), (packed(x, store, prescale),), signature((x,)))


def plain(found: Anchor) -> Anchor:
    def whole(kept: Any) -> Tensor:
        return unpack(kept) if isinstance(kept, Packed) else kept

    return dataclasses.replace(found, kept=tuple(map(whole, found.kept)), x=tuple(map(whole, found.x)))


SHAPES = [(4, 64, 40), (4, 3, 16), (4, 6, 8, 8), (4, 6, 2, 4, 4), (4, 96)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    store=st.sampled_from(sorted(FORMATS)),
    anchors=st.integers(1, 4),
    rows=st.sampled_from([1, 2]),
    kappa=st.sampled_from([0.0, 1.0, -0.5]),
    given=st.booleans(),
    channels=st.sampled_from(["", "scale", "bias", "both", "numbers"]),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_predictions_from_codes_are_those_from_what_the_codes_stand_for(
    shape: tuple[int, ...],
    store: str,
    anchors: int,
    rows: int,
    kappa: float,
    given: bool,
    channels: str,
    static: bool,
    seed: int,
) -> None:
    random, made = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    width = shape[1] if len(shape) >= 4 else shape[-1]
    prescale = torch.stack([torch.randn(shape[-1]), torch.rand(shape[-1]) + 0.5]) if static else None

    def coefficient(wanted: str, usual: float) -> tuple[Any, ...]:
        if channels == "numbers":
            return tuple(float(v) for v in random.normal(size=rows))
        each = channels in (wanted, "both")
        return tuple(random.normal(size=width) if each else usual for _ in range(rows))

    terms = Terms(
        anchors=tuple(range(anchors)),
        weights=tuple(tuple(float(w) for w in random.normal(size=anchors)) for _ in range(rows)),
        inputs=tuple(tuple(float(v) for v in given * random.normal(size=anchors)) for _ in range(rows)),
        kappa=(kappa,) * rows,
        scale=coefficient("scale", 1.0),
        bias=coefficient("bias", 0.0),
    )
    x, x_0 = (torch.randn(shape, generator=made) for _ in range(2))
    kept = [anchor(torch.randn(shape, generator=made) * 3 + 1, x_0, store, prescale) for _ in range(anchors)]
    assert all(isinstance(k.kept[0], Packed) for k in kept)
    branch = None if rows > 1 else 0
    (found,) = predict_output(kept, terms, (x,), branch)  # type: ignore[misc]
    (wanted,) = predict_output([plain(k) for k in kept], terms, (x,), branch)  # type: ignore[misc]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous()


@st.composite
def residual_plans(draw: st.DrawFn, steps: int = 8) -> SitePlan:
    """Residual reuse at most steps, anything else at others."""
    compute = np.array([True, *draw(st.lists(st.booleans(), min_size=steps - 1, max_size=steps - 1))])
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    weights, kappa = np.zeros((1, steps, 2)), np.zeros((1, steps))
    for i in np.flatnonzero(~compute):
        weights[0, i, 0] = kappa[0, i] = random.choice([1.0, 0.5, -1.25])
        if random.random() < 0.2:
            kappa[0, i] = random.choice([0.0, 1.0])
        if random.random() < 0.2 and compute[:i].sum() > 1:
            weights[0, i, 1] = -0.5
    return SitePlan(compute=compute, weights=weights, kappa=kappa)


@settings(deadline=None)
@given(residual_plans())
def test_differences_are_kept_where_they_say_all_that_is_needed(plan: SitePlan) -> None:
    program = compile_plan(plan)
    for step in range(len(plan.compute)):
        asking = [t for t in program.terms if t is not None and step in t.anchors]
        enough = [t.weights == ((t.kappa[0],),) and t.kappa[0] != 0 for t in asking]
        assert (step in program.differences) == (bool(asking) and all(enough))
    for terms in program.terms:
        if terms is None or terms.anchors[0] not in program.differences:
            continue
        x, x_0, f = torch.randn(3, 2, 64, 16)
        form = Output.of((f,)).form()
        whole = Anchor(form, (f,), (x_0,), signature((x,)))
        less = Anchor(form, (f - x_0,), (), signature((x,)), difference=True)
        as_codes = Anchor(form, (Packer(FORMATS["int8"]).keep_difference(f, x_0),), (), signature((x,)), True)
        (wanted,) = predict_output([whole], terms, (x,), 0)  # type: ignore[misc]
        torch.testing.assert_close(predict_output([less], terms, (x,), 0), (wanted,), rtol=1e-4, atol=1e-5)
        assert off(predict_output([as_codes], terms, (x,), 0)[0], wanted) < 0.01  # type: ignore[index]


def test_a_residual_is_kept_once_not_as_output_and_input() -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"))
    mask = np.arange(STEPS) % 3 == 0
    reuse = bound(pipe, hold(mask), "block")
    residual = bound(pipe, hold(mask, kappa=np.where(mask, 0.0, 1.0)[None]), "block")
    told = {}
    for title, made in (("reuse", reuse), ("residual", residual)):
        for store in ("exact", "int8"):
            with accelerated(pipe, made, store=store):
                run(pipe, call)
                told[title, store] = report(pipe).peak_bytes
    assert told["residual", "exact"] == 2 * told["reuse", "exact"]
    assert told["residual", "int8"] == told["reuse", "int8"]


@pytest.mark.parametrize("rule", ["firstblockcache:threshold=0.8", "easycache:threshold=1,warmup=2"])
def test_decisions_from_signals_in_eight_bits_are_nearly_those_from_exact_ones(rule: str) -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"), batch=2)
    with accelerated(pipe, rule):
        exact = run(pipe, call)
        before = {(r.site, r.branch): r.strip for r in report(pipe).rows}
    with accelerated(pipe, rule, store="int8"):
        found = run(pipe, call)
        after = {(r.site, r.branch): r.strip for r in report(pipe).rows}
    assert after == before
    assert any("·" in strip for strip in before.values())
    assert off(found, exact) < NEAR["int8"]


def test_corrections_are_fitted_on_what_the_store_gives_back() -> None:
    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"))
    made = bound(pipe, hold("#.#.#."), "block").stored("int4")
    corrected = correct(pipe, made, [call])
    untouched = run(pipe, call)
    with accelerated(pipe, made):
        before = off(run(pipe, call), untouched)
    with accelerated(pipe, corrected):
        after = off(run(pipe, call), untouched)
        assert {r.kept_as for r in report(pipe).rows if r.predicted} == {"int4"}
    assert after < before
