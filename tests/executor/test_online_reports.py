"""Reports and estimates of schedules whose rules decide in the run."""

from __future__ import annotations

import pytest
from online import HUGE, RULES, STEPS, decided, governed, played, residual
from pipelines import TINY, shared

from diffcache import estimate


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["flux", "flux_true_cfg", "dit", "sd3", "wan"])
def test_an_estimate_is_the_most_that_can_be_gained_and_knows_the_memory(name: str, rule: str) -> None:
    pipe = shared(name)
    schedule = decided(pipe, rule, 0.4)
    before = estimate(pipe, schedule, **{**TINY[name].call(pipe), "num_inference_steps": STEPS})
    _, found = played(name, schedule)
    assert before.online
    assert "or more, as the run decides" in str(before)
    assert before.cache_bytes == found.peak_bytes
    _, most = played(name, decided(pipe, rule, HUGE, plan=residual("#" + "." * (STEPS - 1))))
    if governed(pipe, rule) == "model":
        assert before.compute_fraction <= most.computed / (most.computed + most.predicted)
        assert before.compute_fraction <= found.computed / (found.computed + found.predicted)
    else:
        assert 1 / STEPS < before.compute_fraction < 1
    assert not estimate(pipe, "uniform:every=2", **TINY[name].call(pipe)).online


def test_an_estimate_counts_the_first_block_at_every_step() -> None:
    pipe = shared("flux")
    call = {**TINY["flux"].call(pipe), "num_inference_steps": STEPS}
    with_block = estimate(pipe, decided(pipe, "first_block"), **call).compute_fraction
    without = estimate(pipe, decided(pipe, "modulated_input"), **call).compute_fraction
    one_block = (with_block - without) * STEPS / (STEPS - 1)
    assert 0.05 < one_block < 0.5


def test_a_report_states_what_was_decided() -> None:
    _, found = played("wan", decided(shared("wan"), "first_block", 0.3))
    rows = [row for row in found.rows if row.site == "stack:blocks"]
    for row in rows:
        assert (row.strip.count("■"), row.strip.count("·")) == (row.computed, row.predicted)
        assert row.strip in str(found)
    assert found.online == {"transformer": "first_block"}
    assert "transformer: decided in the run by first_block" in str(found)
