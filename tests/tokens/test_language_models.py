"""The front door for language models: accelerate, report, restore, on networks, loops and diffusers pipelines."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

import documents  # noqa: E402
from decoders import MASK, BlockCausal, LLaDALike, decode, decoder, prompts  # noqa: E402

import diffcache  # noqa: E402
from diffcache import host, tokens  # noqa: E402
from diffcache.errors import AlreadyAccelerated, BadOption, DiffCacheError, UnknownName  # noqa: E402
from diffcache.eval import evaluate_text, token_method  # noqa: E402
from diffcache.schedulers import Rule  # noqa: E402

pytestmark = pytest.mark.fast


@pytest.fixture
def model():
    return decoder()


def pipeline(kind=BlockCausal):
    """Return diffusers' pipeline for LLaDA2, around a tiny network of random weights."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "LLaDA2Pipeline"):
        pytest.skip("this diffusers has no LLaDA2Pipeline")
    pipe = diffusers.LLaDA2Pipeline(decoder(kind), diffusers.BlockRefinementScheduler(block_length=8))
    pipe.set_progress_bar_config(disable=True)
    pipe.mask_token_id = MASK
    return pipe


def written(pipe, **changes):
    call = {
        "input_ids": prompts(2, 13),
        "gen_length": 27,
        "threshold": 0.3,
        "num_inference_steps": 8,
        "sampling_method": "greedy",
        "eos_token_id": 1,
        "output_type": "seq",
        **changes,
    }
    return pipe(**call).sequences


def test_accelerate_report_and_restore_a_model(model):
    before = dict(vars(model))
    wanted, _ = decode(model, prompts())
    assert diffcache.accelerate(model, "dkv:refresh=4") is model
    decode(model, prompts())
    report = diffcache.report(model)
    assert report.rule == "dkv:refresh=4"
    assert (report.forwards, report.runs, report.passed) == (16, 1, {})
    assert report.refreshes == 4
    assert 0 < report.skipped < 1
    assert report.bytes_held > 0
    assert "positions" in str(report)
    assert "<pre" in report._repr_html_()
    diffcache.restore(model)
    assert vars(model) == before
    assert torch.equal(decode(model, prompts())[0], wanted)


def test_full_is_bit_identical_through_the_front_door(model):
    wanted, plain = decode(model, prompts())
    with diffcache.accelerated(model, "full"):
        got, seen = decode(model, prompts())
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


def test_a_loop_and_its_network_are_one(model):
    loop = diffcache.Loop(model, lambda prompt: decode(model, prompt)[0])
    diffcache.accelerate(loop, "dual:block=8")
    loop(prompt=prompts())
    assert diffcache.report(model).refreshes == 2
    with pytest.raises(AlreadyAccelerated, match="the token rule 'dual:block=8'"):
        diffcache.accelerate(model, "dkv")
    diffcache.accelerate(model, "dkv", replace=True)
    assert diffcache.report(loop).rule == "dkv"
    diffcache.restore(loop)
    assert "forward" not in vars(model)


def test_the_exact_rule_for_block_diffusion_decodes_the_same_tokens():
    pipe = pipeline()
    wanted = written(pipe)
    before = dict(vars(pipe.model))
    diffcache.accelerate(pipe, "block_causal:block=8")
    assert torch.equal(written(pipe), wanted)
    report = diffcache.report(pipe)
    assert report.runs == 1
    assert report.skipped > 0.4
    assert torch.equal(
        written(pipe, input_ids=prompts(2, 5, seed=3)),
        written(diffcache.restore(pipe), input_ids=prompts(2, 5, seed=3)),
    )
    assert vars(pipe.model) == before


def test_blocks_of_another_length_are_seen_in_the_tokens():
    """Plant the fault that the test above must find: committed blocks are not computed after their last change."""
    pipe = pipeline()
    _, plain = decode_blocks(pipe.model)
    with diffcache.accelerated(pipe, "block_causal:block=1"):
        _, seen = decode_blocks(pipe.model)
    assert max((a - b).abs().max() for a, b in zip(seen, plain, strict=True)) > 1e-3
    with diffcache.accelerated(pipe, "block_causal:block=8"):
        _, seen = decode_blocks(pipe.model)
    assert max((a - b).abs().max() for a, b in zip(seen, plain, strict=True)) < 1e-5


