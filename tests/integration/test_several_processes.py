"""Pipelines that several processes run: each its own prompts, or all of them one denoiser, cut along its tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ContextParallelConfig
from pipelines import TINY, fresh, run, shared
from probes import bound, hold, names, offered
from processes import in_processes
from torch.distributed.tensor.debug import CommDebugMode

from diffcache import accelerate, accelerated, measure, optimize, report
from diffcache.errors import DiffCacheError, UnsupportedModel

SPLIT = ("flux", "wan", "qwen_image")  # guidance distilled; apart, video, cut inside the model; apart, image
SHORT = 4  # steps: twice a computed step and a predicted one


def alternating(pipe: Any, name: str, granularity: str, steps: int | None = None) -> Any:
    return bound(pipe, hold(np.arange(steps or TINY[name].steps) % 2 == 0), granularity)


def short_call(pipe: Any, name: str) -> dict[str, Any]:
    return TINY[name].call(pipe) | {"num_inference_steps": SHORT}


def together(pipe: Any) -> None:
    """Both processes run the transformer, each on half of its tokens."""
    torch.accelerator.device_count = lambda: 1  # diffusers numbers accelerators; here is none
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How many collective operations ran since the block began."""
    with CommDebugMode() as found:
        yield lambda: int(found.get_total_counts())


