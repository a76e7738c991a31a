"""Accelerated modular pipelines, and guiders, which say anew at every step which branches there are."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.utils.import_utils import is_kornia_available
from pipelines.modular import GUIDED, MODULAR, run, shared
from probes import copied, leaf_calls, names, offered

from diffcache import accelerated, report

PLACES = ("model", "stack", "block", "sublayer")
EVERYWHERE = [(name, place) for name in MODULAR for place in (PLACES[:2] if name.startswith("sdxl") else PLACES)]


def counted(pipe: Any, name: str) -> tuple[torch.Tensor, int]:
    """The latents, and how many parts without parts ran for them."""
    with leaf_calls(pipe, MODULAR[name].tiny.denoisers) as calls:
        latents = run(pipe, MODULAR[name].call(pipe))
    return latents, sum(calls.values())


def failed_open(pipe: Any) -> dict[int, int]:
    """Branch -> how many of its predictions were computed instead, at one site."""
    return {row.branch: sum(row.failed_open.values()) for row in report(pipe).rows if row.failed_open}


@pytest.mark.parametrize(("name", "place"), EVERYWHERE)
def test_a_modular_pipeline_skips_and_is_as_before_afterwards(name: str, place: str) -> None:
    pipe = shared(name)
    (untouched, whole), found = counted(pipe, name), names(pipe)
    assert place in offered(pipe)
    with accelerated(pipe, f"full:sites={place}"):
        assert torch.equal(run(pipe, MODULAR[name].call(pipe)), untouched)
    with accelerated(pipe, f"uniform:every=2,sites={place}"):
        fast, calls = counted(pipe, name)
        assert not torch.equal(fast, untouched)
        assert bool(fast.isfinite().all())
        assert calls == whole / 2 if place == "model" else calls < whole
        assert not failed_open(pipe)
        assert report(pipe).bytes_held == 0
        assert torch.equal(run(pipe, MODULAR[name].call(pipe)), fast)
    assert names(pipe) == found
    assert torch.equal(run(pipe, MODULAR[name].call(pipe)), untouched)


# --- guiders ---------------------------------------------------------------------------------------------------------

late = pytest.mark.filterwarnings("ignore:.*an anchor is missing")  # a branch that begins at a step to be predicted


def guided(kind: str) -> tuple[Any, dict[str, Any]]:
    """A new pipeline with this guider, and a call of it."""
    if kind == "frequency-decoupled" and not is_kornia_available():
        pytest.skip("FrequencyDecoupledGuidance needs kornia")
    modular = MODULAR[GUIDED[kind].pipeline]
    pipe = modular.build(GUIDED[kind].make(modular.layers))
    return pipe, modular.call(pipe)


@contextmanager
def reuse_by_hand(denoiser: Any, steps: Sequence[str]) -> Iterator[list[int]]:
    """Every second step, each branch returns what it returned last when it was computed, if it ever was.

    Who knows what the guider asks for at every step needs neither it nor the noise scheduler. Yields the numbers of
    the forwards that were computed.
    """
    order = [(step, branch) for step, branches in enumerate(steps) for branch in branches]
    inner, kept, made, computed = denoiser.forward, {}, 0, []

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        (step, branch), made = order[made], made + 1
        if step % 2 and branch in kept:
            return copied(kept[branch])
        computed.append(made)
        value = inner(*args, **kwargs)
        if step % 2 == 0:
            kept[branch] = copied(value)
        return value

    denoiser.__dict__["forward"] = forward
    try:
        yield computed
    finally:
        del denoiser.__dict__["forward"]
    assert made == len(order)


@late
@pytest.mark.parametrize("kind", GUIDED)
def test_every_branch_of_a_guider_has_anchors_of_its_own(kind: str) -> None:
    pipe, call = guided(kind)
    with reuse_by_hand(getattr(pipe, MODULAR[GUIDED[kind].pipeline].tiny.denoisers[0]), GUIDED[kind].steps) as computed:
        expected = run(pipe, call)
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(run(pipe, call), expected)
        counts = report(pipe).rows
        assert sum(row.predicted for row in counts) == sum(map(len, GUIDED[kind].steps)) - len(computed)
        assert torch.equal(run(pipe, call), expected)


@late
@pytest.mark.parametrize("kind", GUIDED)
def test_a_guided_pipeline_is_as_before_when_all_is_computed_and_afterwards(kind: str) -> None:
    pipe, call = guided(kind)
    name = GUIDED[kind].pipeline
    untouched, whole = counted(pipe, name)
    found = names(pipe)
    for place in offered(pipe):
        with accelerated(pipe, f"full:sites={place}"):
            full, calls = counted(pipe, name)
            assert torch.equal(full, untouched), place
            assert calls == whole
        with accelerated(pipe, f"uniform:every=2,sites={place}"):
            fast, calls = counted(pipe, name)
            assert calls < whole
            assert not torch.equal(fast, untouched)
            assert torch.equal(run(pipe, call), fast), place
            assert report(pipe).bytes_held == 0
    assert names(pipe) == found
    assert torch.equal(run(pipe, call), untouched)
