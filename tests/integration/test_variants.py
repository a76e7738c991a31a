"""Further pipelines, and further ways of calling one: each is cached at every granularity that it has, or the test says
what went wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pipelines import LIMITS, STEPS, TINY, VARIANTS, Tiny, fresh, shared
from probes import outcome

from diffcache.errors import DiffCacheError
from diffcache.executor import FailedOpen, Store, wrappers
from diffcache.executor import site as decide
from diffcache.patch import Layers

SHORT = 4  # steps: twice a computed step and a predicted one
# Their guidance, or the blocks that run, change in mid-run; or a list has an entry for each step.
IN_FULL_LENGTH = (
    "ace_step_guided_at_first",
    "ideogram4",
    "motif_video_also_without_a_block",
    "sd3_skipped_layers",
    "z_image_truncated",
)


def shortened(tiny: Tiny) -> Tiny:
    """Return the same call with fewer steps, unless it needs all of them or starts late."""
    if tiny.name in IN_FULL_LENGTH or tiny.steps < STEPS:
        return tiny

    def call(pipe: Any, batch: int = 1) -> dict[str, Any]:
        made = tiny.call(pipe, batch)
        return made | {"num_inference_steps": SHORT} if made.get("num_inference_steps") == STEPS else made

    return dataclasses.replace(tiny, call=call)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")  # the outcome names it, with its reason
def test_a_variant(name: str) -> None:
    assert outcome(shared(name), shortened(VARIANTS[name])) == "yes"


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_reported(name: str) -> None:
    """By an error before the first step, or by a warning."""
    tiny, says = LIMITS[name]
    pipe = fresh(name)
    with pytest.raises(DiffCacheError) if says == "UnsupportedModel" else pytest.warns(FailedOpen):
        assert outcome(pipe, tiny).startswith(says)


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "run_site", lambda call, site, inputs, compute: (compute()[0] * 1.001,))


def no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "try_predict", lambda call, site, inputs: None)


def holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "clear", lambda self: None)
    monkeypatch.setattr(Store, "drop", lambda self, key, step: None)


def leaves_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layers, "leave_if_empty", lambda self: None)


FAULTS = {"wrong": wrong, "no effect": no_effect, "holds": holds, "leaves traces": leaves_traces}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_reported(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = fresh("flux")
    tiny = shortened(TINY["flux"])
    assert outcome(pipe, tiny) == "yes"
    FAULTS[fault](monkeypatch)
    assert outcome(pipe, tiny).startswith(fault)