@torch.no_grad()
def decode_blocks(model, blocks=4):
    """Decode block after block in a window that grows. Return the tokens and the logits of the last block."""
    x, seen = prompts(2, 8), []
    for _ in range(blocks):
        x = torch.cat([x, torch.full((2, 8), MASK)], 1)
        while (x == MASK).any():
            logits = model(x, attention_mask=torch.ones_like(x)).logits[:, -8:]
            seen.append(logits)
            confidence, token = logits[..., 1:].softmax(-1).max(-1)
            best = confidence.masked_fill(x[:, -8:] != MASK, -1).argmax(1)
            rows = torch.arange(2)
            x[rows, x.shape[1] - 8 + best] = token[rows, best] + 1
    return x, seen


def test_forwards_that_change_nothing_are_not_run(model):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    ran = []
    undo = model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad(), diffcache.accelerated(model, "full:repeat=1"):
        model(x)
        x[:, 12] = 5
        first = model(x).logits
        first_again = model(x).logits
        first_again += 1  # the loop may write into the logits
        assert torch.equal(model(x).logits, first)
        model(x, attention_mask=torch.ones_like(x))
        report = diffcache.report(model)
    undo.remove()
    assert len(ran) == 3
    assert (report.repeated, report.forwards) == (2, 5)


def test_an_attention_mask_that_the_loop_changes_in_place_is_seen(model):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    mask = torch.ones_like(x)
    with torch.no_grad():
        with diffcache.accelerated(model, "full"):
            model(x, attention_mask=mask)
            mask[:, :4] = 0
            got = model(x, attention_mask=mask).logits
        assert torch.equal(got, model(x, attention_mask=mask).logits)


@pytest.mark.parametrize(("rule", "shifted"), [("dual:block=8", False), ("dual:block=8,shift=1", True)])
def test_the_position_before_a_mask_is_computed_if_logits_are_shifted(model, rule, shifted):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with diffcache.accelerated(model, rule):
        decode(model, prompts(1, 8), answer=16, shift=True)
    hook.remove()
    first = [sorted(p[0].tolist())[0] for p in seen if p is not None]
    assert first[:3] == ([7] * 3 if shifted else [8] * 3)  # the first block begins at position 8


def test_a_model_of_dreams_family_is_shifted(model):
    assert not tokens.cache_for(model, "dkv").source.shift
    model.config.model_type = "Dream"
    assert tokens.cache_for(model, "dkv").source.shift
    assert not tokens.cache_for(model, "dkv:shift=0").source.shift


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": True}, "labels was passed"),
        ({"output_hidden_states": True}, "output_hidden_states was passed"),
        ({"logits_to_keep": 2}, "logits_to_keep was passed"),
        ({"cache": True}, "another cache was passed"),
        ({"training": True}, "the model is in training mode"),
    ],
)
def test_forwards_that_cannot_be_cached_run_unchanged(model, change, reason):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    change = dict(change)
    if change.get("labels"):
        change["labels"] = x
    if change.pop("cache", False):
        names = host.parameters(model)
        change["cache" if "cache" in names else "past_key_values"] = transformers.DynamicCache()
    if change.pop("training", False):
        model.train()
    again = {name: copy.deepcopy(value) for name, value in change.items()}
    with torch.no_grad():
        wanted = model(x, **change)
        with diffcache.accelerated(model, "dkv"):
            got = model(x, **again)
            assert diffcache.report(model).passed == {reason: 1}
    assert torch.equal(got.logits, wanted.logits)
    assert (got.hidden_states is None) == (wanted.hidden_states is None)


def test_threads_have_a_canvas_each(model):
    asked = [prompts(1, seed=seed) for seed in range(3)]
    alone = []
    with diffcache.accelerated(model, "dkv:refresh=4"):
        alone = [decode(model, p)[0] for p in asked]
        got: dict[int, torch.Tensor] = {}
        barrier = threading.Barrier(3)

        def run(i):
            barrier.wait()
            got[i] = decode(model, asked[i])[0]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[i], alone[i]) for i in range(3))


