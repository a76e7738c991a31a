"""A run that ends with an exception leaves nothing to the next one: no anchors, no step count, no memory."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipelines import TINY, fresh, run, shared
from probes import names, ours
from torch import Tensor

from diffcache import accelerate, accelerated, report, restore
from diffcache.executor import Executor, FailedOpen, Store
from diffcache.host import LoopWatcher

SPEC = "taylorseer:every=2,order=1"
WITH_CALLBACK = ("flux", "flux_img2img", "sd3_heun", "sd15", "wan", "cogvideox", "ltx2")
AT = (0, 1, 3)  # steps: the first, a predicted one, one in mid-run
# `for t in pipe.progress_bar(timesteps)`: without callbacks; what breaks them is the denoiser or the noise scheduler.
ITERATING = ("dit", "ddpm", "ddim")


class StopHere(Exception):  # noqa: N818, what a user raises in a callback is not an error
    """What a user raises to stop a run."""


def stop_at(step: int) -> dict[str, Any]:
    def stop(_pipe: Any, index: int, _timestep: Tensor, _inputs: Any) -> dict[str, Any]:
        if index == step:
            raise StopHere
        return {}

    return {"callback_on_step_end": stop}


@contextmanager
def failing(target: Any, method: str, at: int) -> Iterator[None]:
    """The method of this one object raises at its call number ``at``."""
    inner, calls = getattr(target, method), 0
    found = target.__dict__.get(method)

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > at:
            raise StopHere
        return inner(*args, **kwargs)

    target.__dict__[method] = fail
    try:
        yield
    finally:
        if found is None:
            del target.__dict__[method]
        else:
            target.__dict__[method] = found


def never_interrupted(name: str, **over: Any) -> Tensor:
    with accelerated(shared(name), SPEC) as pipe:
        return run(pipe, TINY[name].call(pipe, **over))


@pytest.mark.parametrize("step", AT)
@pytest.mark.parametrize("name", WITH_CALLBACK)
def test_a_run_after_one_that_a_callback_stopped_is_like_one_never_interrupted(name: str, step: int) -> None:
    pipe, tiny = fresh(name), TINY[name]
    run(pipe, tiny.call(pipe))
    before = names(pipe)
    with accelerated(pipe, SPEC):
        with pytest.raises(StopHere):
            run(pipe, tiny.call(pipe), **stop_at(step))
        assert report(pipe).bytes_held == 0
        assert sorted(vars(pipe.scheduler)) == before["scheduler"]
        assert torch.equal(run(pipe, tiny.call(pipe)), never_interrupted(name))
        with pytest.raises(StopHere):
            run(pipe, tiny.call(pipe), **stop_at(step))
        assert torch.equal(run(pipe, tiny.call(pipe, batch=2)), never_interrupted(name, batch=2))
    assert ours(pipe) == []


@pytest.mark.parametrize("name", ["flux", "sd15", "wan"])
def test_a_run_of_another_size_after_an_interrupted_one_is_like_one_never_interrupted(name: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    larger = {"height": 2 * tiny.call(pipe)["height"], "num_inference_steps": 5}
    with accelerated(shared(name), SPEC):
        expected = run(shared(name), tiny.call(shared(name)), **larger)
    with accelerated(pipe, SPEC):
        with pytest.raises(StopHere):
            run(pipe, tiny.call(pipe), **stop_at(1))
        assert torch.equal(run(pipe, tiny.call(pipe), **larger), expected)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("name", [*ITERATING, "flux", "wan22"])
@pytest.mark.parametrize("culprit", ["denoiser", "scheduler"])
@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")  # wan22: a second denoiser without anchors
def test_a_run_after_one_in_which_a_part_failed_is_like_one_never_interrupted(name: str, at: int, culprit: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    run(pipe, tiny.call(pipe))
    before = names(pipe)
    with accelerated(pipe, SPEC):
        part = pipe.scheduler if culprit == "scheduler" else next(iter(getattr(pipe, tiny.denoisers[0]).children()))
        method, calls = ("step", at) if culprit == "scheduler" else ("forward", at // 2)
        with failing(part, method, calls), pytest.raises(StopHere):
            run(pipe, tiny.call(pipe))
        assert report(pipe).bytes_held == 0
        assert sorted(vars(pipe.scheduler)) == before["scheduler"]
        assert torch.equal(run(pipe, tiny.call(pipe)), never_interrupted(name))
        assert torch.equal(run(pipe, tiny.call(pipe, batch=2)), never_interrupted(name, batch=2))


@pytest.mark.parametrize("name", ["flux", "dit", "ddpm"])
def test_a_living_exception_does_not_keep_the_run_alive(name: str) -> None:
    """Tracebacks hold the frames of the loop; the loop is over all the same, also for who shares the denoiser."""
    pipe, tiny = fresh(name), TINY[name]
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    plain = run(shared(name), tiny.call(shared(name)))
    with accelerated(pipe, SPEC):
        gc.disable()
        try:
            with failing(pipe.scheduler, "step", 3), pytest.raises(StopHere) as alive:
                run(pipe, tiny.call(pipe))
            assert alive.value.__traceback__ is not None
            assert report(pipe).bytes_held == 0
            assert "step" not in vars(pipe.scheduler)
            assert torch.equal(run(other, tiny.call(other)), plain)
            assert torch.equal(run(pipe, tiny.call(pipe)), never_interrupted(name))
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_restore_while_the_exception_lives_leaves_nothing(name: str) -> None:
    pipe, tiny = fresh(name), TINY[name]
    run(pipe, tiny.call(pipe))
    before = names(pipe)
    accelerate(pipe, SPEC)
    try:
        with failing(pipe.scheduler, "step", 2):
            run(pipe, tiny.call(pipe))
    except StopHere:
        kept = sys.exc_info()
        store = vars(pipe)["_diffcache"].executor.last.store
        restore(pipe)
        assert store.bytes == 0
        assert ours(pipe) == []
    assert kept[2] is not None
    assert names(pipe) == before
    assert torch.equal(run(pipe, tiny.call(pipe)), run(shared(name), tiny.call(shared(name))))


def test_a_loop_left_by_break_is_over() -> None:
    pipe = fresh("ddim")
    pipe.scheduler.set_timesteps(6)
    with accelerated(pipe, SPEC):
        for _ in pipe.progress_bar(pipe.scheduler.timesteps):
            assert "step" in vars(pipe.scheduler)
            break
        assert "step" not in vars(pipe.scheduler)


def test_an_interrupt_in_another_thread_ends_that_threads_run() -> None:
    pipe, seen = fresh("flux"), []
    with accelerated(pipe, SPEC):

        def stopped() -> None:
            with pytest.raises(StopHere):
                run(pipe, TINY["flux"].call(pipe), **stop_at(2))
            seen.append("step" in vars(pipe.scheduler))

        thread = threading.Thread(target=stopped)
        thread.start()
        thread.join()
        assert seen == [False]
        assert report(pipe).bytes_held == 0
        assert torch.equal(run(pipe, TINY["flux"].call(pipe)), never_interrupted("flux"))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd15", "wan", "z_image", "ltx2", "stable_audio"])
def test_nothing_is_held_after_a_run_and_something_was_during_it(name: str) -> None:
    with accelerated(shared(name), SPEC) as pipe:
        assert report(pipe).bytes_held == report(pipe).peak_bytes == 0
        run(pipe, TINY[name].call(pipe))
        assert report(pipe).bytes_held == 0
        assert report(pipe).peak_bytes > 0
        store = vars(pipe)["_diffcache"].executor.last.store
        assert not any(store._anchors.values())


def test_what_is_held_in_mid_run_is_what_the_report_says() -> None:
    held = []

    def look(pipe: Any, _step: int, _timestep: Tensor, _inputs: Any) -> dict[str, Any]:
        held.append(report(pipe).bytes_held)
        return {}

    with accelerated(shared("flux"), "uniform:every=2") as pipe:
        output = run(pipe, TINY["flux"].call(pipe), callback_on_step_end=look)
        one = output.numel() * output.element_size()
        assert held == [one, 0, one, 0, one, 0]
        assert report(pipe).peak_bytes == one


@pytest.mark.parametrize("name", ["flux", "ddpm"])
def test_anchors_of_an_interrupted_run_are_freed_though_its_exception_lives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, kept = Store.put, []

    def put_and_watch(self: Store, key: Any, step: int, anchor: Any) -> None:
        kept.extend(map(weakref.ref, (*anchor.kept, *anchor.x)))
        put(self, key, step, anchor)

    monkeypatch.setattr(Store, "put", put_and_watch)
    pipe = fresh(name)
    with accelerated(pipe, "uniform:every=6"):
        with failing(pipe.scheduler, "step", 2), pytest.raises(StopHere) as alive:
            run(pipe, TINY[name].call(pipe))
        assert alive.value.__traceback__ is not None
        assert [ref() for ref in kept] == [None]


# --- the comparisons can fail ----------------------------------------------------------------------------------------


def test_anchors_kept_over_an_interruption_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "clear", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_run_after_one_that_a_callback_stopped_is_like_one_never_interrupted("flux", 0)


@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")
def test_a_run_that_is_never_closed_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopWatcher, "close", lambda self, run=None: None)
    with pytest.raises(AssertionError):
        test_a_living_exception_does_not_keep_the_run_alive("flux")


def test_a_step_count_carried_over_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, last = Executor.loop_began, []

    def resume(self: Executor, run: Any) -> None:
        begin(self, run)
        run.index = last[-1].index if last else run.index
        last.append(run)

    monkeypatch.setattr(Executor, "loop_began", resume)
    with pytest.raises((AssertionError, FailedOpen)):
        test_a_run_after_one_that_a_callback_stopped_is_like_one_never_interrupted("flux", 1)
