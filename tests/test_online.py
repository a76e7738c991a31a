"""Rules that decide in the run: against diffusers' own cache, against decisions derived again from recorded tensors,
and where nothing may be skipped.

Each comparison has a twin at the end of its part that plants a fault and sees the comparison fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import TINY, fresh, run, shared
from probes import BRANCHES, dicts, hold, leaf_calls, names, ours
from test_executor import Loop, Net, loop, noise
from torch import Tensor, nn

from diffcache import CacheSchedule, accelerate, accelerated, assets, estimate, report
from diffcache.adapters import find_sites
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.executor import FailedOpen, online
from diffcache.executor.online import Verdict, Watch
from diffcache.executor.streams import MAIN, Inputs, pair, reader
from diffcache.patch import layer
from diffcache.reports import Report
from diffcache.schedule import DenoiserPlan, Guidance, Online, OnlineRule, SitePlan
from diffcache.schedulers import Rule, parse_rule
from diffcache.schedulers.taylor import extrapolated
from diffcache.store import Anchor, Output, Store, signature

STEPS = 12
RULES: tuple[OnlineRule, ...] = ("first_block", "modulated_input", "output_rate", "drift")
INSIDE = ("first_block", "modulated_input")
HUGE = 1e9


def residual(compute: Sequence[bool] | str) -> SitePlan:
    """F of the newest computed step, moved along with the input."""
    plan = hold(compute)
    return SitePlan(compute=plan.compute, weights=plan.weights, kappa=plan.weights[:, :, 0])


def stacks(pipe: Any) -> list[str]:
    return [site for site in find_sites(pipe.transformer) if site.startswith("stack:")]


def decided(
    pipe: Any,
    rule: OnlineRule,
    limit: float | Sequence[float] = HUGE,
    *,
    plan: SitePlan | None = None,
    guidance: Guidance | None = None,
    sites: Sequence[str] | None = None,
    **options: Any,
) -> CacheSchedule:
    """Everything but the first step is left to the run, unless ``plan`` says otherwise."""
    plan = plan or residual("#" + "." * (STEPS - 1))
    limits = np.broadcast_to(np.asarray(limit, float), len(plan.compute)).copy()
    if sites is None:
        sites = stacks(pipe) if rule in INSIDE else ["model"]
    rules = Online(rule=rule, limit=limits, **options)
    denoiser = DenoiserPlan(sites=dict.fromkeys(sites, plan), online=rules)
    return CacheSchedule(steps=len(plan.compute), denoisers={"transformer": denoiser}, guidance=guidance)


def played(name: str, schedule: Any, **call: Any) -> tuple[Tensor, Report]:
    """The output and the report of one run of a tiny pipeline."""
    pipe = shared(name)
    with accelerated(pipe, schedule):
        output = run(pipe, TINY[name].call(pipe), num_inference_steps=STEPS, **call)
        return output, report(pipe)


def plain(name: str, **call: Any) -> Tensor:
    return run(shared(name), TINY[name].call(shared(name)), num_inference_steps=STEPS, **call)


def strips(found: Report, site: str) -> list[str]:
    """One per branch."""
    return [row.strip for row in found.rows if row.site == site]


def governed(pipe: Any, rule: OnlineRule) -> str:
    return stacks(pipe)[0] if rule in INSIDE else "model"


# --- what is recorded beside a run -----------------------------------------------------------------------------------


@contextmanager
def heard(module: nn.Module, what: Callable[[Any, Any], Any]) -> Iterator[list[np.ndarray]]:
    """``what(inputs, output)`` of every call of ``module``, in float64; from below our layers if entered before they
    come on."""
    read, found = reader(module), []

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = read(args, kwargs)
        main = given.main[0].clone()
        value = inner(*args, **kwargs)
        found.append(what(Inputs((main,), given.others), value).double().numpy().copy())
        return value

    undo = layer(module, "forward", around)
    try:
        yield found
    finally:
        undo()


@contextmanager
def denoised(module: nn.Module) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Input and output of every call, predicted ones included."""
    read, found = reader(module), []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((read(args, kwargs).main[0].double().numpy().copy(), output[0].double().numpy().copy()))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def mean(x: np.ndarray) -> float:
    return float(np.abs(x).mean())


def by_newest(signals: Sequence[np.ndarray], limit: float, polynomial: Callable[[float], float]) -> str:
    """first_block, drift: what differs from the newest computed step's by ``limit`` is computed."""
    strip, newest = "■", signals[0]
    for now in signals[1:]:
        strip += "·" if polynomial(mean(now - newest) / mean(newest)) < limit else "■"
        if strip[-1] == "■":
            newest = now
    return strip


def by_sum(signals: Sequence[np.ndarray], limit: float, polynomial: Callable[[float], float]) -> str:
    """modulated_input: changes from call to call add up."""
    strip, total = "■", 0.0
    for before, now in pairwise(signals):
        total += polynomial(mean(now - before) / mean(before))
        strip += "·" if total < limit else "■"
        if strip[-1] == "■":
            total = 0.0
    return strip


