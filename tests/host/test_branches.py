"""Branches of guidance are identified by their names or their conditioning, and are never mixed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import TINY, fresh, run
from pipelines.parts import TEXT
from probes import bound, hold
from torch import Tensor, nn

import diffcache
from diffcache import CacheSchedule, accelerated, report
from diffcache.documents import DenoiserPlan, Guidance
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.executor import FailedOpen
from diffcache.host.branches import Branches, recognised

pytestmark = pytest.mark.fast

STEPS = 12
TIMES = torch.linspace(1000.0, 1.0, STEPS)
COND, UNCOND = torch.full((1, 40, 2), 5.0), torch.full((1, 40, 2), -5.0)


class Net(nn.Module):
    """Answers with its condition, plus a little of its time: which branch an output is of shows in its sign."""

    def forward(self, x: Tensor, timestep: Any, condition: Any) -> Tensor:
        mean = condition.mean() if isinstance(condition, Tensor) else torch.tensor(float(condition))
        time = 0.0 if isinstance(timestep, str) else float(torch.as_tensor(timestep).flatten()[0])
        return x * 0 + mean + time / 10000


Time = Callable[[int], Any]
ADDRESS: Time = lambda i: TIMES[i].expand(2)  # noqa: E731
VALUE: Time = lambda i: torch.full((2,), float(TIMES[i]))  # noqa: E731
NUMBER: Time = lambda i: float(TIMES[i])  # noqa: E731
SCALED: Time = lambda i: torch.full((2,), float(TIMES[i]) / 1000)  # noqa: E731
NO_TIME: Time = lambda i: "at some time"  # noqa: E731


def loop(
    net: nn.Module,
    asked: Callable[[int], str],
    *,
    branches: int = 2,
    time: Time = ADDRESS,
    cond: Callable[[], Any] = lambda: COND,
    uncond: Callable[[], Any] = lambda: UNCOND,
    named: bool = False,
) -> list[tuple[int, str, float]]:
    """Run a loop that asks, at step i, for the branches ``asked(i)``: a text of c (cond), u (uncond), t (a tile of
    cond). Returns (step, branch, error of the output against the full run's)."""
    full, found = Net(), []
    x = torch.zeros(2, 3)
    with torch.no_grad(), diffcache.trajectory(net, TIMES, branches=branches):
        for i in range(STEPS):
            for n, which in enumerate(asked(i)):
                given = uncond() if which == "u" else cond()
                with diffcache.branch(f"{which} {n}" if which == "t" else which) if named else nullcontext():
                    output = net(x, time(i), given)
                truth = full(x, time(i), given)
                found.append((i, which, float((output - truth).abs().max())))
    return found


def worst(found: list[tuple[int, str, float]]) -> float:
    return max(error for *_, error in found)


NEAR = 0.05  # what outputs move by within a few steps; between branches they differ by 10


def ends_midway(i: int) -> str:
    return "uc" if i < 7 else "c"


PATTERNS: dict[str, Callable[[int], str]] = {
    "uncond first, guidance ends": ends_midway,
    "cond first, guidance ends": lambda i: "cu" if i < 7 else "c",
    "guidance begins later, uncond first": lambda i: "c" if i < 5 else "uc",
    "within an interval": lambda i: "uc" if 3 <= i < 8 else "c",
    "the order changes": lambda i: "uc" if i % 2 else "cu",
    "every third step without": lambda i: "c" if i % 3 == 2 else "uc",
    "first one, then the other": lambda i: "u" if i < 6 else "c",
}


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_named_branches_are_predicted_from_their_own_outputs_in_any_pattern(pattern: str, every: int) -> None:
    net = Net()
    with accelerated(net, f"taylorseer:every={every},order=1"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)  # a branch that was left out at a computed step has no anchor
        found = loop(net, PATTERNS[pattern], named=True)
        assert report(net).predicted > 0
    assert worst(found) < NEAR


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "tensors": (lambda: COND, lambda: UNCOND),
    "numbers": (lambda: 5.0, lambda: -5.0),
    "small tensors made anew": (lambda: COND[:, :2].clone(), lambda: UNCOND[:, :2].clone()),
}
CLOCKS = {"address": ADDRESS, "value": VALUE, "number": NUMBER, "scaled": SCALED, "none": NO_TIME}


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_branches_without_names_are_never_mixed(pattern: str, kind: str, clock: str) -> None:
    """By their conditioning; or computed in full, with a warning; or refused."""
    net = Net()
    cond, uncond = KINDS[kind]
    with accelerated(net, "uniform:every=2"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)
        try:
            found = loop(net, PATTERNS[pattern], time=CLOCKS[clock], cond=cond, uncond=uncond)
        except UnsupportedModel:
            return
        rows = report(net).rows
    assert worst(found) < NEAR
    assert sum(row.computed + row.predicted + sum(row.failed_open.values()) for row in rows) == len(found)


