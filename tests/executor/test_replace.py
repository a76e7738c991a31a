"""One schedule takes the place of another, or the old one stays on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pipelines import TINY, fresh, run
from probes import bound, dicts, hold, names, ours

from diffcache import accelerate, accelerated, report, restore
from diffcache.errors import AlreadyAccelerated, BadOption, DiffCacheError, ScheduleMismatch, UnknownName
from diffcache.executor import Executor
from diffcache.schedulers import Rule

pytestmark = pytest.mark.fast

CALL = TINY["flux"].call(None)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = fresh("flux")
    run(made, CALL)
    return made


def result(pipe: Any, schedule: Any) -> torch.Tensor:
    with accelerated(pipe, schedule):
        return run(pipe, CALL)


def test_a_schedule_replaces_another(pipe: Any) -> None:
    plain, found = run(pipe, CALL), names(pipe)
    specs = ["uniform:every=2", "uniform:every=3,sites=block", "first_block:threshold=0.5", "uniform:every=3"]
    wanted = [result(pipe, spec) for spec in specs]
    assert len({tuple(one.flatten().tolist()) for one in [plain, *wanted]}) > 3
    for spec, one in zip(specs, wanted, strict=True):
        assert accelerate(pipe, spec, replace=True) is pipe  # the first on a pipeline without a schedule
        assert torch.equal(run(pipe, CALL), one)
        assert report(pipe).runs == 1
    restore(pipe)
    assert torch.equal(run(pipe, CALL), plain)
    assert names(pipe) == found
    assert not ours(pipe)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("unifrom:every=2", UnknownName),
        ("uniform:every=0", BadOption),
        (Rule("uniform", granularity="layers"), BadOption),
        ("gone.safetensors", DiffCacheError),
        ({28: "full", 0: "full"}, BadOption),
        ({}, BadOption),
    ],
)
def test_if_the_new_one_is_refused_the_old_one_stays_on(pipe: Any, asked: Any, error: type[Exception]) -> None:
    wanted = result(pipe, "uniform:every=2")
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
        before = dicts(pipe)
        with pytest.raises(error):
            accelerate(pipe, asked, replace=True)
        assert dicts(pipe) == before
        assert torch.equal(run(pipe, CALL), wanted)
        assert report(pipe).runs == 2
    assert not ours(pipe)


def test_a_schedule_of_another_model_does_not_replace(pipe: Any) -> None:
    other = bound(pipe, hold("#.#.#."))
    denoiser = dataclasses.replace(other.denoisers["transformer"], class_name="OtherModel")
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(ScheduleMismatch, match="OtherModel"):
            accelerate(pipe, dataclasses.replace(other, denoisers={"transformer": denoiser}), replace=True)
        run(pipe, CALL)
        assert report(pipe).predicted


def test_if_attaching_fails_half_way_the_old_one_is_on_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = result(pipe, "uniform:every=2")
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
        attach = Executor.attach

        def fails(self: Executor) -> None:
            if str(self.source).startswith("uniform:every=3"):
                self._patches[0].apply()
                self.detach()
                raise KeyboardInterrupt
            attach(self)

        with monkeypatch.context() as patched:
            patched.setattr(Executor, "attach", fails)
            with pytest.raises(KeyboardInterrupt):
                accelerate(pipe, "uniform:every=3,sites=block", replace=True)
        assert torch.equal(run(pipe, CALL), wanted)
        assert report(pipe).runs == 2
    assert not ours(pipe)


def test_without_replace_it_is_refused_and_the_error_names_it(pipe: Any) -> None:
    with accelerated(pipe, {6: "uniform:every=2", 9: "full"}):
        with pytest.raises(AlreadyAccelerated, match=r"by schedules of 6, 9 steps\. .* or pass replace=True"):
            accelerate(pipe, "full")
        with pytest.raises(AlreadyAccelerated), accelerated(pipe, "full"):
            pass
        run(pipe, CALL)
        assert report(pipe).predicted


def test_a_block_puts_the_former_schedule_back(pipe: Any) -> None:
    plain = run(pipe, CALL)
    half, third = result(pipe, "uniform:every=2"), result(pipe, "uniform:every=3")
    accelerate(pipe, "uniform:every=2")
    try:
        assert torch.equal(run(pipe, CALL), half)
        with accelerated(pipe, "uniform:every=3", replace=True):
            assert torch.equal(run(pipe, CALL), third)
            assert report(pipe).runs == 1
            with accelerated(pipe, "full", replace=True):
                assert torch.equal(run(pipe, CALL), plain)
            assert torch.equal(run(pipe, CALL), third)
        assert torch.equal(run(pipe, CALL), half)
        assert report(pipe).runs == 2  # counts go on
        with pytest.raises(ZeroDivisionError), accelerated(pipe, "full", replace=True):
            raise ZeroDivisionError
        assert torch.equal(run(pipe, CALL), half)
    finally:
        restore(pipe)
    assert not ours(pipe)
    with accelerated(pipe, "uniform:every=3", replace=True):
        assert torch.equal(run(pipe, CALL), third)
    assert not ours(pipe)