def by_rate(calls: Sequence[tuple[np.ndarray, np.ndarray]], limit: float) -> str:
    """output_rate: the same of the input, times how fast the output answered."""
    strip, computed, total = "", [], 0.0
    for i, (x, _) in enumerate(calls):
        predicted = False
        if len(computed) >= 2:
            (x_b, f_b), (x_a, f_a) = (calls[c] for c in computed[-2:])
            total += mean(f_a - f_b) / mean(x_a - x_b) * mean(x - calls[i - 1][0]) / mean(f_a)
            predicted = total < limit
        strip += "·" if predicted else "■"
        if not predicted:
            computed.append(i)
            total = 0.0
    return strip


def identity(x: float) -> float:
    return x


# --- the same as diffusers' own FirstBlockCache ----------------------------------------------------------------------


def first_block_cache(pipe: Any, call: dict[str, Any], threshold: float, **over: Any) -> tuple[Tensor, list[int]]:
    """diffusers' own: its output, and per forward how often attention ran in the last block."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    ran: list[int] = []
    last = find_sites(pipe.transformer)[stacks(pipe)[-1]][-1]
    attention = next(part for name, part in last.named_children() if "attn" in name)
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(0)),
        attention.register_forward_hook(lambda *_: ran.__setitem__(-1, 1)),
    ]
    try:
        return run(pipe, call, **over), ran
    finally:
        for handle in handles:
            handle.remove()
        pipe.transformer.disable_cache()


def assert_like_first_block_cache(pipe: Any, call: dict[str, Any], threshold: float, branches: int, **over: Any) -> str:
    """The same forwards are computed, and the outputs agree to rounding. Returns the strip of the first branch."""
    steps = over.get("num_inference_steps", call.get("num_inference_steps"))
    expected, ran = first_block_cache(pipe, call, threshold, **over)
    schedule = decided(pipe, "first_block", threshold, plan=residual("#" + "." * (steps - 1)))
    with accelerated(pipe, schedule):
        output = run(pipe, call, **over)
        found = report(pipe)
    for site in stacks(pipe):
        for branch, strip in enumerate(strips(found, site)):
            assert strip == "".join("·■"[r] for r in ran[branch::branches]), (site, branch)
    assert not any(row.failed_open for row in found.rows)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    return strips(found, stacks(pipe)[0])[0]


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [
        ("flux", (0.0, 0.35, 0.4, 0.5, 0.7)),
        ("flux_true_cfg", (0.35, 0.5, 0.7)),
        ("wan", (0.1, 0.15, 0.2, 0.3, 0.6)),
        ("cogvideox", (0.4, 0.6, 0.9)),
    ],
)
def test_first_block_is_first_block_cache(name: str, thresholds: Sequence[float]) -> None:
    """Two streams, two stacks, one and two branches: residuals stack by stack telescope to the one that it keeps."""
    pipe = fresh(name)
    seen = {
        assert_like_first_block_cache(
            pipe, TINY[name].call(pipe), threshold, BRANCHES[TINY[name].guidance], num_inference_steps=STEPS
        )
        for threshold in thresholds
    }
    assert len(seen) > 1, "every threshold decides alike: nothing was compared"


def test_first_block_is_first_block_cache_on_the_trained_model() -> None:
    model = assets.load("flux")
    call = model.call(model.subjects[:1], [0], steps=16)
    call["output_type"] = "latent"
    del call["generator"]
    seen = {assert_like_first_block_cache(model.pipe, call, threshold, 1) for threshold in (0.1, 0.25, 0.5)}
    assert len(seen) == 3


def test_streams_of_equal_length_are_told_apart() -> None:
    """As many text tokens as picture tokens: only what one block hands to the next says which is which."""
    pipe = fresh("flux")
    call = {**TINY["flux"].call(pipe), "height": 16, "width": 12}
    with denoised(pipe.transformer) as calls:
        assert "·" in assert_like_first_block_cache(pipe, call, 0.5, 1, num_inference_steps=STEPS)
    assert calls[0][0].shape[1] == call["prompt_embeds"].shape[1]


def test_streams_told_apart_by_their_shape_alone_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import stacks as passes

    monkeypatch.setattr(passes, "_learn", lambda *_: None)
    with pytest.raises(FailedOpen, match="none of the first block's outputs is known to carry on its input"):
        test_streams_of_equal_length_are_told_apart()


def test_a_residual_compared_with_the_step_before_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "ADDING_UP", ("modulated_input", "output_rate", "first_block"))
    with pytest.raises(AssertionError):
        test_first_block_is_first_block_cache("wan", (0.1, 0.15, 0.2, 0.3, 0.6))


def test_a_text_stream_that_is_not_moved_along_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import decide
    from diffcache.executor.streams import alone

    monkeypatch.setattr(decide, "pair", lambda inputs, outputs, flow: alone(inputs.main, outputs))
    with pytest.raises(AssertionError):
        test_every_stream_is_moved_along_with_its_input("flux")


# --- decisions, derived again ----------------------------------------------------------------------------------------


def first_output_like(x: np.ndarray | Tensor, value: Any) -> Tensor:
    outputs = value if isinstance(value, tuple) else (value,)
    return next(t for t in outputs if isinstance(t, Tensor) and t.shape == x.shape)


WATCHED = {  # pipeline -> (denoiser calls in one step, the normalisation its first block begins with)
    "flux": (1, "norm1"),
    "dit": (1, "norm1"),
    "wan": (2, "norm1"),
    "lumina2": (2, "norm1"),
}
POLYNOMIAL = np.array([-0.3, 1.5, 0.01])


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("polynomial", [None, POLYNOMIAL], ids=["as it is", "polynomial"])
def test_the_first_block_s_residual_decides(name: str, polynomial: np.ndarray | None) -> None:
    pipe, through = shared(name), identity if polynomial is None else lambda x: float(np.polyval(polynomial, x))
    block = find_sites(pipe.transformer)[stacks(pipe)[0]][0]
    seen = set()
    for limit in (0.05, 0.2, 0.35, 0.5):
        with heard(block, lambda given, value: first_output_like(given.main[0], value) - given.main[0]) as signals:
            _, found = played(name, decided(pipe, "first_block", limit, polynomial=polynomial))
        seen |= assert_decided(found, name, [by_newest(s, limit, through) for s in split(signals, name)])
    assert len(seen) > 1


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("polynomial", [None, POLYNOMIAL], ids=["as it is", "polynomial"])
def test_the_modulated_input_decides(name: str, polynomial: np.ndarray | None) -> None:
    pipe, through = shared(name), identity if polynomial is None else lambda x: float(np.polyval(polynomial, x))
    norm = getattr(find_sites(pipe.transformer)[stacks(pipe)[0]][0], WATCHED[name][1])
    seen = set()
    for limit in (0.05, 0.4, 1.0):
        with heard(norm, lambda given, value: value[0] if isinstance(value, tuple) else value) as signals:
            _, found = played(name, decided(pipe, "modulated_input", limit, polynomial=polynomial))
        seen |= assert_decided(found, name, [by_sum(s, limit, through) for s in split(signals, name)])
    assert len(seen) > 1


@pytest.mark.parametrize("name", WATCHED)
def test_the_output_s_rate_decides(name: str) -> None:
    pipe, seen = shared(name), set()
    for limit in (0.1, 0.3, 0.6, 2.0):
        with denoised(pipe.transformer) as calls:
            _, found = played(name, decided(pipe, "output_rate", limit))
        seen |= assert_decided(found, name, [by_rate(c, limit) for c in split(calls, name)])
    assert len(seen) > 1


def split(recorded: Sequence[Any], name: str) -> list[Sequence[Any]]:
    calls = WATCHED[name][0]
    return [recorded[branch::calls] for branch in range(calls)]


def assert_decided(found: Report, name: str, expected: list[str]) -> set[str]:
    rule = found.online["transformer"]
    for site in stacks(shared(name)) if rule in INSIDE else ["model"]:
        assert strips(found, site) == expected
    assert not any(row.failed_open or row.guarded for row in found.rows)
    return set(expected)


def test_the_steps_in_a_row_are_limited() -> None:
    for rule in RULES:
        _, found = played("flux", decided(shared("flux"), rule, most=2))
        (strip,) = strips(found, governed(shared("flux"), rule))
        computed = "■■" if rule == "output_rate" else "■"
        assert strip == (computed + "··■" * STEPS)[:STEPS], rule


def test_steps_that_the_plan_computes_are_not_asked_and_begin_anew() -> None:
    pipe = shared("flux")
    plan = residual("#..#........")
    for rule in ("first_block", "modulated_input", "output_rate"):
        (strip,) = strips(played("flux", decided(pipe, rule, plan=plan))[1], governed(pipe, rule))
        assert strip == ("■■·■········" if rule == "output_rate" else "■··■········"), rule
    norm = find_sites(pipe.transformer)[stacks(pipe)[0]][0].norm1
    with heard(norm, lambda given, value: value[0]) as signals:
        _, found = played("flux", decided(pipe, "modulated_input", 1.0, plan=plan))
    expected = by_sum(signals[:3], 1.0, identity) + by_sum(signals[3:], 1.0, identity)
    assert strips(found, stacks(pipe)[0]) == [expected]
    assert expected.count("■") > 2


def test_a_limit_is_that_of_its_step() -> None:
    limits = np.full(STEPS, HUGE)
    limits[[4, 9]] = 0
    for rule in ("first_block", "modulated_input"):
        (strip,) = strips(played("flux", decided(shared("flux"), rule, limits))[1], governed(shared("flux"), rule))
        assert strip == "■···■····■··", rule


def test_one_decision_serves_both_branches_of_a_batch_and_each_of_separate_calls_has_its_own() -> None:
    (strip,) = strips(played("dit", decided(shared("dit"), "first_block", 0.25))[1], stacks(shared("dit"))[0])
    assert "·" in strip
    apart = strips(played("wan", decided(shared("wan"), "first_block", 0.3))[1], stacks(shared("wan"))[0])
    assert len(set(apart)) == 2


def test_a_sum_that_forgets_to_begin_anew_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Watch.decide

    def never_anew(self: Watch, step: int, asked: bool, now: Any) -> Any:
        level = self._level
        verdict = decide(self, step, asked, now)
        self._level = max(self._level, level)
        return verdict

    monkeypatch.setattr(Watch, "decide", never_anew)
    for test in (test_the_output_s_rate_decides, lambda name: test_the_modulated_input_decides(name, None)):
        with pytest.raises(AssertionError):
            test("flux")


def test_branches_that_share_a_signal_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor.state import State

    watch = State.watch
    monkeypatch.setattr(State, "watch", lambda self, denoiser, branch: watch(self, denoiser, 0))
    with pytest.raises(AssertionError):
        test_the_first_block_s_residual_decides("wan", None)


# --- what is predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["modulated_input", "output_rate"])
@pytest.mark.parametrize("name", ["flux", "dit", "sd3"])
def test_a_run_is_bit_for_bit_the_schedule_of_the_steps_it_computed(name: str, rule: OnlineRule) -> None:
    pipe = shared(name)
    output, found = played(name, decided(pipe, rule, 0.5))
    (strip,) = strips(found, governed(pipe, rule))
    assert "·" in strip
    assert "■" in strip[2:]
    plan = residual(strip.replace("■", "#"))
    sites = stacks(pipe) if rule in INSIDE else ["model"]
    static = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=dict.fromkeys(sites, plan))})
    expected, _ = played(name, static)
    assert torch.equal(output, expected)
    assert not torch.equal(output, plain(name))


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_every_stream_is_moved_along_with_its_input(name: str) -> None:
    """Text and pictures, in any order in which a block takes and returns them; the last one of SD 3 drops the text."""
    pipe = shared(name)
    site = stacks(pipe)[-1]  # where the blocks before have changed the text
    modules = find_sites(pipe.transformer)[site]
    plan = residual("#" + "." * (STEPS - 1))
    given: list[dict[str, Tensor]] = []
    returned: list[tuple[Tensor, ...]] = []
    read = reader(modules[0])

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append({name: t.clone() for name, t in read(args, kwargs).named().items()})

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        returned.append(tuple(t.clone() for t in output if t is not None))

    handles = [
        modules[0].register_forward_pre_hook(enter, with_kwargs=True),
        modules[-1].register_forward_hook(leave),
    ]
    try:
        schedule = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites={site: plan})})
        played(name, schedule)
    finally:
        for handle in handles:
            handle.remove()
    moved = 0
    for i in range(1, STEPS):
        for j, first in enumerate(returned[0]):
            fitting = [
                n for n, t in given[0].items() if t.shape == first.shape and n in (MAIN, "encoder_hidden_states")
            ]
            (stream,) = fitting
            expected = first + (given[i][stream] - given[0][stream])
            torch.testing.assert_close(returned[i][j], expected)
            moved += not torch.equal(given[i][stream], given[0][stream])
    assert moved >= STEPS - 1


def test_an_anchor_that_stays_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put

    def put_once(self: Store, key: Any, step: int, anchor: Any) -> None:
        if step >= 0 or self.get(key, step) is None:
            put(self, key, step, anchor)

    monkeypatch.setattr(Store, "put", put_once)
    monkeypatch.setattr(Store, "drop", lambda self, key, step: None)
    with pytest.raises(AssertionError):
        test_a_run_is_bit_for_bit_the_schedule_of_the_steps_it_computed("flux", "output_rate")


def test_predicted_steps_do_not_run_the_blocks() -> None:
    """Under first_block the first one runs; under modulated_input its first normalisation does, and no more of it."""
    pipe = shared("flux")
    with leaf_calls(pipe, ["transformer"]) as full:
        plain("flux")
    for rule in INSIDE:
        with leaf_calls(pipe, ["transformer"]) as calls:
            _, found = played("flux", decided(pipe, rule))
        (strip, *_) = strips(found, stacks(pipe)[0])
        assert strip == "■" + "·" * (STEPS - 1)
        for (denoiser, path), times in full.items():
            inside = path.startswith(("transformer_blocks.", "single_transformer_blocks."))
            first = path.startswith("transformer_blocks.0.")
            if rule == "modulated_input":
                first = path.startswith("transformer_blocks.0.norm1.")
            assert calls[denoiser, path] == (times if first or not inside else times // STEPS), (rule, path)


# --- where nothing may be skipped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["flux", "flux_true_cfg", "flux2", "dit", "sd3", "wan", "z_image", "lumina2", "ltx2"])
def test_with_a_limit_of_nothing_the_bits_are_those_of_the_untouched_pipeline(name: str, rule: OnlineRule) -> None:
    pipe = shared(name)
    expected = plain(name)  # a first run leaves names of its own on the parts
    before = names(pipe)
    with accelerated(pipe, decided(pipe, rule, 0.0)):
        output = run(pipe, TINY[name].call(pipe), num_inference_steps=STEPS)
        found = report(pipe)
    assert torch.equal(output, expected)
    assert not any(row.predicted or row.failed_open for row in found.rows)
    assert found.computed == STEPS * BRANCHES[TINY[name].guidance]
    assert found.bytes_held == 0
    assert names(pipe) == before
    assert ours(pipe) == []


@pytest.mark.parametrize("rule", RULES)
def test_runs_repeat_themselves_and_leave_nothing_for_the_next(rule: OnlineRule) -> None:
    limit = 0.2 if rule == "drift" else 0.5
    one, first = played("flux", decided(shared("flux"), rule, limit))
    pipe = shared("flux")
    with accelerated(pipe, decided(pipe, rule, limit)):
        run(pipe, TINY["flux"].call(pipe), seed=7, num_inference_steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS, callback_on_step_end=interrupt)
        other = run(pipe, TINY["flux"].call(pipe), num_inference_steps=STEPS)
        again = report(pipe)
    assert torch.equal(one, other)
    assert [row.strip for row in first.rows] == [row.strip for row in again.rows]
    assert ours(pipe) == []


def interrupt(pipe: Any, i: int, t: Any, kept: Any) -> Any:
    if i == 4:
        raise KeyboardInterrupt
    return kept


def test_a_batch_shares_its_decisions() -> None:
    """The price of one decision for all: a sample is what its batch mates let it be. Said in the documentation."""
    pipe, call = shared("dit"), TINY["dit"].call(shared("dit"), batch=2)
    block = find_sites(pipe.transformer)[stacks(pipe)[0]][0]
    with heard(block, lambda given, value: first_output_like(given.main[0], value) - given.main[0]) as signals:
        with accelerated(pipe, decided(pipe, "first_block", 0.3)):
            run(pipe, call, seed=[0, 1], num_inference_steps=STEPS)
            found = strips(report(pipe), stacks(pipe)[0])
    assert signals[0].shape[0] == 4  # two samples, two branches
    assert found == [by_newest(signals, 0.3, identity)]
    assert found != [by_newest([signal[:1] for signal in signals], 0.3, identity)]


@pytest.mark.parametrize("rule", RULES)
def test_nan_in_the_state_computes(rule: OnlineRule) -> None:
    def spoil(pipe: Any, i: int, t: Any, kept: Any) -> Any:
        return {"latents": kept["latents"] * (float("nan") if i == 4 else 1.0)}

    pipe = shared("flux")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)
        _, found = played("flux", decided(pipe, rule), callback_on_step_end=spoil)
    (strip,) = strips(found, governed(pipe, rule))
    assert strip[5:] == "■" * (STEPS - 5)
    assert "·" in strip[:5]


def toy_schedule(rule: OnlineRule, limit: float = HUGE, sites: Sequence[str] = (), steps: int = 8) -> CacheSchedule:
    sites = sites or (["stack:blocks"] if rule in INSIDE else ["model"])
    plan = residual("#" + "." * (steps - 1))
    rules = Online(rule=rule, limit=np.full(steps, limit))
    denoiser = DenoiserPlan(sites=dict.fromkeys(sites, plan), online=rules)
    return CacheSchedule(steps=steps, denoisers={"transformer": denoiser})


@pytest.mark.parametrize("rule", ["first_block", "output_rate", "drift"])
def test_another_resolution_in_mid_run_is_computed_and_told(rule: OnlineRule) -> None:
    """And what was computed serves from there on: the newest output is the anchor. A guard changes no anchors."""
    pipe = loop()
    pipe.before = lambda i, x: torch.cat([x, x], dim=1) if i == 4 else x
    with accelerated(pipe, toy_schedule(rule)):
        with pytest.warns(FailedOpen, match="shape, dtype or device of the input changed"):
            pipe(noise())
        (strip,) = strips(report(pipe), "stack:blocks" if rule in INSIDE else "model")
        assert report(pipe).bytes_held == 0
    assert strip == {"first_block": "■···■···", "output_rate": "■■··■■··", "drift": "■···■■■■"}[rule]


@pytest.mark.parametrize("views", [True, False])
def test_a_loop_that_goes_back_begins_anew(views: bool) -> None:
    pipe = TwiceLoop(Net().requires_grad_(False), loop().scheduler)
    pipe.views = views
    pipe.set_progress_bar_config(disable=True)
    for rule in ("first_block", "output_rate"):
        with accelerated(pipe, toy_schedule(rule)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FailedOpen)
            pipe(noise())
            strip = strips(report(pipe), "stack:blocks" if rule in INSIDE else "model")[0]
        begins = "■■" if rule == "output_rate" else "■"
        # Where the denoiser is not given the noise scheduler's own timesteps, the second round's first step is known as
        # such when it is over; then nothing is left of what came before.
        again = begins if views else "■" + begins
        assert strip[:8] == begins + "·" * (8 - len(begins)), rule
        assert strip[8:] == again + "·" * (8 - len(again)), rule


class TwiceLoop(Loop):
    views = True

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int = 8) -> Tensor:
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            for _ in range(2):
                self.scheduler._step_index = None
                for t in self.scheduler.timesteps:
                    output = self.ask(x, t if self.views else t * 1, torch.tensor(0.1))
                    x = self.scheduler.step(output, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return x


def test_a_site_that_runs_before_the_deciding_block_is_computed() -> None:
    """A host that leaves the first block out."""
    pipe = loop()
    untouched = loop()
    pipe.transformer.left_out = untouched.transformer.left_out = (0,)
    with accelerated(pipe, toy_schedule("first_block")):
        with pytest.warns(FailedOpen, match="the block that decides did not run before it"):
            output = pipe(noise())
    assert torch.equal(output, untouched(noise()))


def test_of_what_cannot_be_told_apart_nothing_is_predicted() -> None:
    """Two inputs of a block have the shape of both outputs, and the host hands on copies."""
    two = Inputs((torch.ones(1, 3, 4),), {"text": torch.ones(1, 3, 4)})
    found = pair(two, (torch.ones(1, 3, 4), torch.ones(1, 3, 4)), {})
    assert found.unclear
    assert found.own == (None, None)


# --- which input goes with which output ------------------------------------------------------------------------------


@given(st.data())
def test_streams_find_their_outputs(data: st.DataObject) -> None:
    """By shape where shapes differ, by what was seen to flow where they do not; in any order, among other inputs."""
    count = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    inputs = [torch.zeros(2, n, 5) for n in lengths]
    order = data.draw(st.permutations(range(count)))
    outputs = [torch.ones_like(inputs[i]) for i in order]
    names = [MAIN, *(f"stream_{i}" for i in range(1, count))]
    others = {names[i]: inputs[i] for i in data.draw(st.permutations(range(1, count)))}
    others |= {"temb": torch.zeros(2, 5)}
    twins = {i for i in range(count) if lengths.count(lengths[i]) > 1}
    known = data.draw(st.sets(st.sampled_from(range(count))))
    flow = {names[i]: order.index(i) for i in known}
    found = pair(Inputs((inputs[0],), others), outputs, flow)
    x = found.x(Inputs((inputs[0],), others))
    for i in range(count):
        own = found.own[order.index(i)]
        if i in known or not twins - known:
            assert own is not None
            assert x[own] is inputs[i]
        elif own is not None:
            assert x[own].shape == inputs[i].shape
    # One unknown among twins follows from the others.
    groups = [{j for j in twins if lengths[j] == n} for n in set(lengths)]
    assert found.unclear == any(len(group - known) > 1 for group in groups)


# --- the guard -------------------------------------------------------------------------------------------------------


def guarded(pipe: Any, limit: float | Sequence[float], mask: str = "##..#..#....") -> CacheSchedule:
    timesteps = np.linspace(1.0, 0.1, len(mask))
    from diffcache.schedulers import Grid

    plan = extrapolated(Grid(timesteps), np.array([c == "#" for c in mask]), 1)
    return decided(pipe, "drift", limit, plan=plan)


def without_rule(schedule: CacheSchedule) -> CacheSchedule:
    sites = schedule.denoisers["transformer"].sites
    return CacheSchedule(steps=schedule.steps, denoisers={"transformer": DenoiserPlan(sites=sites)})


def drifts(name: str, schedule: CacheSchedule) -> list[np.ndarray]:
    """Relative change of the input since the newest planned step's, per branch [T], without a guard."""
    pipe, calls = shared(name), BRANCHES[TINY[name].guidance]
    compute = schedule.denoisers["transformer"].sites["model"].compute
    with denoised(pipe.transformer) as recorded:
        played(name, without_rule(schedule))
    found = []
    for branch in range(calls):
        xs = [x for x, _ in recorded[branch::calls]]
        newest = [max(np.flatnonzero(compute[: i + 1])) for i in range(len(xs))]
        found.append(np.array([mean(x - xs[a]) / mean(xs[a]) for x, a in zip(xs, newest, strict=True)]))
    return found