@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p not in ("the order changes", "first one, then the other")]
)
def test_branches_that_nothing_identifies_are_refused_where_they_may_be_mixed(pattern: str) -> None:
    """Large tensors made anew for each forward. A change of their order alone shows nowhere."""
    net = Net()
    with accelerated(net, "uniform:every=2"), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            found = loop(net, PATTERNS[pattern], cond=COND.clone, uncond=UNCOND.clone)
        except UnsupportedModel:
            return
    assert worst(found) < NEAR


def test_guidance_that_ends_midway_is_computed_where_it_ends_and_said() -> None:
    net = Net()
    with accelerated(net, "uniform:every=2"), pytest.warns(FailedOpen, match="changed in number or order"):
        found = loop(net, ends_midway)
    assert worst(found) < NEAR


def test_branches_in_their_ordinary_order_are_predicted_as_before() -> None:
    net = Net()
    with accelerated(net, "uniform:every=2"), warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(net, lambda i: "uc")
        rows = report(net).rows
        loop(net, lambda i: "uc", cond=COND.clone, uncond=UNCOND.clone, time=NO_TIME)
        assert report(net).rows == rows
    assert {(row.branch, row.computed, row.predicted) for row in rows} == {(0, 6, 6), (1, 6, 6)}


@pytest.mark.filterwarnings("ignore:network/model:diffcache.FailedOpen")
def test_numbers_of_forwards_that_only_add_up_are_refused() -> None:
    numbers = [1, 1, 1, 3, 3, 3, 3, 3, 3, 1, 1, 1]
    assert sum(numbers) == 2 * STEPS
    net = Net()
    with accelerated(net, "uniform:every=2"):
        for time in (ADDRESS, VALUE, NUMBER):
            with pytest.raises(UnsupportedModel, match=r"2 call\(s\) of the network at each of 12 timesteps"):
                loop(net, lambda i: "ccc"[: numbers[i]], time=time)
        with pytest.warns(FailedOpen, match="different times"):
            assert worst(loop(net, lambda i: "ccc"[: numbers[i]], time=SCALED)) < NEAR


def test_more_forwards_than_expected_are_refused_at_the_first_extra_one() -> None:
    net = Net()
    made: list[int] = []
    with accelerated(net, "uniform:every=2"), pytest.raises(UnsupportedModel, match="calls it once more"):
        loop(net, lambda i: (made.append(i), "ucu")[1])
    assert made == [0]


def test_named_tiles_of_a_step_have_separate_anchors() -> None:
    net = Net()
    with accelerated(net, "uniform:every=2"):
        found = loop(net, lambda i: "ttu", named=True)
        rows = report(net).rows
    assert worst(found) < NEAR
    assert {(row.branch, row.computed, row.predicted) for row in rows} == {(b, 6, 6) for b in range(3)}