def test_a_model_is_freed_while_it_is_accelerated(model):
    import gc
    import weakref

    own = decoder()
    diffcache.accelerate(own, "dkv")
    decode(own, prompts())
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None


def without(model, *names):
    for name in names:
        delattr(model.config, name)
    return model


def bert():
    config = transformers.BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=1, intermediate_size=8)
    return transformers.BertForMaskedLM(config)


def dynamic(model):
    model.config.rope_scaling = model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    return model


def test_a_model_without_positions_leaves_no_trace_and_refuses_depth():
    model = LLaDALike().eval()
    parts = list(model.modules())
    before = [dict(vars(part)) for part in parts]
    with pytest.raises(BadOption, match="take no positions"):
        diffcache.accelerate(model, "elastic")
    with diffcache.accelerated(model, "dual:block=8"):
        decode(model, prompts())
        assert diffcache.report(model).skipped > 0.4
    assert [dict(vars(part)) for part in parts] == before


@pytest.mark.parametrize(
    ("change", "spec", "words"),
    [
        (lambda m: m, "dkw", "no token rule called 'dkw'"),
        (lambda m: m, "dkv:every=2", "Known: refresh, prompt, greedy, window, mask, shift"),
        (lambda m: m, "dkv:mask=-1", "the id of the mask token"),
        (lambda m: m, "dkv:shift=2", "Allowed: 0 or 1"),
        (lambda m: without(m, "mask_token_id"), "dkv", '"dkv,mask=…", or model.config.mask_token_id'),
        (lambda m: without(m, "is_causal"), "dkv", "its attention is causal"),
        (dynamic, "dkv", "dynamic NTK"),
        (lambda m: torch.nn.Linear(2, 2), "dkv", "a token rule was given for a Linear"),
        (lambda m: bert(), "dkv:mask=1", "no cache"),
    ],
)
def test_an_error_says_what_is_wrong_and_changes_nothing(model, change, spec, words):
    network = change(model)
    before = dict(vars(network))
    with pytest.raises(DiffCacheError) as error:
        diffcache.accelerate(network, spec)
    assert words in str(error.value)
    assert vars(network) == before


def test_a_rule_of_another_package_is_passed_as_an_object(model):
    rule = tokens.TokenRule(
        "mine", lambda view, *, every: tokens.Fresh(view.masked | (view.step % every == 0)), {"every": 4}
    )
    with diffcache.accelerated(model, rule):
        decode(model, prompts())
        report = diffcache.report(model)
    assert (report.rule, report.refreshes) == ("mine", 4)
    with pytest.raises(DiffCacheError, match="Did you mean 'every'"):
        diffcache.accelerate(model, tokens.TokenRule("mine", rule.function, {"evry": 4}))
    with pytest.raises(DiffCacheError, match="a token rule was given for a Linear"):
        diffcache.accelerate(torch.nn.Linear(2, 2), rule)


def token_method_of(pipe, schedule):
    """``evaluate`` makes a method of each schedule."""
    return token_method("mine", schedule)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            "uniform:every=2",
            "schedule='uniform:every=2' cannot be used: it predicts whole outputs, and LlamaForCausalLM",
        ),
        (Rule("uniform", options={"every": 2}), "it is a Rule, which predicts whole outputs"),
        ({8: "uniform:every=2"}, "it is a dictionary, which predicts whole outputs"),
        (documents.schedule(), "it is a CacheSchedule, which predicts whole outputs"),
        ("file", "it is a CacheSchedule, which predicts whole outputs"),
        (3, "schedule=3 was given. Allowed: for a language model, a token rule"),
        (None, "schedule=None was given. Allowed: for a language model, a token rule"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["network", "loop", "causal"])
