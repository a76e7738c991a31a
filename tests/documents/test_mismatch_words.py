"""A refusal names the settings that differ, as far as the schedule holds them, and what hides a site."""

from __future__ import annotations

import json

import pytest
import torch
from documents import profile
from probes import bound, hold
from small_loop import MASK, loop, noise

from diffcache import CacheSchedule, accelerate, accelerated, estimate, host, plan
from diffcache.documents import DenoiserPlan, NoiseSchedulerId
from diffcache.documents.document import configurations
from diffcache.errors import BadOption, ScheduleMismatch, UnknownName

pytestmark = pytest.mark.fast


def known(pipe: object, schedule: CacheSchedule) -> CacheSchedule:
    return schedule.with_provenance(**host.configurations(scheduler=pipe.scheduler, transformer=pipe.transformer))  # type: ignore[attr-defined]


def test_the_settings_of_a_noise_scheduler_that_differ_are_named() -> None:
    pipe = loop()
    schedule = known(pipe, bound(pipe, hold(MASK)))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0, use_karras_sigmas=True)
    with pytest.raises(ScheduleMismatch, match=r"shift was 1\.0, is 3\.0; use_karras_sigmas was False, is True\. Rest"):
        accelerate(pipe, schedule)


def test_the_parameters_of_a_network_that_differ_are_named() -> None:
    pipe = loop()
    schedule = known(pipe, bound(pipe, hold(MASK)))
    pipe.transformer.blocks[1].attn.mix = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(ScheduleMismatch, match=r"blocks\.1\.attn\.mix\.bias was \[3\], is 'not set'\. Make"):
        accelerate(pipe, schedule)


@pytest.mark.parametrize("text", [None, "{}", "[" * 10**5, '{"shift": 2.0}'])
def test_without_the_configuration_that_belongs_to_the_digest_nothing_is_made_up(text: str | None) -> None:
    pipe = loop()
    schedule = bound(pipe, hold(MASK))
    if text is not None:
        schedule = schedule.with_provenance(**{"config/scheduler": text})
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    with pytest.raises(ScheduleMismatch, match="which setting differs is not known, for the schedule"):
        accelerate(pipe, schedule)


def test_a_plan_takes_configurations_from_the_profile_and_does_not_print_them() -> None:
    pipe = loop()
    kept = host.configurations(scheduler=pipe.scheduler)
    assert json.loads(kept["config/scheduler"])["shift"] == 1.0
    measured = profile(provenance={"prompts": "sixteen", **kept})
    made = plan(measured, "uniform", 2)
    assert configurations(made.provenance) == kept
    assert "config/" not in str(made)
    assert "config/" not in str(measured)
    assert "prompts: sixteen" in str(measured)


def test_a_configuration_as_long_as_a_document_is_left_out() -> None:
    wide = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(2000)))
    assert host.configurations(transformer=wide) == {}


@pytest.mark.parametrize("granularity", ["block", "stack", "sublayer"])
def test_compiling_is_named_where_it_hides_the_sites_of_a_rule(granularity: str) -> None:
    pipe = loop()
    pipe.transformer = torch.compile(pipe.transformer)
    for act in (accelerate, lambda p, rule: estimate(p, rule, x=noise())):
        with pytest.raises(BadOption, match=r"one graph by torch\.compile, which hides the sites") as refused:
            act(pipe, f"uniform:every=2,sites={granularity}")
        assert str(refused.value).startswith(f"sites={granularity!r} was given. Allowed: 'model': 'transformer' was")
        assert "compile_repeated_blocks" in str(refused.value)


def test_compiling_is_named_where_it_hides_the_sites_of_a_schedule() -> None:
    pipe = loop()
    schedule = bound(pipe, hold(MASK), "block")
    free = CacheSchedule(
        steps=8, denoisers={"transformer": DenoiserPlan(sites=schedule.denoisers["transformer"].sites)}
    )
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(UnknownName, match=r"no site in Net called 'block:blocks\.0'.* compiled as one graph by torch"):
        accelerate(pipe, free)


def test_a_loop_without_noise_scheduler_is_called_so() -> None:
    other = NoiseSchedulerId(class_name="Clock", config_digest="0" * 64)
    pipe = loop()
    schedule = CacheSchedule(steps=8, denoisers=bound(pipe, hold(MASK)).denoisers, noise_scheduler=other)
    assert "Clock" not in str(schedule)
    assert "noise scheduler none" in str(schedule)
    with pytest.raises(ScheduleMismatch, match=r"of the schedule: none .*; of this loop: Flow") as told:
        accelerate(pipe, schedule)
    assert "Clock" not in str(told.value)
    network = loop().transformer.eval()
    counted = CacheSchedule(steps=8, denoisers={"network": DenoiserPlan(sites={"model": hold(MASK)})})
    from diffcache import trajectory

    with accelerated(network, counted), pytest.raises(ScheduleMismatch, match=r"8 steps; this run takes 1\. Pass"):
        with trajectory(network, [1.0]):
            network(hidden_states=noise(), timestep=torch.tensor(5.0), prompt=torch.tensor(0.1))