def test_coefficients_go_with_the_names_of_the_branches_that_they_were_fitted_to() -> None:
    """In a run whose branches come in another order, and in one that has a branch more."""
    scale = np.ones((2, STEPS))
    scale[1] = 1.5
    plan = hold([i % 2 == 0 for i in range(STEPS)], 2, scale=scale)
    guidance = Guidance(mode="separate", branches=2)
    schedule = CacheSchedule(steps=STEPS, denoisers={"network": DenoiserPlan(sites={"model": plan})}, guidance=guidance)
    net = Net()
    for names, scaled in (['["c", "u"]', "u"], ['["u", "c"]', "c"]):
        with accelerated(net, schedule.with_provenance(**{"branch names": names})):
            found = loop(net, lambda i: "uc" if i % 4 < 2 else "cu", named=True)
        assert {which for _, which, error in found if error > 1} == {scaled}
    with accelerated(net, schedule), pytest.warns(FailedOpen, match="no coefficients for this branch"):
        found = loop(net, lambda i: "cu" if i < 2 else "cut", named=True)
    assert max(error for _, which, error in found if which == "t") < NEAR


def test_a_fitted_schedule_holds_the_names_of_its_branches() -> None:
    pipe = fresh("wan")
    call = {**TINY["wan"].call(pipe), "generator": torch.Generator().manual_seed(0)}
    schedule = diffcache.optimize(pipe, [call], 3, time_limit_s=0)
    assert schedule.provenance["branch names"] == '["cond", "uncond"]'


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_branch_needs_a_name(name: Any) -> None:
    with pytest.raises(BadOption, match="name"), diffcache.branch(name):
        pass


def test_a_branch_without_a_trajectory_changes_nothing() -> None:
    with diffcache.branch("cond"):
        assert torch.equal(Net()(torch.zeros(2, 3), 1.0, COND), Net()(torch.zeros(2, 3), 1.0, COND))


# --- pipelines -------------------------------------------------------------------------------------------------------


def reordered(pipe: Any, order: Callable[[int], list[str]], opens: bool) -> Any:
    """A Wan pipeline's loop, whose branches come as ``order`` says at each step; ``opens``: in a cache context."""

    def call() -> list[tuple[int, str, Tensor]]:
        found = []
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, 3, 4, 4, generator=generator)
        words = {n: torch.randn(1, 5, TEXT, generator=generator) * 3 for n in ("cond", "uncond")}
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad(), pipe.progress_bar(total=8) as bar:
            for i, t in enumerate(pipe.scheduler.timesteps):
                made = {}
                for name in order(i):
                    with pipe.transformer.cache_context(name) if opens else nullcontext():
                        text = words[name] if opens else words[name].clone()
                        made[name] = pipe.transformer(x, t.expand(1), text, return_dict=False)[0]
                    found.append((i, name, made[name]))
                x = pipe.scheduler.step(made["cond"], t, x, return_dict=False)[0]
                bar.update()
        pipe.maybe_free_model_hooks()
        return found

    return call


WAN_ORDERS: dict[str, Callable[[int], list[str]]] = {
    "alternating": lambda i: ["cond", "uncond"] if i % 3 else ["uncond", "cond"],
    "interval": lambda i: ["uncond", "cond"] if 2 <= i < 5 else ["cond"],
    "tiles": lambda i: ["uncond", "cond", "cond"],
}


@pytest.mark.parametrize("order", WAN_ORDERS)
def test_branches_are_identified_by_the_cache_context_that_the_pipeline_opens(order: str) -> None:
    pipe = fresh("wan")
    call = reordered(pipe, WAN_ORDERS[order], opens=True)
    full = call()
    before = set(vars(pipe.transformer))
    with accelerated(pipe, "uniform:every=2"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FailedOpen)
        fast = call()
        assert report(pipe).predicted > 0
    predicted = 0
    for n, (step, name, output) in enumerate(fast):
        alike = [(s, other) for s, other, earlier in fast[:n] if s < step and torch.equal(earlier, output)]
        assert all(other == name for _, other in alike)
        predicted += bool(alike)
    assert predicted == sum(step % 2 == 1 and name in WAN_ORDERS[order](step - 1) for step, name, _ in full)
    assert set(vars(pipe.transformer)) == before


