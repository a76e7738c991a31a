"""What ``estimate`` says before a run is what ``report`` counts after it."""

from __future__ import annotations

import pipelines
import pytest
import torch
from online import decided
from probes import dicts

from diffcache import accelerated, estimate, report
from diffcache.errors import BadOption
from diffcache.executor import cost

SPECS = ["full", "uniform:every=3", "taylorseer:every=3,order=1"]
INNER = [f"uniform:every=2,sites={g}" for g in ("stack", "block", "sublayer")]


@pytest.mark.parametrize("spec", SPECS + INNER)
@pytest.mark.parametrize("name", ["flux", "flux_true_cfg", "sd3", "wan", "dit"])
def test_cache_bytes_are_known_before_the_run(name, spec):
    pipe = pipelines.shared(name)
    call = pipelines.TINY[name].call(pipe)
    before = estimate(pipe, spec, **call)
    with accelerated(pipe, spec):
        pipelines.run(pipe, call)
        after = report(pipe)
    assert before.cache_bytes == after.peak_bytes


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sdxl", "flux_img2img"])
def test_the_fraction_of_work_is_the_fraction_of_forwards_when_whole_forwards_are_skipped(name):
    pipe = pipelines.shared(name)
    call = pipelines.TINY[name].call(pipe)
    before = estimate(pipe, "uniform:every=2", **call)
    with accelerated(pipe, "uniform:every=2"):
        pipelines.run(pipe, call)
        after = report(pipe)
    assert before.compute_fraction == pytest.approx(after.computed / (after.computed + after.predicted))
    assert before.gain == pytest.approx(1 / before.compute_fraction)


def test_inner_sites_save_less_than_the_whole_model():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe)
    fractions = [
        estimate(pipe, f"uniform:every=2,sites={g}", **call).compute_fraction for g in ("model", "stack", "sublayer")
    ]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.5
    assert fractions[-1] < 1


def test_an_estimate_without_gain_states_it():
    pipe = pipelines.shared("flux")
    said = str(estimate(pipe, "full", **pipelines.TINY["flux"].call(pipe)))
    assert said == "no gain expected: nothing is skipped, all 6 steps are computed"


def test_estimating_leaves_generators_and_pipeline_as_they_were():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe)
    plain = pipelines.run(pipe, call)
    found = dict(pipe.__dict__), dict(pipe.transformer.__dict__), dict(pipe.scheduler.__dict__).keys()
    generator = torch.Generator().manual_seed(3)
    state, world = generator.get_state(), torch.get_rng_state()
    estimate(pipe, "uniform:every=2", **(call | {"generator": generator}))
    assert torch.equal(state, generator.get_state())
    assert torch.equal(world, torch.get_rng_state())
    assert (dict(pipe.__dict__), dict(pipe.transformer.__dict__), dict(pipe.scheduler.__dict__).keys()) == found
    assert torch.equal(plain, pipelines.run(pipe, call))


@pytest.mark.parametrize("rule", ["first_block", "output_rate"])
def test_a_rule_that_does_not_fire_in_the_first_steps_is_not_praised(rule):
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe) | {"num_inference_steps": 12}
    found = estimate(pipe, decided(pipe, rule, 1e-9), **call)
    assert found.online
    assert (found.asked, found.predicted) == (4, 0)
    assert str(found).startswith("no gain seen: the rule predicted none of the 4 forwards that it was asked about")
    assert "faster" not in str(found)


def test_a_rule_that_fires_gets_a_range():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe) | {"num_inference_steps": 12}
    found = estimate(pipe, decided(pipe, "first_block", 1e9), **call)
    assert (found.asked, found.predicted) == (4, 4)
    assert f"between no gain and {found.gain:.2f}x faster" in str(found)
    assert "predicted 4 of the 4 forwards" in str(found)


def test_steps_at_which_a_rule_may_not_predict_are_counted_as_computed():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe) | {"num_inference_steps": 12}
    none = estimate(pipe, decided(pipe, "output_rate", 0.0), **call)
    assert none.compute_fraction == 1
    assert str(none).startswith("no gain expected")
    assert estimate(pipe, decided(pipe, "output_rate", 1e9, most=2), **call).compute_fraction == pytest.approx(4 / 12)
    late = [0.0] * 10 + [1e9] * 2
    found = estimate(pipe, decided(pipe, "output_rate", late), **call)
    assert found.compute_fraction == pytest.approx(10 / 12)
    assert found.asked == 0


def test_looking_at_a_rule_leaves_no_trace():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe) | {"num_inference_steps": 12}
    plain = pipelines.run(pipe, call)
    generator = torch.Generator().manual_seed(3)
    state, world = generator.get_state(), torch.get_rng_state()
    before = dicts(pipe)
    estimate(pipe, decided(pipe, "first_block", 1e9), **(call | {"generator": generator}))
    assert torch.equal(state, generator.get_state())
    assert torch.equal(world, torch.get_rng_state())
    assert dicts(pipe).keys() == before.keys()
    assert torch.equal(plain, pipelines.run(pipe, call))
    with accelerated(pipe, "uniform:every=2"):
        assert estimate(pipe, decided(pipe, "first_block", 1e9), **call).asked == 0


def test_few_steps_are_not_praised():
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe)
    few = str(estimate(pipe, "uniform:every=2", **(call | {"num_inference_steps": 4})))
    assert "Distilled models of few steps leave little to skip" in few
    assert "faster" not in few
    more = str(estimate(pipe, "uniform:every=2", **(call | {"num_inference_steps": 6})))
    assert "6 steps are few" in more
    assert "distilled" in more
    assert "are few" not in str(estimate(pipe, "uniform:every=2", **(call | {"num_inference_steps": 9})))


def test_a_timed_call_shows_what_lies_outside_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.shared("flux")
    call = pipelines.TINY["flux"].call(pipe) | {"num_inference_steps": 10}
    plain, found = pipelines.run(pipe, call), dicts(pipe)
    untimed = estimate(pipe, "uniform:every=2", **call)
    assert (untimed.seconds, untimed.loop_seconds) == (None, None)
    assert "outside" not in str(untimed)
    seen = estimate(pipe, "uniform:every=2", timed=True, **call)
    assert seen.seconds is not None
    assert seen.loop_seconds is not None
    assert 0 < seen.loop_seconds < seen.seconds
    ticks = iter([0.0, 3.0, 11.0, 12.0])  # begins, loop begins, loop ends, ends
    monkeypatch.setattr(cost, "_now", lambda: next(ticks))
    timed = estimate(pipe, "uniform:every=2", timed=True, **call)
    assert (timed.seconds, timed.loop_seconds) == (12.0, 8.0)
    assert "The full call takes 12 s, 33% of them outside of the sampling loop: up to 1.50x faster as a whole" in str(
        timed
    )
    assert str(timed).startswith(str(untimed))
    assert dicts(pipe).keys() == found.keys()
    assert torch.equal(plain, pipelines.run(pipe, call))
    with accelerated(pipe, "full"), pytest.raises(BadOption, match=r"timed=True was given\. Allowed: False for an acc"):
        estimate(pipe, "uniform:every=2", timed=True, **call)