@pytest.mark.parametrize("name", ["flux", "dit", "wan"])
def test_a_guard_that_sees_nothing_unusual_changes_no_bit(name: str) -> None:
    pipe = shared(name)
    usual = np.max(drifts(name, guarded(pipe, HUGE)), axis=0)
    output, found = played(name, guarded(pipe, 1.001 * usual + 1e-9))
    assert torch.equal(output, played(name, without_rule(guarded(pipe, HUGE)))[0])
    assert sum(row.guarded for row in found.rows) == 0
    assert "guarded" not in str(found)


def test_a_guard_computes_where_the_input_has_moved_too_far_and_only_there() -> None:
    pipe = shared("flux")
    usual = drifts("flux", guarded(pipe, HUGE))[0]
    schedule = guarded(pipe, 1.001 * usual + 1e-9)

    def push(pipe: Any, i: int, t: Any, kept: Any) -> Any:
        return {"latents": kept["latents"] * (1.3 if i == 4 else 1.0)}

    with denoised(pipe.transformer) as calls:
        _, found = played("flux", schedule, callback_on_step_end=push)
    (row,) = found.rows
    assert row.strip == "■■··■■■■····"  # computed by plan: 0, 1, 4, 7; pushed after 4
    assert (row.computed, row.predicted, row.guarded, dict(row.failed_open)) == (4, 6, 2, {})
    assert found.computed == 6
    assert "guarded: the input had moved too far (2)" in str(found)
    assert "decided in the run by drift" in str(found)
    # What was computed beside the plan was used once: later predictions refer to the planned anchors.
    plan = schedule.denoisers["transformer"].sites["model"]
    for i in range(8, STEPS):
        expected = plan.weights[0, i, 0] * calls[7][1] + plan.weights[0, i, 1] * calls[4][1]
        np.testing.assert_allclose(calls[i][1], expected, rtol=1e-4, atol=1e-5)


