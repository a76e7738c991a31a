"""Options of a criterion: declared by its functions, checked before a run, and held by schedule files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from online import decided, denoised, played, strips
from pipelines import shared
from planted_criteria import tensors, toy
from probes import dicts
from small_loop import STEPS as TOY_STEPS
from small_loop import loop, noise

from diffcache import CacheSchedule, accelerate, accelerated, estimate, report
from diffcache.documents import container
from diffcache.errors import BadOption, DocumentError, UnknownName
from diffcache.executor import Store, criteria
from diffcache.executor.criteria import Memory

AVERAGE = "planted_of_tests:Average"


@pytest.fixture
def averaged(planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a criterion with options, whose file a folder of criteria holds. It has no address, so files hold it.

    A package can add its own folder to the path of this one, as any package with a ``__path__`` allows.
    """
    (tmp_path / "average_of_tests.py").write_text(
        "from planted_of_tests import Average\nABOUT, change = Average.ABOUT, Average.change\n"
        "observe, check = Average.observe, Average.check\n"
    )
    monkeypatch.setattr(criteria, "__path__", [*criteria.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{criteria.__name__}.average_of_tests", raising=False)
    return "average_of_tests"


def averages(inputs: Sequence[np.ndarray], limit: float, gamma: float, power: int = 1) -> str:
    """The strip of the planted criterion ``Average``."""
    strip, newest, average = "■", inputs[0], 0.0
    for now in inputs[1:]:
        average = average * gamma + np.abs(now - newest).mean() / np.abs(newest).mean() * (1 - gamma)
        strip += "·" if average**power < limit else "■"
        newest = now if strip[-1] == "■" else newest
    return strip


def test_its_options_decide_after_the_schedule_is_saved_and_loaded(averaged: str, tmp_path: Path) -> None:
    pipe = shared("flux")
    strips_of = {}
    for options in ({}, {"gamma": 0.9}, {"gamma": 0.9, "power": 2}):
        made = decided(pipe, averaged, 0.12, sites=["model"], options=options)
        path = made.save(tmp_path / "schedule.safetensors")
        assert CacheSchedule.load(path) == made
        with denoised(pipe.transformer) as calls:
            _, found = played("flux", CacheSchedule.load(path))
        (strip,) = strips(found, "model")
        wanted = averages([x for x, _ in calls], 0.12, **{"gamma": 0.5, **options})
        assert strip == wanted
        strips_of[str(options)] = strip
    assert len(set(strips_of.values())) == 3, "every option decides alike: nothing was compared"


@pytest.mark.usefixtures("planted")
def test_options_of_another_package_reach_every_function() -> None:
    """``observe`` and ``change`` share an option, and the estimate and the run accept it."""
    pipe = loop()
    schedule = toy(AVERAGE, gamma=0.75)
    assert estimate(pipe, schedule, x=noise()).online
    with accelerated(pipe, schedule):
        pipe(noise())
        assert report(pipe).predicted == TOY_STEPS - 1
    bound = criteria.load(AVERAGE, {"gamma": 0.75})
    memory = Memory(Store(), "net", 0)
    bound.observe(memory, tensors(1), tensors(2))
    assert float(memory.numbers["gamma"]) == 0.75
    assert bound.options == {"gamma": 0.75, "norm": "l1", "power": 1}


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        (AVERAGE, {"gama": 0.5}, "no option of the criterion 'planted_of_tests:Average' called 'gama'"),
        (AVERAGE, {"gama": 0.5}, "Known: gamma, norm, power. Did you mean 'gamma'?"),
        (AVERAGE, {"gamma": "much"}, "gamma='much' was given. Allowed: a number, for the criterion"),
        (AVERAGE, {"power": 1.5}, "power=1.5 was given. Allowed: a whole number"),
        (AVERAGE, {"norm": 2}, "norm=2 was given. Allowed: text"),
        (AVERAGE, {"gamma": 1}, "gamma=1 was given. Allowed: 0 or more, below 1"),
        ("drift", {"gamma": 0.5}, "no option of the criterion 'drift' called 'gamma'. Known: none."),
        ("planted_of_tests:Optionless", {}, "its option 'gamma' has no default that is a number or text"),
        ("planted_of_tests:Torn", {}, "its option 'gamma' has the defaults 0.5 and 0.25"),
    ],
)
def test_options_that_it_does_not_have_are_refused_before_the_first_step(
    rule: str, options: dict[str, Any], words: str
) -> None:
    pipe = loop()
    before = dicts(pipe)
    for refused in (
        lambda: accelerate(pipe, toy(rule, **options)),
        lambda: estimate(pipe, toy(rule, **options), x=noise()),
    ):
        with pytest.raises((BadOption, UnknownName)) as error:
            refused()
        assert words in str(error.value)
    assert pipe.transformer.seen == []
    assert dicts(pipe) == before


@pytest.mark.parametrize("value", [None, True, [1.0], np.ones(2), float("nan"), 2**53 + 1, "", "\ud800"])
def test_values_that_no_file_holds_are_refused(value: Any) -> None:
    with pytest.raises(DocumentError, match="options/gamma"):
        toy("drift", gamma=value)


def test_equal_options_have_equal_bytes() -> None:
    one, other = toy("drift", gamma=1, beta=-0.0), toy("drift", beta=0, gamma=np.float32(1.0))
    assert one == other
    assert one._pack(library="") == other._pack(library="")


def test_a_file_without_options_is_of_the_version_before(averaged: str) -> None:
    """Its bytes and its digest are those that libraries without options write, and those libraries read it."""
    for schedule, version, there in ((toy("drift"), 2, False), (toy(averaged, gamma=0.25), 3, True)):
        tree, _ = container.unpack("x", schedule.to_bytes())
        assert tree["version"] == version
        assert ("options" in tree["denoisers"]["transformer"]["online"]) is there


def test_a_file_of_the_version_before_holds_no_options(averaged: str) -> None:
    tree, arrays = container.unpack("x", toy(averaged, gamma=0.25).to_bytes())
    with pytest.raises(DocumentError, match="old: field 'transformer/online/options': the field is unknown"):
        CacheSchedule.from_bytes(container.pack("x", tree | {"version": 2}, arrays), where="old")
