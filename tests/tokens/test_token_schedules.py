"""Token schedules: a profile of full decodes, a plan within a budget, and a rule that follows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from decoders import MASK, VOCABULARY, LLaDALike, decode, decoder
from documents import token_schedule

import diffcache
from diffcache import Budget, Loop
from diffcache.documents import DriftTables, TokenProfile, TokenSchedule
from diffcache.errors import BadOption, DocumentError, ScheduleMismatch, UnsupportedModel, Unusable
from diffcache.planning import token_plans
from diffcache.tokens import Fresh, TokenRule, View, parse_token_rule

ANSWER = 32


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder()


@pytest.fixture(scope="module")
def loop(model: Any) -> Loop:
    return Loop(model, lambda prompt: decode(model, prompt, ANSWER)[0])


def prompts(count: int, seed: int = 0, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"prompt": torch.randint(1, VOCABULARY, (rows, 8), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def profile(loop: Loop) -> TokenProfile:
    return diffcache.measure(loop, prompts(2), progress=False)


def schedule(**given: Any) -> TokenSchedule:
    wide = np.linspace(0, 1, 79)
    return token_schedule(drift=DriftTables(masked=wide, decoded=wide, next=np.ones(40)), **given)


def test_old_keys_and_values_of_the_same_forward_change_nothing(model: Any, loop: Loop) -> None:
    from diffcache.tokens import cache_for

    cache = cache_for(model, "full")
    ids = torch.cat([prompts(1)[0]["prompt"], torch.full((2, 8), MASK)], 1)
    cache.attach()
    try:
        with torch.no_grad():
            whole = model(ids).logits
        rows = cache.canvas.cache.rows()
        index = np.array([[3, 9, 12], [0, 1, 15]])
        with torch.no_grad():
            found = cache.trial(ids, rows, index)
            other = cache.trial(ids, {**rows, 1: tuple(part + 1 for part in rows[1])}, index)
    finally:
        cache.detach()
    wanted = torch.stack([whole[row, at] for row, at in enumerate(index)])
    torch.testing.assert_close(found, wanted)
    assert (other - wanted).abs().max() > 1e-3


def test_a_profile_holds_what_the_decodes_did(profile: TokenProfile) -> None:
    assert (profile.positions, profile.masks, profile.forwards) == (40, ANSWER, ANSWER)
    assert (profile.committed[:, :8] == 0).all()
    assert np.sort(profile.committed[:, 8:], axis=1).tolist() == [list(range(1, ANSWER + 1))] * 4
    assert profile.errors.shape == (3, 5)
    assert (profile.errors[:, 0] == 0).all()
    assert profile.errors[:, 1:].max() > 0
    assert profile.counts[-1] == 40
    assert TokenProfile.from_bytes(profile.to_bytes()) == profile


@pytest.mark.parametrize(("answer", "per_step"), [(16, 1), (32, 4)])
def test_decodes_of_few_steps_give_a_profile(model: Any, answer: int, per_step: int) -> None:
    short = Loop(model, lambda prompt: decode(model, prompt, answer, per_step=per_step)[0])
    found = diffcache.measure(short, prompts(1), progress=False)
    assert found.forwards == answer / per_step
    assert (found.errors[:, 1:].sum(0) > 0).all()


def test_chances_of_the_profile_follow_the_blocks_of_the_loop(profile: TokenProfile) -> None:
    assert profile.drift.next[:8].min() > 0.02
    assert profile.drift.next[20:].max() < 0.02


def test_each_forward_computes_the_planned_number_of_positions(model: Any) -> None:
    with diffcache.accelerated(model, schedule()):
        decode(model, prompts(1)[0]["prompt"], ANSWER)
        found = diffcache.report(model)
    # Parts of 8 commits. The first forward of part 2 follows 16 commits; the others compute 4 and the last commit.
    assert found.refreshes == 2
    assert found.shares[16] == 1
    assert [round(share * 40) for share in found.shares[1:16]] == [5] * 15


def test_a_refresh_of_the_deep_layers_computes_their_share(model: Any) -> None:
    with diffcache.accelerated(model, schedule(starts=np.array([0.0, 3, 1, 3]))):
        decode(model, prompts(1)[0]["prompt"], ANSWER)
        found = diffcache.report(model)
    assert found.refreshes == 1
    assert found.shares[16] == pytest.approx((5 + 2 * 40) / 3 / 40, abs=0.02)


def test_a_schedule_that_computes_everything_gives_the_tokens_of_the_full_loop(model: Any) -> None:
    prompt = prompts(1)[0]["prompt"]
    full, logits = decode(model, prompt, ANSWER)
    with diffcache.accelerated(model, schedule(starts=np.zeros(ANSWER))):
        found, others = decode(model, prompt, ANSWER)
    assert torch.equal(found, full)
    for one, other in zip(logits, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"class_name": "Qwen3ForCausalLM"}, "this model is LlamaForCausalLM with 3"),
        ({"layers": 4, "starts": np.array([0.0, 4])}, "this model is LlamaForCausalLM with 3"),
        ({"config_digest": "0" * 64}, "parameters of other names or shapes"),
    ],
)
def test_a_schedule_of_another_network_is_refused(model: Any, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScheduleMismatch, match=problem):
        diffcache.accelerate(model, schedule(**change))
    if "config_digest" in change:
        with diffcache.accelerated(model, schedule(**change), strict=False):
            pass
    with pytest.raises(BadOption, match="accelerate"):
        diffcache.report(model)


def test_rows_of_a_batch_do_not_depend_on_each_other(model: Any) -> None:
    prompt = prompts(1, seed=5, rows=3)[0]["prompt"]
    with diffcache.accelerated(model, schedule(weight=1.0)):
        together, _ = decode(model, prompt, ANSWER)
        alone = torch.cat([decode(model, row[None], ANSWER)[0] for row in prompt])
    assert torch.equal(together, alone)


def test_rows_with_unequal_progress_refresh_by_themselves() -> None:
    rule = parse_token_rule(schedule())
    prompt = np.zeros((2, 16), bool)
    masked = np.ones((2, 16), bool)
    view = View(step=1, masked=masked, changed=np.zeros_like(masked), prompt=prompt)
    rule.fresh(view)
    masked = masked.copy()
    masked[0, :9] = False
    later = View(step=2, masked=masked, changed=~masked, prompt=prompt, memory=view.memory)
    found = rule.fresh(later).positions
    assert found[0].all()
    assert found[1].sum() == 0


def test_a_new_canvas_begins_with_the_first_part(model: Any) -> None:
    with diffcache.accelerated(model, schedule()):
        shares = []
        for call in prompts(2, seed=3):
            decode(model, call["prompt"], ANSWER)
            shares.append(diffcache.report(model).shares)
    assert shares[0] == shares[1]


@pytest.fixture(scope="module")
def optimized(loop: Loop) -> TokenSchedule:
    return diffcache.optimize(loop, prompts(3), Budget(computed_steps=16), progress=False)


def test_optimize_returns_a_schedule_that_agrees_as_expected(loop: Loop, optimized: TokenSchedule) -> None:
    assert isinstance(optimized, TokenSchedule)
    assert optimized.expected is not None
    assert optimized.expected.answers == 2
    assert 1 < optimized.expected.speedup < 4  # of the work
    assert optimized.config_digest is not None
    held_out = prompts(3)[2]
    full = loop(**held_out)
    with diffcache.accelerated(loop, optimized):
        found = loop(**held_out)
        skipped = diffcache.report(loop).skipped
    assert optimized.expected.same_tokens == pytest.approx(1 - float((found != full).sum()) / (2 * ANSWER))
    assert skipped > 0.3


def test_a_schedule_is_used_from_a_file(loop: Loop, optimized: TokenSchedule, tmp_path: Any) -> None:
    path = optimized.save(tmp_path / "schedule.safetensors")
    assert TokenSchedule.load(path) == optimized
    with diffcache.accelerated(loop, str(path)):
        loop(**prompts(1)[0])
        assert "TokenSchedule" in str(diffcache.report(loop))


def test_a_schedule_states_what_it_computes(optimized: TokenSchedule) -> None:
    text = optimized.describe()
    assert f"computes   {optimized.fresh} positions of each row" in text
    assert "of 2 answers as in the full loop" in text


def test_a_plan_agrees_better_than_one_with_wrong_chances_and_no_refresh(loop: Loop, profile: TokenProfile) -> None:
    made = token_plans(profile, Budget(computed_steps=12))[0].schedule(profile)
    blind = dataclasses.replace(
        made, drift=dataclasses.replace(made.drift, next=made.drift.next[::-1].copy()), starts=np.r_[0.0, [3.0] * 31]
    )
    calls = prompts(3, seed=9)

    def equal(one: TokenSchedule) -> float:
        same = []
        for call in calls:
            full = loop(**call)
            with diffcache.accelerated(loop, one):
                same.append((loop(**call) == full).float().mean().item())
        return float(np.mean(same))

    assert equal(made) > equal(blind)


def test_one_call_cannot_choose_and_judge(loop: Loop) -> None:
    with pytest.raises(Unusable, match=r"another one has to judge the plan\. Pass two calls or more"):
        diffcache.optimize(loop, prompts(1), Budget(speedup=2), progress=False)


def test_a_network_without_a_loop_is_refused(model: Any) -> None:
    with pytest.raises(BadOption, match=r"diffcache\.Loop\(model, sample\)"):
        diffcache.optimize(model, prompts(2), Budget(speedup=2), progress=False)


def test_a_canvas_that_grows_is_refused(model: Any) -> None:
    def sample(prompt: torch.Tensor) -> torch.Tensor:
        x, _ = decode(model, prompt, 8)
        return decode(model, x, 8)[0][:, :8]

    with pytest.raises(Unusable, match="its canvas grows from 16 to 24 positions"):
        diffcache.measure(Loop(model, sample), prompts(1), progress=False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"starts": np.array([1.0, 0])}, "the first is 1"),
        ({"starts": np.array([0.0, 3.5])}, "whole numbers from 0 to 3"),
        ({"starts": np.array([0.0, 4])}, "whole numbers from 0 to 3"),
        ({"fresh": -1}, "fresh"),
        ({"weight": -0.5}, "weight"),
    ],
)
def test_a_schedule_with_impossible_values_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        schedule(**change)


def test_a_network_built_like_llada_is_calibrated_without_depth() -> None:
    model = LLaDALike().eval()
    loop = Loop(model, lambda prompt: decode(model, prompt, ANSWER)[0])
    found = diffcache.optimize(loop, prompts(2), Budget(computed_steps=20), progress=False)
    assert found.needs == ""
    with diffcache.accelerated(model, found):
        decode(model, prompts(1)[0]["prompt"], ANSWER)
        assert diffcache.report(model).skipped > 0.2


def test_shifted_logits_are_read_at_the_position_before(model: Any) -> None:
    calls = prompts(1)
    plain = diffcache.measure(Loop(model, lambda prompt: decode(model, prompt, ANSWER)[0]), calls, progress=False)
    model.config.model_type = "Dream"
    try:
        shifted = Loop(model, lambda prompt: decode(model, prompt, ANSWER, shift=True)[0])
        found = diffcache.measure(shifted, calls, progress=False)
        best = decode_margins(model, calls[0]["prompt"])
    finally:
        model.config.model_type = "llama"
    assert found.margins[0, 8:] == pytest.approx(best, abs=1e-5)
    assert plain.margins[0, 8:] != pytest.approx(best, abs=1e-5)


def decode_margins(model: Any, prompt: torch.Tensor) -> list[float]:
    """Return the margin of each token of the first row at its commit, in a loop with shifted logits."""
    x, logits = decode(model, prompt, ANSWER, shift=True)
    now = torch.cat([prompt, torch.full((len(prompt), ANSWER), MASK)], 1)
    margins = {}
    for step in logits:
        step = torch.cat([step[:, :1], step[:, :-1]], 1)
        step[..., MASK] = -torch.inf
        best = step.softmax(-1).topk(2, -1).values
        block = 8 + 8 * int((now[0, 8:] != MASK).sum() // 8)
        confidence = best[0, :, 0].masked_fill(now[0] != MASK, -1)
        at = block + int(confidence[block : block + 8].argmax())
        margins[at] = float(best[0, at, 0] - best[0, at, 1])
        for row in range(len(now)):
            confidence = best[row, :, 0].masked_fill(now[row] != MASK, -1)
            at = block + int(confidence[block : block + 8].argmax())
            now[row, at] = x[row, at]
    return [margins[at] for at in sorted(margins)]


def test_a_loop_that_does_not_call_its_network_is_one_error(model: Any) -> None:
    with pytest.raises(Unusable, match="a call runs no forward of LlamaForCausalLM"):
        diffcache.measure(Loop(model, lambda prompt: prompt), prompts(1), progress=False)


def test_held_out_answers_have_the_length_of_the_others(model: Any) -> None:
    loop = Loop(model, lambda prompt, length=ANSWER: decode(model, prompt, length)[0])
    calls = prompts(2)
    with pytest.raises(Unusable, match="their answers have 37 and 40 positions"):
        diffcache.optimize(loop, [calls[0], calls[1] | {"length": ANSWER - 3}], 16, progress=False)


@pytest.mark.parametrize(
    ("made", "problem"),
    [(lambda view: view.masked, "ndarray"), (lambda view: Fresh(view.masked[0]), r"shape \[40\]")],
)
def test_a_rule_that_returns_something_else_is_one_error(model: Any, made: Any, problem: str) -> None:
    with (
        diffcache.accelerated(model, TokenRule("mine", made)),
        pytest.raises(Unusable, match=f"it returned .*{problem}. Return diffcache.tokens.Fresh"),
    ):
        decode(model, prompts(1)[0]["prompt"], ANSWER)


def test_a_model_in_training_mode_is_one_error() -> None:
    model = decoder().train()
    with pytest.raises(UnsupportedModel, match="cannot be recorded: the model is in training mode"):
        diffcache.measure(Loop(model, lambda prompt: decode(model, prompt, 8)[0]), prompts(1), progress=False)


def test_a_call_with_two_canvases_is_refused(model: Any) -> None:
    def sample(prompt: torch.Tensor) -> torch.Tensor:
        decode(model, prompt, ANSWER)
        return decode(model, prompt.flip(1), ANSWER)[0]

    with pytest.raises(Unusable, match="a call decodes more than one canvas"):
        diffcache.measure(Loop(model, sample), prompts(1), progress=False)


@pytest.mark.parametrize(
    "option", [{"scheduler": "uniform"}, {"time_limit_s": 5}, {"sites": "block"}, {"store": "int8"}], ids=str
)
def test_an_option_for_pictures_is_refused(loop: Loop, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(Unusable, match=f"{name} cannot be used: it does not apply to the calibration of a language"):
        diffcache.optimize(loop, prompts(2), 8, progress=False, **option)


@pytest.mark.parametrize("option", [{"sites": "block"}, {"influence": False}, {"resume": "folder"}], ids=str)
def test_an_option_of_measure_for_pictures_is_refused(loop: Loop, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(Unusable, match=f"{name} cannot be used: it does not apply to language models"):
        diffcache.measure(loop, prompts(1), progress=False, **option)


def test_a_budget_of_memory_is_refused(loop: Loop, profile: TokenProfile) -> None:
    with pytest.raises(Unusable, match="memory_bytes"):
        token_plans(profile, Budget(speedup=2, memory_bytes=10**9))


def test_the_mask_token_is_asked_for_where_a_schedule_can_find_it() -> None:
    model = decoder()
    del model.config.mask_token_id
    with pytest.raises(BadOption, match=r"the id of the mask token: model\.config\.mask_token_id"):
        diffcache.accelerate(model, schedule())


def test_a_schedule_is_used_from_a_folder(model: Any, tmp_path: Any) -> None:
    schedule().save(tmp_path / "schedule.safetensors")
    with diffcache.accelerated(model, tmp_path):
        decode(model, prompts(1)[0]["prompt"], ANSWER)
        assert "TokenSchedule" in str(diffcache.report(model))