def test_a_guarded_output_that_became_an_anchor_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import decide

    keep = decide.keep

    def keep_in_place_of_an_older_one(call: Any, site: str, inputs: Any, value: Any) -> None:
        keep(call, site, inputs, value)
        if call.step == 6:
            output = Output.of(value)
            call.state.store.put(call.key(site), 4, Anchor(output.kept(), (), signature(inputs.main)))

    monkeypatch.setattr(decide, "keep", keep_in_place_of_an_older_one)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_a_guard_computes_where_the_input_has_moved_too_far_and_only_there()


def test_a_guard_compares_with_the_newest_planned_step() -> None:
    """Not with a step that it computed itself: the output there is no anchor."""
    pipe = shared("flux")
    limits = np.full(STEPS, HUGE)
    limits[8] = 0
    with denoised(pipe.transformer) as calls:
        played("flux", guarded(pipe, limits))
    moved = mean(calls[9][0] - calls[7][0]) / mean(calls[7][0])
    for factor, strip in ((1.01, "■■··■··■■···"), (0.99, "■■··■··■■■··")):
        limits[9] = factor * moved
        assert strips(played("flux", guarded(pipe, limits))[1], "model") == [strip]


# --- schedules without a rule ----------------------------------------------------------------------------------------


def test_without_a_rule_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a schedule without an online rule was watched")

    for name in ("__init__", "decide", "answered"):
        monkeypatch.setattr(Watch, name, never)
    _, found = played("flux", "uniform:every=2")
    assert found.predicted == STEPS // 2
    assert found.online == {}
    assert "decided in the run" not in str(found)
    with pytest.raises(AssertionError, match="was watched"):
        played("flux", decided(shared("flux"), "drift"))


