"""dLLM-Cache: prompt and response are refreshed apart, and each layer computes the tokens with changed values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

transformers = pytest.importorskip("transformers")

from decoders import MASK, LLaDABlock, LLaDALike, decode, decoder, prompts  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

import diffcache  # noqa: E402
from diffcache.errors import BadOption, DiffCacheError  # noqa: E402
from diffcache.tokens import parse_token_rule  # noqa: E402
from diffcache.tokens.engine import TokenCache  # noqa: E402

pytestmark = pytest.mark.fast
PROMPT, ANSWER = 8, 16


@pytest.fixture(params=["with positions", "LLaDA"])
def model(request):
    return decoder() if request.param == "with positions" else LLaDALike().eval()


class Reference:
    """The released code of dLLM-Cache for one row of LLaDA: keys, values, attention and feed-forward are kept apart."""

    def __init__(self, model, every_prompt, every_response, ratio, full_layers):
        self.model, self.ratio, self.full_layers = model, ratio, full_layers
        self.every = every_prompt, every_response
        self.step, self.kept = 0, [{} for _ in model.blocks]

    def logits(self, ids):
        """Return the logits of one row, [N, V]."""
        prompt, response = (self.step % every == 0 for every in self.every)
        x = self.model.wte(ids)
        for number, (block, kept) in enumerate(zip(self.model.blocks, self.kept, strict=True)):
            x = self.block(block, kept, x, prompt, response or number < self.full_layers)
        self.step += 1
        return 4 * self.model.ff_out(x)

    def block(self, block, kept, x, prompt, response):
        normed, n = block.attn_norm(x), len(x)
        if not kept:
            kept.update(k=block.k_proj(normed), v=block.v_proj(normed), attention=torch.zeros_like(x))
            kept["ff"] = torch.zeros_like(x)
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[:PROMPT], chosen[PROMPT:] = prompt, response
        if not response:
            new = block.v_proj(normed[PROMPT:])
            alike = functional.cosine_similarity(new, kept["v"][PROMPT:], dim=-1)
            alike = torch.where(alike > 1 - 1e-6, 1, alike)
            chosen[PROMPT + alike.argsort(stable=True)[: int(self.ratio * (n - PROMPT))]] = True
            kept["v"][PROMPT:] = new
        kept["k"][chosen], kept["v"][chosen] = block.k_proj(normed[chosen]), block.v_proj(normed[chosen])

        def heads(rows):
            return rows.view(1, n, block.heads, -1).transpose(1, 2)

        q, k = block.rotary_emb(heads(block.q_proj(normed)), heads(kept["k"]))
        attended = functional.scaled_dot_product_attention(q, k, heads(kept["v"]))[0].transpose(0, 1).reshape(n, -1)
        kept["attention"][chosen] = block.attn_out(attended)[chosen]
        x = x + kept["attention"]
        kept["ff"][chosen] = block.ff(x)[chosen]
        return x + kept["ff"]


@torch.no_grad()
def test_the_logits_are_those_of_the_released_code():
    model = LLaDALike().eval()
    for options in ((5, 3, 0.25, 0), (2, 4, 0.5, 1), (100, 7, 0.25, 1)):
        spec = "dllm:prompt_interval_steps={},gen_interval_steps={},transfer_ratio={},full_layers={}".format(*options)
        references = [Reference(model, *options) for _ in range(2)]
        seen = []
        with diffcache.accelerated(model, spec):
            x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
            order = torch.stack([torch.randperm(ANSWER, generator=torch.Generator().manual_seed(i)) for i in range(2)])
            for step in range(ANSWER):
                got = model(x).logits[:, PROMPT:]
                wanted = torch.stack([one.logits(row)[PROMPT:] for one, row in zip(references, x, strict=True)])
                seen.append(float((got - wanted).abs().max()))
                for row in range(2):
                    x[row, PROMPT + order[row, step]] = 1 + (step * 3 + row) % 19
        assert max(seen) < 2e-5, (options, seen)


class PairBlock(LLaDABlock):
    """A block that returns its output and a cache, as LLaDA's do."""

    def forward(self, x):
        return super().forward(x), None


class Pairs(LLaDALike):
    """A network of such blocks."""

    def __init__(self):
        super().__init__()
        weights = self.blocks.state_dict()
        self.blocks = nn.ModuleList(PairBlock(32, 4) for _ in range(3))
        self.blocks.load_state_dict(weights)

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        x = self.wte(input_ids)
        for block in self.blocks:
            x, _ = block(x)
        return CausalLMOutputWithPast(logits=4 * self.ff_out(x))


def test_blocks_that_return_a_tuple_give_the_same_logits():
    seen = []
    for model in (LLaDALike().eval(), Pairs().eval()):
        with diffcache.accelerated(model, "dllm:gen_interval_steps=3,full_layers=1"):
            seen.append(decode(model, prompts())[1])
            assert diffcache.report(model).skipped > 0.3
    assert all(map(torch.equal, *seen))


