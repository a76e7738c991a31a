"""Decisions of the rules that decide in the run, derived again from recorded tensors.

Each comparison has a twin at the end of its part that plants a fault and sees the comparison fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from online import HUGE, INSIDE, RULES, STEPS, decided, denoised, governed, mean, played, residual, stacks, strips
from pipelines import TINY, run, shared
from torch import Tensor, nn

from diffcache import accelerated, report
from diffcache.documents import Online
from diffcache.executor import Report, Store
from diffcache.executor.decider import Decider, Verdict
from diffcache.executor.pairing import Inputs, reader
from diffcache.host import find_sites
from diffcache.patch import layer

# --- what is recorded during a run -----------------------------------------------------------------------------------


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


def test_a_sum_that_forgets_to_begin_anew_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Decider.decide

    def never_anew(self: Decider, step: int, asked: bool, now: Any) -> Any:
        level = self._level
        verdict = decide(self, step, asked, now)
        self._level = max(self._level, level)
        return verdict

    monkeypatch.setattr(Decider, "decide", never_anew)
    for test in (test_the_output_s_rate_decides, lambda name: test_the_modulated_input_decides(name, None)):
        with pytest.raises(AssertionError):
            test("flux")


def test_branches_that_share_a_signal_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor.state import RunState

    decider = RunState.decider
    monkeypatch.setattr(RunState, "decider", lambda self, denoiser, branch: decider(self, denoiser, 0))
    with pytest.raises(AssertionError):
        test_the_first_block_s_residual_decides("wan", None)


# --- Decider, by itself ----------------------------------------------------------------------------------------------


def decider(rule: str, limit: float = 1.0, **options: Any) -> Decider:
    return Decider(Online(rule=rule, limit=np.full(99, limit), **options), Store(), "net", 0)


@given(
    st.lists(st.tuples(st.floats(0.25, 4.0), st.booleans()), min_size=1, max_size=20),
    st.sampled_from(["first_block", "modulated_input"]),
    st.floats(0.0, 3.0),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=200)
def test_a_watch_of_numbers_decides_as_a_plain_loop(
    calls: list[tuple[float, bool]], rule: str, limit: float, most: int | None
) -> None:
    """Signals are single numbers, exact in float32 up to rounding; ties are left out."""
    watching, then, level, row = decider(rule, limit, most=most), None, 0.0, 0
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
def test_what_is_not_finite_is_below_no_limit(rule: str, bad: float) -> None:
    watching = decider(rule, 1e300, polynomial=np.array([0.0, 1.0]))
    for step, value in enumerate((1.0, 2.0)):
        watching.decide(step, False, (torch.tensor([value]),))
        watching.observe((torch.tensor([value]),), (torch.tensor([value]),))
    assert watching.decide(2, True, (torch.tensor([2.5]),)) == Verdict(True)
    assert watching.decide(3, True, (torch.tensor([bad]),)) == Verdict(False)


def test_a_signal_of_zeros_is_below_no_limit() -> None:
    for rule in ("first_block", "modulated_input", "drift"):
        watching = decider(rule, 1e300)
        watching.decide(0, False, (torch.zeros(3),))
        assert watching.decide(1, True, (torch.ones(3),)) == Verdict(False)