# --- Watch, by itself ------------------------------------------------------------------------------------------------


def watch(rule: OnlineRule, limit: float = 1.0, **options: Any) -> Watch:
    return Watch(Online(rule=rule, limit=np.full(99, limit), **options), Store(), "net", 0)


@given(
    st.lists(st.tuples(st.floats(0.25, 4.0), st.booleans()), min_size=1, max_size=20),
    st.sampled_from(["first_block", "modulated_input"]),
    st.floats(0.0, 3.0),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=200)
def test_a_watch_of_numbers_decides_as_a_plain_loop(
    calls: list[tuple[float, bool]], rule: OnlineRule, limit: float, most: int | None
) -> None:
    """Signals are single numbers, exact in float32 up to rounding; ties are left out."""
    watching, then, level, row = watch(rule, limit, most=most), None, 0.0, 0
    for step, (value, asked) in enumerate(calls):
        now = float(np.float32(value))
        verdict = watching.decide(step, asked, (torch.tensor([now]),))
        change = None if then is None else abs(now - then) / abs(then)
        level = (level if rule == "modulated_input" else 0.0) + (change or 0.0) * asked
        if abs(level - limit) < 1e-5:
            return
        predicted = asked and then is not None and level < limit and (most is None or row < most)
        assert verdict == (Verdict(predicted) if asked else None)
        row = row + 1 if predicted else 0
        level = level if predicted else 0.0
        if rule == "modulated_input" or not predicted:
            then = now


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_below_no_limit(rule: OnlineRule, bad: float) -> None:
    watching = watch(rule, 1e300, polynomial=np.array([0.0, 1.0]))
    for step, value in enumerate((1.0, 2.0)):
        watching.decide(step, False, (torch.tensor([value]),))
        watching.answered((torch.tensor([value]),), (torch.tensor([value]),))
    assert watching.decide(2, True, (torch.tensor([2.5]),)) == Verdict(True)
    assert watching.decide(3, True, (torch.tensor([bad]),)) == Verdict(False)