def test_only_token_rules_and_token_schedules_are_for_language_models(kind, schedule, words, tmp_path):
    network = decoder()
    network.config.is_causal = kind == "causal"
    pipe = diffcache.Loop(network, lambda prompt: decode(network, prompt)) if kind == "loop" else network
    if schedule == "file":
        schedule = documents.schedule().save(tmp_path / "s.safetensors")
    before = dict(vars(network))
    for call in (diffcache.accelerate, diffcache.estimate, token_method_of):
        with pytest.raises(BadOption) as error:
            call(pipe, schedule)
        if call is token_method_of:
            words = words.replace(type(network).__name__, "the model")
        for said in (words, *tokens.token_rules(), "diffcache.optimize(diffcache.Loop(model, sample)"):
            assert said in str(error.value)
    assert vars(network) == before


def test_errors_about_a_loop_name_the_loop(model, tmp_path):
    loop = diffcache.Loop(model, lambda prompt: decode(model, prompt))
    idle = diffcache.Loop(model, lambda prompt: prompt)
    calls = [{"prompt": prompts()}] * 2
    for refused, words in (
        (lambda: diffcache.report(loop), "this Loop cannot be used: it is not accelerated"),
        (lambda: diffcache.report(model), "this LlamaForCausalLM cannot be used: it is not accelerated"),
        (lambda: diffcache.optimize(model, calls, 3), "this LlamaForCausalLM cannot be used: it has no function that"),
        (
            lambda: diffcache.optimize(diffcache.Loop(model), calls, 3),
            "this Loop cannot be used: it has no function that",
        ),
        (lambda: diffcache.optimize(idle, calls, 3), "the loop cannot be used: a call runs no forward"),
        (lambda: diffcache.evaluate(model, {"a": "dkv"}, calls, out=tmp_path), "this LlamaForCausalLM cannot be used"),
        (lambda: evaluate_text(torch.nn.Linear(2, 2), {"a": "dkv"}, calls, out=tmp_path), "this Linear cannot be used"),
    ):
        with pytest.raises(DiffCacheError) as error:
            refused()
        assert words in str(error.value)
        assert not any(word in str(error.value) for word in ("RegisteredLoop", "pipe="))


def test_a_pipeline_without_a_mask_id_is_refused_with_the_remedy():
    pipe = pipeline()
    pipe.mask_token_id = None
    del pipe.model.config.mask_token_id
    with pytest.raises(BadOption, match="mask=…"):
        diffcache.accelerate(pipe, "block_causal")


def test_a_model_with_an_encoder_is_refused_with_the_reason():
    class Gemma(torch.nn.Module):
        def get_output_embeddings(self):
            return torch.nn.Linear(2, 2)

        def forward(self, input_ids=None, decoder_input_ids=None, cache=None):
            raise AssertionError

    with pytest.raises(BadOption, match="drawn anew at every step"):
        diffcache.accelerate(Gemma(), "dkv:mask=0")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fastdllm", "That method has the rules 'dual' and 'prefix'."),
        ("Fast-dLLM:block=16", "That method has the rules 'dual' and 'prefix'."),
        ("dllm_cache", "That method has the rule 'dllm'."),
        ("dinfer", "That method has the rule 'vicinity'."),
        ("dkw", "Did you mean 'dkv'?"),
    ],
)
def test_the_name_of_a_paper_leads_to_its_rules(model, spec, words):
    with pytest.raises(UnknownName) as error:
        diffcache.accelerate(model, spec)
    assert words in str(error.value)
    assert ("That method" in str(error.value)) != ("Did you mean" in str(error.value))


def test_an_option_that_is_an_argument_is_named_as_one(model):
    for pipe, spec, kept in (
        (model, "dkv:refresh=8,store=int8", "dkv:refresh=8"),
        (model, "dual:store=int8", "dual"),
        (torch.nn.Linear(2, 2), "uniform:store=int8,every=2", "uniform:every=2"),
    ):
        with pytest.raises(UnknownName) as error:
            diffcache.accelerate(pipe, spec)
        said = f'store is an argument of accelerate: accelerate(pipe, "{kept}", store="int8").'
        assert said in str(error.value)
        assert ("token_method(name, rule, store=" in str(error.value)) == (pipe is model)


def test_auto_has_no_goal_for_a_language_model(model):
    with pytest.raises(BadOption, match=r"auto is 'dkv:refresh=8' .* diffcache\.optimize"):
        diffcache.accelerate(model, "auto:speedup=3")
