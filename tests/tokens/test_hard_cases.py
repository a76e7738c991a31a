"""Masks, branches, networks and settings that a token cache must follow exactly, or refuse."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import MASK, BlockCausal, LLaDALike, decode, decoder, prompts  # noqa: E402

import diffcache  # noqa: E402
from diffcache.errors import DiffCacheError  # noqa: E402

pytestmark = pytest.mark.fast


@pytest.fixture
def model():
    return decoder()


def states(rows=2):
    """Return the tokens of three steps: no answer, one token, two tokens."""
    x = torch.cat([prompts(rows), torch.full((rows, 8), MASK)], 1)
    y, z = x.clone(), x.clone()
    y[:, 9], z[:, 9], z[:, 11] = 5, 5, 6
    return x, y, z


def padding():
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :3] = 0
    return mask


@torch.no_grad()
def third(model, rule, first=None, last=None, **options):
    """Return the logits of the third step, with the arguments ``first`` before and ``last`` in it."""
    x, y, z = states()
    with diffcache.accelerated(model, rule, **options):
        model(x, **(first or {}))
        model(y, **(first or {}))
        return model(z, **((first if last is None else last) or {})).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["keys", "one row", "queries and keys"])
def test_padding_is_never_attended(model, attention, mask):
    model.set_attn_implementation(attention)
    given = padding()
    if mask != "keys":
        added = torch.zeros(2, 1, 1, 16).masked_fill(given[:, None, None] == 0, torch.finfo(torch.float32).min)
        given = added if mask == "one row" else added.expand(2, 1, 16, 16)
    one, other = states()[2], states()[2]
    other[1, :3] = 7  # padded tokens
    got = []
    for z in (one, other):
        with torch.no_grad(), diffcache.accelerated(model, "dkv:refresh=9"):
            x, y, _ = states()
            x[1, :3], y[1, :3] = z[1, :3], z[1, :3]
            model(x, attention_mask=given), model(y, attention_mask=given)
            got.append(model(z, attention_mask=given).logits)
            assert diffcache.report(model).refreshes == 1
    assert torch.equal(got[0][0], got[1][0])
    torch.testing.assert_close(got[0][1, 3:], got[1][1, 3:], atol=2e-6, rtol=0)


@pytest.mark.parametrize("rule", ["dkv:refresh=9", "dual:block=8", "elastic"])
@pytest.mark.parametrize("change", ["mask", "positions"])
def test_other_masks_or_positions_compute_every_position(model, rule, change):
    first = {"attention_mask": torch.ones(2, 16, dtype=torch.long), "position_ids": torch.arange(16).expand(2, 16)}
    last = dict(first)
    if change == "mask":
        last["attention_mask"] = padding()
    else:
        last["position_ids"] = torch.arange(3, 19).expand(2, 16)
    with torch.no_grad():
        wanted = model(states()[2], **last).logits
    torch.testing.assert_close(third(model, rule, first, last), wanted, atol=2e-6, rtol=0)


def test_elastic_takes_the_mask_that_a_tokenizer_makes(model):
    mask = torch.ones(2, 24, dtype=torch.long)
    with diffcache.accelerated(model, "elastic:window=4,gamma=0.9999"):
        got, _ = decode(model, prompts(), mask=mask)
    with diffcache.accelerated(model, "elastic:window=4,gamma=0.9999"):
        wanted, _ = decode(model, prompts())
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_elastic_follows_a_canvas_that_grows(model):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    with diffcache.accelerated(model, "elastic"):
        model(x)
        x[:, 8:] = 5
        longer = torch.cat([x, torch.full((2, 8), MASK)], 1)
        got = model(longer).logits
    torch.testing.assert_close(got, model(longer).logits, atol=2e-6, rtol=0)


@torch.no_grad()
def test_weights_that_change_are_seen(model):
    _, y, _ = states()
    with diffcache.accelerated(model, "full"):
        model(states()[0])
        model(y)
        model.lm_head.weight.mul_(0.5)
        got = model(y).logits
    assert torch.equal(got, model(y).logits)


@torch.no_grad()
@pytest.mark.parametrize("first", ["with the prompt", "without it"])
def test_branches_of_guidance_do_not_mix(model, first):
    """LLaDA's guidance: in one of two forwards of a step, the prompt is masked."""

    def run(branches):
        x = torch.cat([prompts(1), torch.full((1, 8), MASK)], 1)
        seen = {branch: [] for branch in branches}
        for step in range(8):
            for branch in branches:
                given = x.clone()
                if branch == "without it":
                    given[:, :8] = MASK
                seen[branch].append(model(given).logits)
            x[:, 8 + step] = 5 + step
        return seen

    order = ("with the prompt", "without it")
    exact = run(order)
    with diffcache.accelerated(model, "dkv:refresh=4"):
        together = run(order if first == order[0] else order[::-1])
    for branch in order:
        with diffcache.accelerated(model, "dkv:refresh=4"):
            alone = run([branch])
        if first == order[0]:
            assert all(map(torch.equal, together[branch], alone[branch]))
        else:  # the second forward looks like a commit of the prompt, so its refreshes come one step earlier
            errors = [
                sum(float((a - b).abs().mean()) for a, b in zip(found[branch], exact[branch], strict=True))
                for found in (together, alone)
            ]
            assert errors[0] < 1.3 * errors[1]