def test_a_signal_of_zeros_is_below_no_limit() -> None:
    for rule in ("first_block", "modulated_input", "drift"):
        watching = watch(rule, 1e300)
        watching.decide(0, False, (torch.zeros(3),))
        assert watching.decide(1, True, (torch.ones(3),)) == Verdict(False)


# --- what accelerate refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", INSIDE)
def test_rules_that_decide_inside_govern_stacks_alone(rule: OnlineRule) -> None:
    pipe = shared("flux")
    before = dicts(pipe)
    for site in ("model", "block:transformer_blocks.1"):
        with pytest.raises(
            BadOption, match=f"sites='{site}' was given. Allowed: stacks, under the online rule '{rule}'"
        ):
            accelerate(pipe, decided(pipe, rule, sites=[site]))
    assert dicts(pipe) == before


def test_a_block_without_a_normalisation_has_no_modulated_input() -> None:
    pipe = loop()
    with pytest.raises(UnsupportedModel, match=r"there is none in Block\. Use another rule"):
        accelerate(pipe, toy_schedule("modulated_input"))
    assert ours(pipe) == []


def test_a_normalisation_inside_a_compiled_graph_is_refused() -> None:
    pipe = fresh("flux")
    schedule = decided(pipe, "modulated_input")
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"lies inside 'transformer_blocks\.0', which is compiled"):
        accelerate(pipe, schedule)
    assert ours(pipe) == []


