"""Settings that change during a canvas, and models and options that a token rule must refuse."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import CACHE, MASK, VOCABULARY, BlockCausal, LLaDALike, decode, decoder, prompts  # noqa: E402

import diffcache  # noqa: E402
from diffcache.errors import BadOption, DiffCacheError  # noqa: E402

pytestmark = pytest.mark.fast
PROMPT, ANSWER = 8, 16


@pytest.fixture(params=["with positions", "LLaDA"])
def model(request):
    return decoder() if request.param == "with positions" else LLaDALike().eval()


@pytest.mark.parametrize("rule", ["dkv:refresh=9", "dllm", "dkv:refresh=9,logits=masks"])
@pytest.mark.parametrize("change", ["autocast on", "autocast off", "weights"])
@torch.no_grad()
def test_another_precision_computes_every_position(model, rule, change):
    x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
    later = x.clone()
    later[:, 9] = 5
    first, last = change == "autocast off", change == "autocast on"

    def called(ids, on):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            return model(ids).logits

    with diffcache.accelerated(model, rule):
        called(x, first)
        if change == "weights":
            model.bfloat16()
        got = called(later, last)
        assert diffcache.report(model).refreshes == 2
    masked = later == MASK
    assert got.dtype == called(later, last).dtype
    assert torch.equal(got[masked], called(later, last)[masked])


class Causal(transformers.LlamaForCausalLM):
    """A decoder of another package that attends to earlier positions, in spite of its configuration."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        mask = position_ids[:, None, :, None] >= torch.arange(input_ids.shape[1])
        return super().forward(
            input_ids, attention_mask=mask, position_ids=position_ids, **{CACHE: past_key_values}, **kwargs
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_causal_decoder_of_another_package_is_refused(precision):
    model = decoder(Causal).to(precision)
    with pytest.raises(DiffCacheError, match="do not depend on the tokens after it"):
        diffcache.accelerate(model, "dkv")
    assert "forward" not in vars(model)
    for other in (decoder(BlockCausal), LLaDALike().eval()):
        with diffcache.accelerated(other.to(precision), "dkv"):
            pass


def test_a_rule_that_replaces_another_leaves_the_old_one_if_it_is_refused(model):
    diffcache.accelerate(model, "dkv")
    decode(model, prompts())
    with pytest.raises(DiffCacheError):
        diffcache.accelerate(model, f"dual:mask={VOCABULARY}", replace=True)
    assert diffcache.report(model).rule == "dkv"
    diffcache.accelerate(model, "dual", replace=True)
    diffcache.restore(model)


@pytest.mark.parametrize("where", ["the rule", "the configuration"])
def test_a_mask_id_outside_of_the_vocabulary_is_refused(model, where):
    spec = "dkv"
    if where == "the rule":
        spec = f"dkv:mask={VOCABULARY}"
    else:
        model.config.mask_token_id = VOCABULARY
    with pytest.raises(BadOption, match=f"from 0 to {VOCABULARY - 1}"):
        diffcache.accelerate(model, spec)
    with diffcache.accelerated(model, f"dkv:mask={VOCABULARY - 1}"):
        pass


@pytest.mark.skipif(not hasattr(transformers, "AttentionInterface"), reason="this transformers has no such interface")
def test_the_observed_attention_is_registered_while_a_model_uses_it():
    def registered():
        return [name for name in transformers.AttentionInterface() if name.startswith("diffcache")]

    one, other = decoder(), decoder()
    other.set_attn_implementation("eager")
    third = decoder()
    before = registered()
    assert before == []
    diffcache.accelerate(one, "elastic")
    diffcache.accelerate(other, "elastic")
    diffcache.accelerate(third, "elastic")
    assert sorted(registered()) == ["diffcache_eager", "diffcache_sdpa"]
    diffcache.restore(one)
    diffcache.restore(other)
    assert registered() == ["diffcache_sdpa"]
    decode(third, prompts())
    diffcache.restore(third)
    diffcache.restore(third)
    assert registered() == []
    with pytest.raises(DiffCacheError):
        diffcache.accelerate(one, "elastic:window=0")
    assert registered() == []