@torch.no_grad()
def test_a_step_of_all_tokens_is_exact(model):
    _, plain = decode(model, prompts())
    with diffcache.accelerated(model, "dllm:prompt_interval_steps=1,gen_interval_steps=3,transfer_ratio=1"):
        _, seen = decode(model, prompts())
        assert diffcache.report(model).skipped == 0
    for a, b in zip(seen, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_prompt_and_response_are_refreshed_apart(model):
    with diffcache.accelerated(model, "dllm:prompt_interval_steps=6,gen_interval_steps=4,transfer_ratio=0.25"):
        decode(model, prompts(1, PROMPT), ANSWER, block=16)
        report = diffcache.report(model)
    size = PROMPT + ANSWER
    wanted = [(PROMPT if step % 6 == 0 else 0) + (ANSWER if step % 4 == 0 else ANSWER // 4) for step in range(ANSWER)]
    assert [round(share * size) for share in report.shares] == wanted
    assert (report.computed, report.refreshes) == (sum(wanted), 2)  # all positions at steps 0 and 12


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_committed_token_is_computed_in_the_first_layer(model, masked):
    size, mask = PROMPT + ANSWER, None
    if masked:  # block-causal, so that every query has another mask
        mask = (torch.arange(size)[:, None] // 4 >= torch.arange(size)[None] // 4).expand(2, 1, size, size)
    x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
    later = x.clone()
    later[0, 11], later[1, 20] = 5, 7

    def added(*steps):
        """Return what layer 0 adds in the last of some steps."""
        cache = TokenCache(model, parse_token_rule("dllm:transfer_ratio=0.07"), MASK)  # one token
        cache.attach()
        try:
            for ids in steps:
                model(ids, attention_mask=mask)
            return cache.canvas.shares.added[0]
        finally:
            cache.detach()

    before, after, exact = added(x), added(x, later), added(later)
    moved = (after - before).abs().amax(-1) > 0
    assert [row.nonzero().flatten().tolist() for row in moved] == [[11], [20]]
    for row, place in enumerate((11, 20)):
        torch.testing.assert_close(after[row, place], exact[row, place], atol=2e-6, rtol=0)


@pytest.mark.parametrize("store", [None, "int8"])
def test_rows_of_a_batch_do_not_depend_on_each_other(model, store):
    together = prompts(3)
    together[1, :3] = MASK  # masks in the prompt: this row has a longer response
    spec = "dllm:prompt_interval_steps=6,gen_interval_steps=4"
    with diffcache.accelerated(model, spec, store=store):
        wanted, seen = decode(model, together)
        for row in range(3):
            got, alone = decode(model, together[row : row + 1])
            assert torch.equal(got, wanted[row : row + 1])
            for a, b in zip(alone, seen, strict=True):
                torch.testing.assert_close(a[0], b[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["keys", "queries and keys"])
@torch.no_grad()
def test_padding_is_never_attended(form):
    model = decoder()
    mask = torch.ones(2, PROMPT + ANSWER, dtype=torch.long)
    mask[1, :3] = 0
    if form != "keys":
        mask = mask.bool()[:, None, None].expand(2, 1, PROMPT + ANSWER, -1)
    got = []
    for padded in (7, 9):
        given = prompts()
        given[1, :3] = padded
        with diffcache.accelerated(model, "dllm:gen_interval_steps=5"):
            got.append(decode(model, given, mask=mask)[1])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a[:, 3:], b[:, 3:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_canvas_that_grows_and_a_mask_that_changes_compute_every_position():
    model = decoder()
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    with diffcache.accelerated(model, "dllm"):
        model(x)
        x[:, 9] = 5
        model(x)
        longer = torch.cat([x, torch.full((2, 8), MASK)], 1)
        longer[:, 10] = 6
        got = model(longer).logits
        mask = torch.ones_like(longer)
        mask[1, :3] = 0
        masked = model(longer, attention_mask=mask).logits
        assert diffcache.report(model).refreshes == 3
    torch.testing.assert_close(got, model(longer).logits, atol=2e-6, rtol=0)
    torch.testing.assert_close(masked, model(longer, attention_mask=mask).logits, atol=2e-6, rtol=0)


def test_restore_leaves_no_trace(model):
    parts = list(model.modules())
    before = [dict(vars(part)) for part in parts]
    with diffcache.accelerated(model, "dllm"):
        decode(model, prompts())
        assert diffcache.report(model).bytes_held > 0
    assert [dict(vars(part)) for part in parts] == before


def test_layers_without_a_projection_of_values_are_refused():
    model = decoder()
    for block in model.model.layers:
        block.self_attn.values = block.self_attn.v_proj
        del block.self_attn.v_proj
    with pytest.raises(DiffCacheError, match="has no v_proj"):
        diffcache.accelerate(model, "dllm")
    assert "forward" not in vars(model)


@torch.no_grad()
def test_layers_that_keep_other_values_are_refused_in_the_first_forward():
    model = decoder()
    inner = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: inner(hidden_states * 0.5, **kwargs)
    with diffcache.accelerated(model, "dllm"), pytest.raises(DiffCacheError, match="layer 1"):
        decode(model, prompts())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("dllm:transfer_ratio=0", "a number above 0, at most 1"),
        ("dllm:transfer_ratio=1.5", "a number above 0, at most 1"),
        ("dllm:gen_interval_steps=0", "at least 1"),
        ("dllm:full_layers=-1", "at least 0"),
        ("dllm:prompt_interval_steps=0.5", "at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused(spec, words):
    with pytest.raises(BadOption, match=words):
        parse_token_rule(spec)