def test_blocks_that_are_compiled_one_by_one_can_decide_by_their_residual() -> None:
    pipe, other = loop(), loop()
    torch._dynamo.reset()
    for block in pipe.transformer.blocks:
        block.attn.calls = 0
        block.compile(backend="eager")
    with accelerated(pipe, toy_schedule("first_block", 0.3)), accelerated(other, toy_schedule("first_block", 0.3)):
        torch.testing.assert_close(pipe(noise()), other(noise()))
        assert strips(report(pipe), "stack:blocks") == strips(report(other), "stack:blocks")


# --- reports and estimates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["flux", "flux_true_cfg", "dit", "sd3", "wan"])
def test_an_estimate_is_the_most_that_can_be_gained_and_knows_the_memory(name: str, rule: OnlineRule) -> None:
    pipe = shared(name)
    schedule = decided(pipe, rule, 0.4)
    before = estimate(pipe, schedule, **{**TINY[name].call(pipe), "num_inference_steps": STEPS})
    _, found = played(name, schedule)
    assert before.online
    assert "or more, as the run decides" in str(before)
    assert before.cache_bytes == found.peak_bytes
    _, most = played(name, decided(pipe, rule, HUGE, plan=residual("#" + "." * (STEPS - 1))))
    if governed(pipe, rule) == "model":
        assert before.compute_fraction <= most.computed / (most.computed + most.predicted)
        assert before.compute_fraction <= found.computed / (found.computed + found.predicted)
    else:
        assert 1 / STEPS < before.compute_fraction < 1
    assert not estimate(pipe, "uniform:every=2", **TINY[name].call(pipe)).online


