"""A bound pipeline has the networks, the sites and the executor of what a caller passed."""

from __future__ import annotations

import pytest
from small_loop import STEPS, loop, noise
from torch import nn

from diffcache import accelerated, report
from diffcache.errors import UnsupportedModel
from diffcache.executor.bound import Bound
from diffcache.host import MARK


def test_a_pipeline_is_bound_to_itself() -> None:
    pipe = loop()
    bound = Bound.of(pipe)
    assert bound.pipe is bound.loop is pipe
    assert bound.denoisers == {"transformer": pipe.transformer}
    assert bound.sites["transformer"]["model"] == (pipe.transformer,)
    assert bound.sites["transformer"]["stack:blocks"] == tuple(pipe.transformer.blocks)


def test_the_executor_is_there_while_the_pipeline_is_accelerated() -> None:
    pipe = loop()
    bound = Bound.of(pipe)
    assert bound.executor is None
    with accelerated(pipe, "uniform:every=2"):
        assert bound.executor is not None
        assert bound.executor is Bound.of(pipe).executor is vars(pipe)[MARK].executor
    assert bound.executor is None
    assert not bound.detach()


def test_a_network_is_bound_to_the_loop_around_it_on_request_alone() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel):
        _ = Bound.of(network).denoisers
    assert Bound.of(network, bare=True).denoisers == {"network": network}
    with accelerated(network, "full"):
        assert Bound.of(network).executor is Bound.of(network, bare=True).executor is not None


@pytest.mark.parametrize("anything", [None, 3, "a pipeline"], ids=repr)
def test_anything_is_bound_and_refused_when_its_networks_are_asked_for(anything: object) -> None:
    bound = Bound.of(anything)
    assert bound.executor is None
    assert not bound.detach()
    with pytest.raises(UnsupportedModel):
        _ = bound.sites


def test_a_report_holds_the_schedule_that_a_rule_made() -> None:
    pipe = loop()
    with accelerated(pipe, "uniform:every=2"):
        assert report(pipe).schedule is None
        pipe(noise())
        found = report(pipe)
    assert found.schedule is not None
    assert found.schedule.steps == STEPS
    assert found.schedule.denoisers["transformer"].sites["model"].compute.sum() == found.computed
    assert "schedule" not in repr(found)