def test_tiles_of_one_name_whose_number_changes_are_refused_where_they_were_predicted() -> None:
    pipe = fresh("wan")
    call = reordered(pipe, lambda i: ["cond"] * (2 if i < 3 else 1), opens=True)
    with accelerated(pipe, "uniform:every=2"), pytest.raises(UnsupportedModel, match="number of times in step 3"):
        call()


def test_calls_that_come_and_go_without_a_name_are_refused_where_they_were_predicted() -> None:
    pipe = fresh("wan")
    call = reordered(pipe, lambda i: ["uncond", "cond"] if i < 3 else ["cond"], opens=False)
    with (
        accelerated(pipe, "uniform:every=2"),
        pytest.raises(UnsupportedModel, match="another number of times in step 3"),
    ):
        call()
    call = reordered(pipe, lambda i: ["uncond", "cond"] if i < 4 else ["cond"], opens=False)
    with accelerated(pipe, "uniform:every=2"), pytest.warns(FailedOpen, match="changed in number or order"):
        call()


def test_the_names_that_wan_opens_are_numbered_in_the_order_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fresh("wan")
    with accelerated(pipe, "uniform:every=2"):
        named = run(pipe, TINY["wan"].call(pipe))
    monkeypatch.setattr(diffcache.host.LoopWatcher, "branch", lambda self, denoiser: "")
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(run(pipe, TINY["wan"].call(pipe)), named)


def test_a_batch_that_halves_is_not_split_into_branches_that_it_does_not_hold() -> None:
    """Two samples, guided in one batch of four: where guidance ends, two samples are no two branches."""
    from small_loop import loop as small
    from small_loop import noise

    pipe = small("batched")
    pipe.ask = (lambda ask: lambda x, t, p: ask(x[:2], t, p[:2]).repeat(2, 1, 1) if t < 500 else ask(x, t, p))(pipe.ask)  # type: ignore[method-assign]
    schedule = bound(pipe, hold("#.#.#.#.", 2), guidance=Guidance(mode="batched", branches=2))
    with accelerated(pipe, schedule), pytest.warns(FailedOpen, match="another number of branches|input changed"):
        pipe(noise())


def test_times_on_a_device_are_compared_when_the_run_is_over() -> None:
    for counted, times, disagree in (
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [9, 9, 5, 5], False),
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [9, 5, 5, 5], True),  # the first step had one forward
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [9, 9, 9, 5], True),  # it had three
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [0.9, 0.9, 0.5, 0.5], False),  # times that are no timesteps
    ):
        run = diffcache.host.LoopRun(None, torch.tensor([9.0, 5.0, 1.0]), 0, 0)
        run.unread = [(*place, torch.tensor([float(t)])) for place, t in zip(counted, times, strict=True)]
        assert run.times_disagree() is disagree


# --- the bookkeeping -------------------------------------------------------------------------------------------------


def test_what_changes_at_every_step_identifies_nothing() -> None:
    told = Branches()
    for step in range(6):
        for n in range(2):
            forward = told.forward("net", step, "", lambda step=step: {"sigma": float(step), "one": 1})  # type: ignore[misc]
            assert (forward.branch, forward.moved, forward.changed) == (n, False, None)
            assert forward.unsure or step == 0


def test_a_condition_that_is_replaced_is_noticed() -> None:
    told, moved = Branches(), []
    a, b = torch.zeros(100), torch.zeros(100)
    for step, tensor in enumerate([a, a, a, b, b]):
        conditions = {"c": recognised(tensor)}
        moved.append(told.forward("net", step, "", lambda given=conditions: given).moved)  # type: ignore[misc]
    assert moved == [False, False, False, True, False]


def test_conditions_are_not_kept_alive() -> None:
    told, tensors = Branches(), [torch.zeros(100)]
    told.forward("net", 0, "", lambda: {"c": recognised(tensors[0])})
    gone = weakref.ref(tensors[0])
    tensors.clear()
    assert gone() is None