def test_each_process_with_its_own_prompts_comes_to_what_one_alone_does(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        pipe = fresh("sd3")
        with accelerated(pipe, alternating(pipe, "sd3", "block")), counted() as collectives:
            mine = run(pipe, TINY["sd3"].call(pipe), seed=rank)
            return mine.numpy(), report(pipe).bytes_held, collectives()

    pipe = fresh("sd3")
    with accelerated(pipe, alternating(pipe, "sd3", "block")):
        alone = [run(pipe, TINY["sd3"].call(pipe), seed=rank).numpy() for rank in range(2)]
    found = in_processes(2, job, tmp_path)
    for (mine, held, collectives), expected in zip(found, alone, strict=True):
        assert np.array_equal(mine, expected)
        assert held == collectives == 0
    assert not np.array_equal(alone[0], alone[1])


def test_a_process_that_fails_does_not_block_processes_with_other_prompts(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        pipe = fresh("flux")

        def callback(_pipe: Any, step: int, _timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
            if rank == 1 and step == 2:
                raise MemoryError("of this process")
            return found

        with accelerated(pipe, alternating(pipe, "flux", "model")):
            return bool(run(pipe, TINY["flux"].call(pipe), callback_on_step_end=callback).isfinite().all())

    assert in_processes(2, job, tmp_path) == [True, "MemoryError: of this process"]


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("first", ["parallel", "accelerate"])
def test_a_denoiser_cut_along_its_tokens(name: str, first: str, tmp_path: Path) -> None:
    """Bit-equal to the untouched parallel pipeline, equal to one process up to rounding, no collective of ours."""
    places = offered(shared(name))

    def cut(rank: int) -> Any:
        pipe = fresh(name)
        before = names(pipe)
        together(pipe)
        with counted() as collectives:
            untouched = run(pipe, short_call(pipe, name))
            needed = collectives()
        found = {}
        for granularity in places:
            with accelerated(pipe, f"full:sites={granularity}"), counted() as collectives:
                assert torch.equal(run(pipe, short_call(pipe, name)), untouched), granularity
                assert collectives() == needed, granularity
            with accelerated(pipe, alternating(pipe, name, granularity, SHORT)):
                found[granularity] = fast_run(pipe, granularity, needed)
        assert before.keys() == names(pipe).keys()
        return found

    def cut_later(rank: int) -> Any:
        found = {}
        for granularity in places:
            pipe = fresh(name)
            before = names(pipe)
            accelerate(pipe, alternating(pipe, name, granularity, SHORT))
            together(pipe)
            found[granularity] = fast_run(pipe, granularity, 10**6)
            assert before.keys() == names(pipe).keys()
        return found

    def fast_run(pipe: Any, granularity: str, needed: int) -> np.ndarray:
        with counted() as collectives:
            fast = run(pipe, short_call(pipe, name))
            assert 0 < collectives() < needed, granularity
        rows = report(pipe).rows
        assert sum(row.predicted for row in rows) > 0, granularity
        assert not any(row.failed_open for row in rows), granularity
        return fast.numpy()  # type: ignore[no-any-return]

    one, other = in_processes(2, cut if first == "parallel" else cut_later, tmp_path)
    assert isinstance(one, dict), one
    assert isinstance(other, dict), other
    assert tuple(one) == tuple(other) == places
    pipe = shared(name)
    for granularity in places:
        assert np.array_equal(one[granularity], other[granularity]), granularity
        with accelerated(pipe, alternating(pipe, name, granularity, SHORT)):
            alone = run(pipe, short_call(pipe, name))
        torch.testing.assert_close(torch.from_numpy(one[granularity]), alone, rtol=1e-4, atol=1e-4)


def test_processes_that_wait_for_each_other_end_together_when_one_fails(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        pipe = fresh("flux")
        together(pipe)

        def callback(_pipe: Any, step: int, _timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
            if rank == 1 and step == 1:
                raise MemoryError("of this process")
            return found

        accelerate(pipe, alternating(pipe, "flux", "block"))
        try:
            run(pipe, TINY["flux"].call(pipe), callback_on_step_end=callback)
        except RuntimeError:  # what gloo says when the other has gone
            return report(pipe).bytes_held
        return "finished"

    assert in_processes(2, job, tmp_path) == [0, "MemoryError: of this process"]


def test_a_process_that_alone_finds_a_value_not_finite_decides_like_the_others(tmp_path: Path) -> None:
    """It would compute, and wait for the other, which predicts."""

    def job(rank: int) -> Any:
        pipe = fresh("flux")
        together(pipe)
        block = pipe.transformer.transformer_blocks[1]
        if rank == 1:
            block.register_forward_hook(lambda _m, _a, out: tuple(t * float("nan") for t in out))
        with warnings.catch_warnings(record=True) as told, accelerated(pipe, alternating(pipe, "flux", "block")):
            warnings.simplefilter("always")
            run(pipe, TINY["flux"].call(pipe))
            return sum(row.predicted for row in report(pipe).rows), any("suspect" in str(w.message) for w in told)

    one, other = in_processes(2, job, tmp_path)
    assert one[0] == other[0] > 0
    assert other[1]


def test_decisions_that_would_differ_between_processes_are_refused(tmp_path: Path) -> None:
    rule = "firstblockcache:threshold=0.1"

    def job(rank: int) -> Any:
        pipe = fresh("flux")
        accelerate(pipe, rule)
        together(pipe)
        with pytest.raises(UnsupportedModel, match="wait for each other"):
            run(pipe, TINY["flux"].call(pipe))
        other = fresh("flux")
        together(other)
        with pytest.raises(UnsupportedModel, match="wait for each other"):
            accelerate(other, rule)
        return "_diffcache" in vars(other)

    assert in_processes(2, job, tmp_path) == [False, False]


def test_decisions_from_the_whole_input_are_the_same_in_all_processes(tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        pipe = fresh("flux")
        together(pipe)
        with accelerated(pipe, "easycache:threshold=0.5,warmup=2"):
            found = run(pipe, TINY["flux"].call(pipe), num_inference_steps=12)
            return found.numpy(), report(pipe).predicted

    one, other = in_processes(2, job, tmp_path)
    assert one[1] == other[1] > 0
    assert np.array_equal(one[0], other[0])


@pytest.mark.parametrize(
    "what", [lambda pipe, call: measure(pipe, [call]), lambda pipe, call: optimize(pipe, [call], 3)]
)
def test_what_calibrates_asks_for_one_process(what: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        pipe = fresh("flux")
        together(pipe)
        with pytest.raises(DiffCacheError, match="before enable_parallelism"):
            what(pipe, TINY["flux"].call(pipe))
        return names(pipe) == names(pipe)

    assert in_processes(2, job, tmp_path) == [True, True]
