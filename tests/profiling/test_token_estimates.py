"""Estimates for language models: work, seconds, bytes and flips of rules and schedules, compared with real decodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from decoders import MASK, VOCABULARY, decode, decoder
from documents import token_profile, token_schedule

import diffcache
from diffcache import Budget, Loop, TokenProfile, TokenSchedule, host
from diffcache.errors import AlreadyAccelerated, BadOption, DiffCacheError, UnknownName, Unusable
from diffcache.planning import TokenPlan, token_plans
from diffcache.profiling.measuring.token_walk import walk
from diffcache.tokens import Fresh, TokenRule, parse_token_rule

PROMPT, ANSWER = 8, 16
RULES = (
    "full",
    "dkv:refresh=4",
    "dkv:refresh=8,prompt=keep",
    "dkv:refresh=2,greedy=true,window=3",
    "dkv:refresh=4,shift=1",
    "full:repeat=1",
    "prefix:block=8",
    "dual:block=8",
    "vicinity:block=8,around=3,refresh=6",
    "block_causal:block=8",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder()


@torch.no_grad()
def in_order(model: Any, prompt: torch.Tensor, *, paces: tuple[int, ...] = (1, 1), idle: int = 0) -> torch.Tensor:
    """Decode in an order that a seed fixes. Approximate logits then do not change the order.

    Args:
        model: The decoder.
        prompt: int64 [B, P].
        paces: For each row, the number of masks that a step commits.
        idle: After every so many steps, a step commits nothing. 0 for never.
    """
    x = torch.cat([prompt, torch.full((len(prompt), ANSWER), MASK)], 1)
    generator = torch.Generator().manual_seed(int(prompt.sum()))
    left = [(PROMPT + torch.randperm(ANSWER, generator=generator)).tolist() for _ in paces]
    step = 0
    while any(left):
        logits = model(x).logits
        step += 1
        if idle and step % idle == 0:
            continue
        for row, pace in enumerate(paces):
            for place in left[row][:pace]:
                x[row, place] = 1 + int(logits[row, place, 1:].argmax())
            left[row] = left[row][pace:]
    return x


def prompts(count: int, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"prompt": torch.randint(1, VOCABULARY, (rows, PROMPT), generator=generator)} for _ in range(count)]


def schedule(**changes: Any) -> TokenSchedule:
    return token_schedule(**{"drift": token_profile().drift, **changes})


def real(loop: Loop, rule: Any, calls: Any) -> list[float]:
    """Return the positions that each forward of the calls computed in each row."""
    found: list[float] = []
    with diffcache.accelerated(loop, rule):
        for call in calls:
            loop(**call)
            report = diffcache.report(loop)
            found += [share * (PROMPT + ANSWER) for share in report.shares]
    return found


SCHEDULES = {
    "two refreshes": {},
    "a refresh of the deep layers": {"starts": np.array([0.0, 3, 1, 3, 0, 3])},
    "tokens count": {"weight": 1.0, "fresh": 6},
}


Measured = tuple[Loop, TokenProfile, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def paced(model: Any) -> Measured:
    """Return a loop, its profile and its calls. A row commits two masks in a step, and every third step none."""
    loop = Loop(model, lambda prompt: in_order(model, prompt, paces=(2, 1), idle=3))
    calls = prompts(2)
    return loop, diffcache.measure(loop, calls, progress=False), calls


@pytest.fixture(scope="module")
def three(model: Any) -> Measured:
    """Return a loop, its profile and its call, which holds three sequences."""
    loop = Loop(model, lambda prompt: in_order(model, prompt, paces=(1, 1, 1)))
    calls = prompts(1, rows=3)
    return loop, diffcache.measure(loop, calls, progress=False), calls


@pytest.mark.parametrize("rule", [*RULES, *SCHEDULES])
def test_the_estimate_counts_the_positions_that_a_decode_computes(paced: Measured, rule: str) -> None:
    loop, profile, calls = paced
    source: Any = schedule(**SCHEDULES[rule]) if rule in SCHEDULES else rule
    found = real(loop, source, calls)
    estimate = diffcache.estimate(loop, source, profile=profile)
    assert estimate.rows == 2
    assert estimate.forwards == len(found) / 2
    # The report rounds the positions of a forward that computes a part of its layers in full.
    assert estimate.compute_fraction == pytest.approx(np.mean(found) / (PROMPT + ANSWER), abs=0.003)
    if rule not in SCHEDULES:
        walked = walk(profile, parse_token_rule(rule)).computed
        assert walked == pytest.approx(found)


def test_rows_in_other_batches_are_another_estimate(paced: Measured) -> None:
    """The test above compares something: with a row alone, no row is padded to another one."""
    _, profile, _ = paced
    rule = parse_token_rule(schedule())
    alone = walk(dataclasses.replace(profile, rows=1), rule)
    assert sum(walk(profile, rule).computed) * 2 > 1.1 * sum(alone.computed)


def test_seconds_follow_from_the_times_of_the_profile(model: Any) -> None:
    """40 positions take one second, and 4 a tenth. Full: 32 forwards of 1.5 s with what the loop does in between."""
    profile = token_profile(outside=0.5, class_name=host.class_name(model), rows=4)
    full = diffcache.estimate(model, "full", profile=profile)
    assert (full.seconds, full.full_seconds) == pytest.approx((48, 48))
    assert (full.compute_fraction, full.flips, full.speedup) == pytest.approx((1, 0, 1))
    dkv = diffcache.estimate(model, "dkv:refresh=100", profile=profile)
    # Forward n finds 33 - n masks, and one token that has just changed; the first one computes all positions.
    positions = 40 + sum(33 - n + 1 for n in range(2, 33))
    timed = 40 + sum(max(33 - n + 1, 4) for n in range(2, 33))  # a forward of fewer than 4 takes as long as one of 4
    assert dkv.seconds == pytest.approx(timed / 40 + 32 * 0.5)
    assert dkv.compute_fraction == pytest.approx(positions / 40 / 32)
    assert dkv.speedup == pytest.approx(48 / dkv.seconds)


def plans() -> tuple[TokenProfile, list[TokenPlan]]:
    """Return a profile of a ``LlamaForCausalLM``, and plans of several weights and refreshes on it."""
    profile = token_profile(class_name="LlamaForCausalLM", rows=2)
    found = [plan for speed in (2, 4) for plan in token_plans(profile, Budget(speedup=speed))]
    assert {0.0, 1.0} < {plan.weight for plan in found}
    assert len({plan.starts for plan in found}) > 5
    return profile, found


def test_a_rule_and_a_plan_have_one_model_of_the_error() -> None:
    profile, found = plans()
    for plan in found:
        flips = walk(profile, parse_token_rule(plan.schedule(profile))).flips / (profile.committed > 0).sum()
        assert flips == pytest.approx(plan.flips)
        assert flips > 0


def test_the_estimate_of_a_schedule_holds_the_flips_of_the_planner(model: Any) -> None:
    profile, found = plans()
    for plan in found[::20]:
        made = diffcache.estimate(model, plan.schedule(profile), profile=profile)
        assert made.flips == pytest.approx(plan.flips)
        assert made.seconds == pytest.approx(plan.seconds, rel=0.1)  # the planner counts a mean forward


def test_fewer_computed_positions_flip_more_tokens(model: Any) -> None:
    profile = token_profile(class_name=host.class_name(model))
    flips = [
        diffcache.estimate(model, rule, profile=profile).flips
        for rule in ("full", "dkv:refresh=2", "dkv:refresh=32", "dual:block=8")
    ]
    assert flips == sorted(flips)
    assert len(set(flips)) == 4


@pytest.mark.parametrize("store", ["exact", "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("rule", ["dkv:refresh=8", "a refresh of the deep layers"])
def test_the_bytes_are_those_that_a_decode_keeps(three: Measured, rule: str, store: str) -> None:
    loop, profile, calls = three
    source: Any = schedule(**SCHEDULES[rule]) if rule in SCHEDULES else rule
    found = diffcache.estimate(loop, source, store=store, profile=profile)
    with diffcache.accelerated(loop, source, store=store):
        loop(**calls[0])
        report = diffcache.report(loop)
    assert found.kept_as == store
    assert found.kv_bytes[store] == report.kv_bytes
    assert found.cache_bytes == report.peak_bytes
    assert list(found.kv_bytes) == ["exact", "bf16", "int8", "fp8", "int4"]


def test_a_call_is_measured_if_there_is_no_profile(model: Any, tmp_path: Path) -> None:
    seen = []

    def sample(prompt: torch.Tensor, per_step: int = 1) -> torch.Tensor:
        seen.append(per_step)
        return decode(model, prompt, ANSWER, per_step=per_step)[0]

    loop = Loop(model, sample)
    found = diffcache.estimate(loop, "dkv:refresh=4", **prompts(1)[0], per_step=2)
    assert set(seen) == {2}
    assert (found.forwards, found.rows) == (ANSWER / 2, 2)
    profile = diffcache.measure(loop, prompts(1), progress=False)
    profile.save(tmp_path / "profile.safetensors")
    schedule().save(tmp_path / "schedule.safetensors")
    before = len(seen)
    one = diffcache.estimate(model, str(tmp_path / "schedule.safetensors"), profile=tmp_path / "profile.safetensors")
    assert one == diffcache.estimate(loop, schedule(), profile=profile)
    assert len(seen) == before
    assert "forward" not in vars(model)


def test_a_rule_of_yours_is_estimated(model: Any) -> None:
    profile = token_profile(class_name=host.class_name(model))
    rule = TokenRule("half", lambda view: Fresh(view.positions % 2 == 0))
    found = diffcache.estimate(model, rule, profile=profile)
    assert found.compute_fraction == pytest.approx((1 + 31 / 2) / 32)


def test_it_prints_in_every_form(model: Any) -> None:
    profile = token_profile(class_name=host.class_name(model), rows=2)
    found = diffcache.estimate(model, "dkv:refresh=8", store="int8", profile=profile)
    assert f"{found.compute_fraction:.1%} of the positions" in str(found)
    assert f"{found.speedup:.2f}x faster" in str(found)
    assert "a call of 2 sequences" in str(found)
    assert "kept as int8 take to decode" in str(found)
    assert "decode" not in str(dataclasses.replace(found, kept_as="exact"))
    assert repr(found).startswith("<TokenEstimate ")
    assert "\n" not in repr(found)
    assert "<pre" in found._repr_html_()


OTHER = {"class_name": "Qwen3ForCausalLM"}


@pytest.mark.parametrize(
    ("rule", "given", "error", "words"),
    [
        ("elastic", {"profile": {}}, Unusable, "it decides by the attention of its layers.*diffcache.evaluate"),
        ("dllm", {"profile": {}}, Unusable, "it decides by the values of its layers.*diffcache.evaluate"),
        ("dkw", {"profile": {}}, UnknownName, "dkv"),
        ("dkv:refresh=0", {"profile": {}}, BadOption, "at least 1"),
        ("dkv", {}, Unusable, "neither a profile nor the arguments of a call"),
        ("dkv", {"profile": {}, "prompt": torch.zeros(1, 4).long()}, Unusable, "given as well: prompt"),
        ("dkv", {"promt": 3}, UnknownName, "promt"),
        ("dkv", {"profile": 3}, BadOption, "a TokenProfile that diffcache.measure returns"),
        ("dkv", {"profile": OTHER}, Unusable, "measured on a Qwen3ForCausalLM.*this model is a Llama"),
        ("dkv", {"profile": {"config_digest": "0" * 64}}, Unusable, "parameters of other names"),
        ("dkv", {"profile": {}, "timed": True}, Unusable, "always holds seconds"),
        ("dkv", {"profile": {}, "store": "int9"}, UnknownName, "int8"),
    ],
)
def test_what_cannot_be_estimated_has_one_clear_error(
    model: Any, rule: str, given: dict[str, Any], error: type[DiffCacheError], words: str
) -> None:
    loop = Loop(model, lambda prompt: decode(model, prompt, ANSWER)[0])
    profile = given.get("profile")
    if isinstance(profile, dict):
        given = {**given, "profile": token_profile(**{"class_name": host.class_name(model), **profile})}
    with pytest.raises(error, match=words):
        diffcache.estimate(loop, rule, **given)
    assert "forward" not in vars(model)


def test_an_accelerated_model_and_a_picture_pipeline_are_refused(model: Any) -> None:
    profile = token_profile(class_name=host.class_name(model))
    with diffcache.accelerated(model, "dkv"), pytest.raises(AlreadyAccelerated, match="restore"):
        diffcache.estimate(model, "dual", profile=profile)
    network = torch.nn.Linear(2, 2)
    with pytest.raises(Unusable, match="it applies to token rules"):
        diffcache.estimate(Loop(network, lambda: None), "uniform:every=2", profile=profile)
