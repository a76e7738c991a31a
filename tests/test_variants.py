"""Further pipelines, and further ways of calling one: each is cached at every granularity that it has, or the test says
what went wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines import TINY, VARIANTS, fresh, shared
from probes import outcome

from diffcache.executor import arounds, decide
from diffcache.patch import Layers
from diffcache.store import Store


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore::diffcache.executor.FailedOpen")  # the outcome names it, with its reason
def test_a_variant(name: str) -> None:
    assert outcome(shared(name), VARIANTS[name]) == "yes"


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arounds, "visit", lambda call, site, inputs, compute: (compute()[0] * 1.001,))


def no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "guess", lambda call, site, inputs: None)


def holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "clear", lambda self: None)
    monkeypatch.setattr(Store, "drop", lambda self, key, step: None)


def leaves_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layers, "leave_if_empty", lambda self: None)


FAULTS = {"wrong": wrong, "no effect": no_effect, "holds": holds, "leaves traces": leaves_traces}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_said(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = fresh("flux")
    assert outcome(pipe, TINY["flux"]) == "yes"
    FAULTS[fault](monkeypatch)
    assert outcome(pipe, TINY["flux"]).startswith(fault)
