"""Evaluation of token rules: exact match, agreement with the full loop, work and speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from decoders import decode, decoder, prompts

import diffcache
from diffcache.errors import AlreadyAccelerated, DiffCacheError, UnknownName
from diffcache.eval import evaluate_text, text, token_method

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def loop():
    model = decoder()
    return diffcache.Loop(model, lambda prompt, per_step=1: decode(model, prompt, per_step=per_step)[0])


CALLS = [{"prompt": prompts(2, seed=seed)} for seed in range(4)]


@pytest.fixture(scope="module")
def answers(loop):
    return [loop(**call) for call in CALLS]


def exact(answers):
    """Return a scorer that accepts the answers of the full loop."""

    def score(call, ids):
        wanted = next(a for a, c in zip(answers, CALLS, strict=True) if c is call)
        return [torch.equal(row, other) for row, other in zip(ids, wanted, strict=True)]

    return score


def test_methods_are_compared_with_the_full_loop(loop, answers, tmp_path):
    methods = [
        token_method("exact", "full"),
        token_method("dkv", "dkv:refresh=8"),
        token_method("2 per step", per_step=2),
        token_method("dkv, 2 per step", "dkv:refresh=8", per_step=2),
    ]
    found = evaluate_text(loop, methods, CALLS, score=exact(answers), out=tmp_path)
    assert list(found) == ["full run", "exact", "dkv", "2 per step", "dkv, 2 per step"]
    full, same, dkv, two, both = (found[name] for name in found)
    assert full.exact[0] == same.exact[0] == 1
    assert (same.same_tokens, same.same_answers, same.computed, same.better, same.worse) == (1, 1, 1, 0, 0)
    assert full.forwards == dkv.forwards == 4 * 16
    assert two.forwards == both.forwards == 4 * 8
    assert 0 < dkv.computed < 1
    assert (full.peak_bytes, two.computed) == (0, 1)
    assert dkv.peak_bytes > 0
    assert full.tokens_per_s == pytest.approx(8 * 16 / sum(full.seconds))
    changed = [loop(**call, per_step=2) for call in CALLS]
    equal = torch.cat([a == b for a, b in zip(changed, answers, strict=True)])[:, 8:]
    assert two.same_tokens == pytest.approx(equal.double().mean().item())
    assert two.same_answers == pytest.approx(equal.all(1).double().mean().item())
    assert two.worse == 8 - int(equal.all(1).sum()) > 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [one["name"] for one in record["methods"]] == list(found)
    assert str(found) == (tmp_path / "table.md").read_text().strip()
    with pytest.raises(UnknownName, match="dkv"):
        found["dkw"]


def test_seconds_are_paired_by_call(loop, tmp_path):
    found = evaluate_text(loop, {"dkv": "dkv"}, CALLS, out=tmp_path)
    full, dkv = found["full run"], found["dkv"]
    assert dkv.speedup == pytest.approx(np.median(np.array(full.seconds) / np.array(dkv.seconds)))
    assert (full.exact, dkv.p_value) == (None, None)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0)]
)
def test_the_interval_is_wilsons(successes, n, low, high):
    """The values are those of ``statsmodels.stats.proportion.proportion_confint(method="wilson")``."""
    assert text.wilson(successes, n) == pytest.approx((successes / n, low, high), abs=1e-5)


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (1, 1, 1.0), (0, 6, 2 / 64), (2, 8, 0.109375)])
def test_the_test_is_mcnemars(better, worse, p):
    assert text.mcnemar(better, worse) == pytest.approx(p)


def test_an_accelerated_model_is_refused(loop, tmp_path):
    with diffcache.accelerated(loop, "dkv"), pytest.raises(AlreadyAccelerated):
        evaluate_text(loop, {"dkv": "dkv"}, CALLS, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": {"a": "dkw"}}, "no token rule"),
        ({"methods": {"full run": "dkv"}}, "names that differ"),
        ({"score": lambda call, ids: [True]}, "one bool for each answer"),
        ({"pipe": diffcache.Loop(torch.nn.Linear(2, 2), lambda: None)}, "this Loop cannot be used: it has no"),
        ({"calls": [{"prompts": 3}]}, "prompts"),
        ({"score": lambda call, ids: None}, "one bool for each answer"),
        ({"score": lambda call, ids: ["right", "wrong"]}, "one bool for each answer"),
        ({"score": lambda call, ids: [float("nan")] * 2}, "one bool for each answer"),
        ({"methods": ["dkv"]}, "token_method"),
    ],
)
def test_bad_input_has_one_clear_error(loop, tmp_path, change, words):
    given = {"pipe": loop, "methods": {"dkv": "dkv"}, "calls": CALLS, "out": tmp_path, **change}
    with pytest.raises(DiffCacheError, match=words):
        evaluate_text(given.pop("pipe"), given.pop("methods"), given.pop("calls"), **given)


def test_results_are_given_one_by_one_when_their_last_call_has_ended(tmp_path):
    model, events = decoder(), []

    def sample(prompt, per_step=1):
        events.append("call")
        return decode(model, prompt, per_step=per_step)[0]

    methods = [token_method("dkv", "dkv"), token_method("fast", per_step=2)]
    found = evaluate_text(diffcache.Loop(model, sample), methods, CALLS, out=tmp_path, measured=events.append)
    full, dkv, fast = found.results
    assert events == [*["call"] * 9, "call", full, "call", dkv, "call", fast]


def test_a_loop_that_returns_no_ids_is_refused(tmp_path):
    model = decoder()
    loop = diffcache.Loop(model, lambda prompt: "text")
    with pytest.raises(DiffCacheError, match="no token ids"):
        evaluate_text(loop, {"dkv": "dkv"}, CALLS, out=tmp_path)


def test_prompts_that_a_call_decodes_one_by_one_count(tmp_path):
    model = decoder()

    def sample(prompt):
        return torch.cat([decode(model, row[None])[0] for row in prompt])

    found = evaluate_text(diffcache.Loop(model, sample), {"exact": "full"}, CALLS[:1], out=tmp_path)
    full = found["full run"]
    assert full.tokens_per_s == pytest.approx(2 * 16 / sum(full.seconds))
    assert found["exact"].same_tokens == 1


def test_another_number_of_answers_is_refused(tmp_path):
    model = decoder()
    loop = diffcache.Loop(model, lambda prompt, rows=2: decode(model, prompt[:rows])[0])
    with pytest.raises(DiffCacheError, match="1 answers in call 0"):
        evaluate_text(loop, [token_method("fewer", rows=1)], CALLS, out=tmp_path)


def test_a_schedule_is_compared_from_its_file(loop, tmp_path):
    made = diffcache.optimize(loop, CALLS[:2], diffcache.Budget(computed_steps=10), progress=False)
    path = made.save(tmp_path / "schedule.safetensors")
    found = evaluate_text(loop, [token_method("mine", str(path))], CALLS[2:], out=tmp_path)
    assert 0 < found["mine"].computed < 0.8


def test_a_misspelt_argument_of_the_loop_is_found_before_anything_runs(loop, tmp_path):
    with pytest.raises(UnknownName, match="Did you mean 'per_step'"):
        evaluate_text(loop, [token_method("fast", perstep=2)], CALLS, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_evaluate_is_the_evaluation_of_text_for_a_language_model(loop, answers, tmp_path, capsys):
    peer = token_method("2 per step", per_step=2)
    found = diffcache.evaluate(
        loop, {"exact": "full", "dkv": "dkv"}, CALLS, score=exact(answers), extra=[peer], out=tmp_path, progress=True
    )
    assert isinstance(found, text.TextEvaluation)
    assert "compare: 100%" in capsys.readouterr().err
    assert list(found) == ["full run", "exact", "dkv", "2 per step"]
    assert (found["exact"].exact[0], found["exact"].same_answers) == (1, 1)
    assert found["2 per step"].forwards == 4 * 8
    assert (tmp_path / "table.md").read_text().strip() == str(found)


def test_evaluate_compares_answers_without_a_score(loop, tmp_path, capsys):
    """One dictionary is a call, and further arguments of the loop are added to every call."""
    found = diffcache.evaluate(loop, [token_method("dkv", "dkv")], CALLS[0], out=tmp_path, progress=False, per_step=2)
    assert (found["full run"].forwards, found["dkv"].exact) == (8, None)
    assert "compare" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ["psnr"]}, "metrics cannot be used: it does not apply to language models. Leave out metrics"),
        ({"scorers": [object()]}, "scorers cannot be used: it does not apply"),
        ({"extractor": "inception"}, "extractor cannot be used: it does not apply"),
        ({"real": "pictures"}, "real cannot be used: it does not apply"),
        ({"options": {}}, "options cannot be used: it does not apply"),
        ({"profile": "profile.safetensors"}, "profile cannot be used: it does not apply"),
        ({"trials": object()}, "trials cannot be used: it does not apply"),
        ({"title": "Answers"}, "title cannot be used: it does not apply"),
        ({"score": lambda call, ids: None}, "one bool for each answer"),
        ({"schedules": {"a": "uniform:every=2"}}, "it predicts whole outputs"),
        ({"schedules": {"a": "uniform:every=2"}}, "Pass a token rule (block_causal, "),
        ({"schedules": {"a": "uniform:every=2"}}, "or what diffcache.optimize("),
        ({"schedules": {"a": None}}, "schedule=None was given. Allowed: for a language model, a token rule"),
        ({"schedules": "dkv"}, "a dictionary, name -> token rule"),
        ({"schedules": "dkv", "extra": [token_method("a", "dkv")]}, "a dictionary, name -> token rule"),
        ({"promts": 3}, "promts"),
    ],
)
def test_evaluate_refuses_what_does_not_apply_to_a_language_model(loop, tmp_path, change, words):
    given = {"schedules": {"dkv": "dkv"}, "calls": CALLS, "out": tmp_path / "out", **change}
    with pytest.raises(DiffCacheError) as error:
        diffcache.evaluate(loop, **given)
    assert words in str(error.value)


@pytest.mark.parametrize("verb", [diffcache.evaluate, evaluate_text])
def test_a_network_without_its_loop_is_refused(loop, tmp_path, verb):
    with pytest.raises(DiffCacheError, match=r"no function that runs your decoding loop. Pass diffcache.Loop"):
        verb(loop.network, {"dkv": "dkv"}, CALLS, out=tmp_path)


def test_evaluate_refuses_a_score_for_pictures():
    with pytest.raises(DiffCacheError, match="it judges answers of language models"):
        diffcache.evaluate(torch.nn.Linear(2, 2), {"a": "uniform:every=2"}, [{}], score=lambda call, ids: [True])