def test_an_estimate_counts_the_first_block_at_every_step() -> None:
    pipe = shared("flux")
    call = {**TINY["flux"].call(pipe), "num_inference_steps": STEPS}
    with_block = estimate(pipe, decided(pipe, "first_block"), **call).compute_fraction
    without = estimate(pipe, decided(pipe, "modulated_input"), **call).compute_fraction
    one_block = (with_block - without) * STEPS / (STEPS - 1)
    assert 0.05 < one_block < 0.5


def test_a_report_tells_what_was_decided() -> None:
    _, found = played("wan", decided(shared("wan"), "first_block", 0.3))
    rows = [row for row in found.rows if row.site == "stack:blocks"]
    for row in rows:
        assert (row.strip.count("■"), row.strip.count("·")) == (row.computed, row.predicted)
        assert row.strip in str(found)
    assert found.online == {"transformer": "first_block"}
    assert "transformer: decided in the run by first_block" in str(found)


# --- specs -----------------------------------------------------------------------------------------------------------


def test_rules_can_be_given_as_specs() -> None:
    pipe = shared("flux")
    for spec, schedule in (
        ("first_block:threshold=0.4", decided(pipe, "first_block", 0.4)),
        ("first_block:threshold=9,most=3", decided(pipe, "first_block", 9, most=3)),
        ("easycache:threshold=0.5,warmup=0", decided(pipe, "output_rate", 0.5)),
        ("easycache:threshold=0.5,warmup=4", decided(pipe, "output_rate", 0.5, plan=residual("####........"))),
    ):
        one, found = played("flux", spec)
        other, expected = played("flux", schedule)
        assert torch.equal(one, other)
        assert [row.strip for row in found.rows] == [row.strip for row in expected.rows]


def test_a_spec_of_first_block_means_stacks() -> None:
    assert parse_rule("first_block:threshold=0.1") == Rule("first_block", "stack", {"threshold": 0.1})
    assert parse_rule("first_block:threshold=0.1,sites=stack") == parse_rule("first_block:threshold=0.1")
    assert parse_rule(str(parse_rule("first_block"))) == parse_rule("first_block")
    assert parse_rule("easycache").granularity == "model"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("first_block:threshold=-1", "threshold=-1 was given. Allowed: a number, 0 or more"),
        ("first_block:threshold=nan", "threshold=nan"),
        ("first_block:threshold=low", "threshold='low'"),
        ("first_block:most=0", "most=0 was given. Allowed: a whole number, 1 or more"),
        ("easycache:warmup=-1", "warmup=-1"),
        ("easycache:warmup=2.5", "warmup=2.5"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_at_once(spec: str, says: str) -> None:
    with pytest.raises(BadOption) as refused:
        parse_rule(spec)
    assert says in str(refused.value)


def test_a_late_start_begins_with_computed_steps() -> None:
    pipe = shared("flux_img2img")
    call = TINY["flux_img2img"].call(pipe)
    with accelerated(pipe, "easycache:threshold=99,warmup=3"):
        run(pipe, call, num_inference_steps=STEPS)
        (strip,) = strips(report(pipe), "model")
    assert strip == "■■■" + "·" * (len(strip) - 3)
    with accelerated(pipe, "first_block:threshold=99"):
        run(pipe, call, num_inference_steps=STEPS)
        strip = strips(report(pipe), stacks(pipe)[0])[0]
    assert strip == "■" + "·" * (len(strip) - 1)
