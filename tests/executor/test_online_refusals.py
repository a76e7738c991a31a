"""Rules that decide in the run, as schedules and as specs: which are accepted, and which are refused."""

from __future__ import annotations

import pytest
import torch
from online import INSIDE, STEPS, decided, played, residual, stacks, strips, toy_schedule
from pipelines import TINY, fresh, run, shared
from probes import dicts, ours
from small_loop import loop, noise

from diffcache import accelerate, accelerated, report
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.schedulers import Rule, parse_rule

# --- what accelerate refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", INSIDE)
def test_rules_that_decide_inside_govern_stacks_alone(rule: str) -> None:
    pipe = shared("flux")
    before = dicts(pipe)
    for site in ("model", "block:transformer_blocks.1"):
        with pytest.raises(
            BadOption, match=f"sites='{site}' was given. Allowed: stacks, because the online rule '{rule}'"
        ):
            accelerate(pipe, decided(pipe, rule, sites=[site]))
    assert dicts(pipe) == before


def test_a_block_without_a_normalisation_has_no_modulated_input() -> None:
    pipe = loop()
    with pytest.raises(UnsupportedModel, match=r"there is none in Block\. Use another rule"):
        accelerate(pipe, toy_schedule("modulated_input"))
    assert ours(pipe) == []


def test_a_normalisation_inside_a_compiled_graph_is_refused() -> None:
    pipe = fresh("flux")
    schedule = decided(pipe, "modulated_input")
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"lies inside 'transformer_blocks\.0', which is compiled"):
        accelerate(pipe, schedule)
    assert ours(pipe) == []


def test_blocks_that_are_compiled_one_by_one_can_decide_by_their_residual() -> None:
    pipe, other = loop(), loop()
    torch._dynamo.reset()
    for block in pipe.transformer.blocks:
        block.attn.calls = 0
        block.compile(backend="eager")
    with accelerated(pipe, toy_schedule("first_block", 0.3)), accelerated(other, toy_schedule("first_block", 0.3)):
        torch.testing.assert_close(pipe(noise()), other(noise()))
        assert strips(report(pipe), "stack:blocks") == strips(report(other), "stack:blocks")


# --- specs -----------------------------------------------------------------------------------------------------------


def test_rules_can_be_given_as_specs() -> None:
    pipe = shared("flux")
    for spec, schedule in (
        ("firstblockcache:threshold=0.4", decided(pipe, "first_block", 0.4)),
        ("firstblockcache:threshold=9,most=3", decided(pipe, "first_block", 9, most=3)),
        ("easycache:threshold=0.5,warmup=0", decided(pipe, "output_rate", 0.5)),
        ("easycache:threshold=0.5,warmup=4", decided(pipe, "output_rate", 0.5, plan=residual("####........"))),
    ):
        one, found = played("flux", spec)
        other, expected = played("flux", schedule)
        assert torch.equal(one, other)
        assert [row.strip for row in found.rows] == [row.strip for row in expected.rows]


def test_a_spec_of_first_block_means_stacks() -> None:
    assert parse_rule("firstblockcache:threshold=0.1") == Rule("first_block", "stack", {"threshold": 0.1})
    assert parse_rule("firstblockcache:threshold=0.1,sites=stack") == parse_rule("firstblockcache:threshold=0.1")
    assert parse_rule(str(parse_rule("first_block"))) == parse_rule("first_block")
    assert parse_rule("easycache").granularity == "model"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("firstblockcache:threshold=-1", "threshold=-1 was given. Allowed: a number, 0 or more"),
        ("firstblockcache:threshold=nan", "threshold=nan"),
        ("firstblockcache:threshold=low", "threshold='low'"),
        ("firstblockcache:most=0", "most=0 was given. Allowed: a whole number, 1 or more"),
        ("easycache:warmup=-1", "warmup=-1"),
        ("easycache:warmup=2.5", "warmup=2.5"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_at_once(spec: str, says: str) -> None:
    with pytest.raises(BadOption) as refused:
        parse_rule(spec)
    assert says in str(refused.value)


def test_a_late_start_begins_with_computed_steps() -> None:
    pipe = shared("flux_img2img")
    call = TINY["flux_img2img"].call(pipe)
    with accelerated(pipe, "easycache:threshold=99,warmup=3"):
        run(pipe, call, num_inference_steps=STEPS)
        (strip,) = strips(report(pipe), "model")
    assert strip == "■■■" + "·" * (len(strip) - 3)
    with accelerated(pipe, "firstblockcache:threshold=99"):
        run(pipe, call, num_inference_steps=STEPS)
        strip = strips(report(pipe), stacks(pipe)[0])[0]
    assert strip == "■" + "·" * (len(strip) - 1)