@torch.no_grad()
def test_a_canvas_of_another_prompt_is_dropped(model):
    with diffcache.accelerated(model, "dkv"):
        decode(model, prompts(1))
        one = diffcache.report(model).bytes_held
        for seed in range(4):
            decode(model, prompts(1, seed=seed + 5))
        assert diffcache.report(model).bytes_held == one
        assert diffcache.report(model).canvases == 1


@pytest.mark.parametrize("store", ["bf16", "fp8", "int8", "int4"])
def test_every_format_decodes(model, store):
    exact = third(model, "dkv:refresh=9")
    kept = third(model, "dkv:refresh=9", store=store)
    assert 0 < (kept - exact).abs().mean() / exact.std() < 0.3


def hidden(model, **settings):
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("prepare", "call", "reason"),
    [
        (lambda m: hidden(m, output_hidden_states=True), {}, "config.output_hidden_states is on"),
        (lambda m: m, {"use_cache": True}, "use_cache was passed"),
        (lambda m: LLaDALike().eval(), {"attention_mask": {"full_attention": None}}, "attention_mask is a dictionary"),
    ],
)
def test_what_cannot_be_cached_is_passed_and_counted(model, prepare, call, reason):
    model = prepare(model)
    with torch.no_grad(), diffcache.accelerated(model, "dkv"):
        model(states()[0], **call)
        (found,) = diffcache.report(model).passed
    assert reason in found


def test_gradients_are_those_of_the_model(model):
    x = states()[1]
    model(x).logits.sum().backward()
    wanted = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with diffcache.accelerated(model, "dkv"):
        model(x).logits.sum().backward()
        assert diffcache.report(model).passed == {"gradients are enabled": 1}
    assert torch.equal(model.lm_head.weight.grad, wanted)


class Deaf(BlockCausal):
    """Takes a cache, and leaves it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, None, **kwargs)


class Bare(BlockCausal):
    """Returns its logits as a tensor."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs).logits


@pytest.mark.parametrize(("kind", "words"), [(Deaf, "did not write their keys"), (Bare, "without logits")])
def test_a_network_that_does_not_keep_the_contract_is_refused_in_its_first_forward(kind, words):
    model = decoder(kind)
    with torch.no_grad(), diffcache.accelerated(model, "dkv"), pytest.raises(DiffCacheError, match=words):
        model(states()[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sliding_window": 4}, "a sliding window of 4 positions"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "full_attention, sliding"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic NTK"),
        ({"model_type": "opt"}, "positions from the attention mask"),
    ],
)
def test_a_network_with_keys_that_become_wrong_is_refused(model, settings, words):
    for name, value in settings.items():
        model.config.__dict__[name] = value
    with pytest.raises(DiffCacheError, match=words):
        diffcache.accelerate(model, "dkv")
    assert "forward" not in vars(model)


def test_depth_is_refused_in_a_compiled_model(model):
    model.compile(backend="eager")
    with pytest.raises(DiffCacheError, match="compiled"):
        diffcache.accelerate(model, "elastic")
