"""Elastic-Cache: a window of masks, and refreshes from the layer on at which attention has drifted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("this transformers has no AttentionInterface", allow_module_level=True)

from decoders import MASK, decode, decoder, prompts  # noqa: E402

import diffcache  # noqa: E402
from diffcache.errors import BadOption  # noqa: E402
from diffcache.tokens import Fresh, TokenRule, parse_token_rule  # noqa: E402
from diffcache.tokens.engine import TokenCache  # noqa: E402

pytestmark = pytest.mark.fast
LAYERS = 3


@pytest.fixture
def model():
    return decoder()


def canvas_of(rows=2):
    x = torch.cat([prompts(rows), torch.full((rows, 16), MASK)], 1)
    later = x.clone()
    later[:, 9] = 5
    return x, later


def two_steps(model, start, mask=None):
    """Return the logits of a second step that refreshes from layer ``start`` on (an array: by row), and the cache."""
    x, later = canvas_of()
    starts = np.broadcast_to(np.asarray(start), (2,)).copy()
    rule = TokenRule("planned", lambda view: Fresh(view.changed, start=starts), needs="depth")
    cache = TokenCache(model, rule, MASK)
    cache.attach()
    try:
        with torch.no_grad():
            model(x, attention_mask=mask)
            return model(later, attention_mask=mask).logits, cache
    finally:
        cache.detach()


@pytest.mark.parametrize("padded", [False, True])
def test_a_refresh_from_layer_0_is_a_full_refresh(model, padded):
    mask = None
    if padded:
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[1, :3] = 0
    with torch.no_grad():
        wanted = model(canvas_of()[1], attention_mask=mask).logits
    got, _ = two_steps(model, 0, mask=mask)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


def test_a_later_refresh_is_farther_from_the_full_one(model):
    with torch.no_grad():
        wanted = model(canvas_of()[1]).logits
    errors = [float((two_steps(model, start)[0] - wanted).abs().mean()) for start in range(LAYERS + 1)]
    assert errors[0] < 1e-6 < errors[1] < errors[3]


def test_a_refresh_equals_the_layers_run_by_hand(model):
    """From layer 1 on: the kept inputs of layer 1, with the new row of the changed token, through layers 1 and 2."""
    x, later = canvas_of()
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(x)
        for hook in hooks:
            hook.remove()
        (embedded, arguments), (hidden, _), _ = seen
        plain = {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values")}
        embedded, hidden = embedded.clone(), hidden.clone()
        embedded[:, 9] = model.model.embed_tokens(later)[:, 9]
        first, *others = model.model.layers
        hidden[:, 9] = first(embedded, **plain)[:, 9]
        for block in others:
            hidden = block(hidden, **plain)
        wanted = model.lm_head(model.model.norm(hidden))
    got, cache = two_steps(model, 1)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
    assert cache.canvas.counts.computed == 48 + round(2 + 2 / 3 * 46)


def test_rows_refresh_alone(model):
    mixed, _ = two_steps(model, np.array([1, LAYERS]))
    every, _ = two_steps(model, 1)
    none, _ = two_steps(model, LAYERS)
    torch.testing.assert_close(mixed[0], every[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(mixed[1], none[1], atol=2e-6, rtol=0)
    assert (every[1] - none[1]).abs().max() > 1e-3


def test_gamma_0_never_refreshes_and_computes_the_window(model):
    with diffcache.accelerated(model, "elastic:window=4,gamma=0"):
        decode(model, prompts(1), answer=16, block=16)
        report = diffcache.report(model)
    assert report.refreshes == 1
    # at most: 4 masks, the token committed last, one tracked token for each layer
    assert all(share <= (4 + 1 + LAYERS) / 24 for share in report.shares[1:])
    assert all(share >= 5 / 24 for share in report.shares[1:-4])


def test_a_larger_gamma_refreshes_more_layers(model):
    work = []
    for gamma in (0, 0.9, 0.99, 0.9999):
        with diffcache.accelerated(model, f"elastic:window=4,gamma={gamma}"):
            decode(model, prompts(1), answer=16, block=16)
            work.append(diffcache.report(model).computed)
    assert work == sorted(work)
    assert work[0] < work[-1]


def test_the_test_compares_rows_of_attention(model):
    """The cosine of the first layer, by hand: eager attention with and without the changed token."""
    model.config._attn_implementation = "eager"
    seen = []
    x, later = canvas_of(1)
    cache = TokenCache(model, parse_token_rule("elastic:window=4,gamma=0.5"), MASK)
    cache.attach()
    inner = torch.nn.functional.cosine_similarity

    def watched(a, b, dim):
        seen.append((a, b))
        return inner(a, b, dim=dim)

    try:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            model(x)
            tracked = cache.canvas.drift.tracked[0]
            patch.setattr(torch.nn.functional, "cosine_similarity", watched)
            model(later)
    finally:
        cache.detach()
    with torch.no_grad():
        then = model(x, output_attentions=True).attentions[0][:, :, tracked[0]]
        # of layer 0, every key depends on its own token alone
        now = model(later, output_attentions=True).attentions[0][:, :, tracked[0]]
    torch.testing.assert_close(seen[0][0][:, :, 0], now, atol=2e-6, rtol=0)
    torch.testing.assert_close(seen[0][1][:, :, 0], then, atol=2e-6, rtol=0)


def test_the_most_attended_decoded_token_is_tracked(model):
    x = torch.cat([prompts(8), torch.full((8, 16), MASK)], 1)
    x[:, 20:] = prompts(8, 4, seed=3)  # some decoded tokens lie right of the masks
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[MASK] = embeddings[x[0, 0]]  # masks receive as much as a token
    cache = TokenCache(model, parse_token_rule("elastic:window=4"), MASK)
    cache.attach()
    with torch.no_grad():
        model(x)
    tracked = cache.canvas.drift.tracked
    cache.detach()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = model(x, output_attentions=True).attentions
    received = [w[:, :, 8:12].sum((1, 2)) for w in weights]
    masked = x == MASK
    assert any(masked.gather(1, row.argmax(1, keepdim=True)).any() for row in received), (
        "no mask receives most anywhere"
    )
    for number, row in enumerate(received):
        assert tracked[number].tolist() == row.masked_fill(masked, 0).argmax(1).tolist()


@pytest.mark.parametrize("gamma", [0.9, 0.999])
def test_rows_of_a_batch_do_not_depend_on_each_other(model, gamma):
    together = prompts(3)
    with diffcache.accelerated(model, f"elastic:window=4,gamma={gamma}"):
        wanted, _ = decode(model, together)
        alone = [decode(model, together[row : row + 1])[0] for row in range(3)]
    assert torch.equal(torch.cat(alone), wanted)


def test_restore_leaves_no_trace(model):
    parts = list(model.modules())
    before = [dict(vars(part)) for part in parts]
    wanted, _ = decode(model, prompts())
    with diffcache.accelerated(model, "elastic"):
        decode(model, prompts())
    assert [dict(vars(part)) for part in parts] == before
    assert all(part.config is model.config for part in parts if hasattr(part, "layer_idx") and hasattr(part, "config"))
    assert torch.equal(decode(model, prompts())[0], wanted)


def test_another_model_with_the_same_configuration_is_not_observed(model):
    other = transformers.LlamaForCausalLM(model.config).eval()
    wanted, _ = decode(other, prompts())
    with diffcache.accelerated(model, "elastic"):
        assert torch.equal(decode(other, prompts())[0], wanted)


def test_a_mask_that_changes_computes_every_position(model):
    x, later = canvas_of()
    mask = torch.ones_like(x)
    with torch.no_grad():
        changed = mask.clone()
        changed[:, :4] = 0
        wanted = model(later, attention_mask=changed).logits
        with diffcache.accelerated(model, "elastic"):
            model(x, attention_mask=mask)
            assert torch.equal(model(later, attention_mask=changed).logits, wanted)


@pytest.mark.parametrize(
    ("spec", "words"), [("elastic:gamma=2", "a number from 0 to 1"), ("elastic:window=0", "at least 1")]
)
def test_an_option_out_of_range_is_refused(model, spec, words):
    with pytest.raises(BadOption, match=words):
        diffcache.accelerate(model, spec)
