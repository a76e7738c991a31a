"""Savings that leave every token of a loop as it is: logits at masks only, and forwards that change nothing."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import MASK, BlockCausal, LLaDALike, decode, decoder, prompts  # noqa: E402

import diffcache  # noqa: E402
from diffcache.errors import DiffCacheError  # noqa: E402
from diffcache.tokens import Fresh, TokenRule, parse_token_rule  # noqa: E402

pytestmark = pytest.mark.fast
PROMPT, ANSWER = 8, 16


@pytest.fixture(params=["with positions", "LLaDA"])
def model(request):
    return decoder() if request.param == "with positions" else LLaDALike().eval()


def llada(model):
    return decode(model, prompts())[0]


def several_tokens(model):
    return decode(model, prompts(3), per_step=2)[0]


@torch.no_grad()
def threshold(model):
    """Commit every mask with a probability above a threshold, at least one of each row: rows finish apart."""
    x = torch.cat([prompts(3), torch.full((3, ANSWER), MASK)], 1)
    while (x == MASK).any():
        found, token = model(x).logits[..., 1:].softmax(-1).max(-1)
        found = found.masked_fill(x != MASK, -1)
        best = torch.zeros_like(x, dtype=torch.bool).scatter(1, found.argmax(1, keepdim=True), True)
        x = torch.where(((found > 0.6) | best) & (x == MASK), token + 1, x)
    return x


@torch.no_grad()
def random_times(model):
    """Reveal each mask with a probability, as in ancestral sampling: some steps reveal none."""
    x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
    draw = torch.Generator().manual_seed(0)
    for step in range(40):
        token = model(x).logits[..., 1:].argmax(-1) + 1
        shown = torch.rand(x.shape, generator=draw) < 1 / (40 - step) ** 1.5
        x = torch.where((x == MASK) & shown, token, x)
    return x


@torch.no_grad()
def guided(model):
    """LLaDA's guidance: a second forward of each step masks the prompt."""
    x = torch.cat([prompts(1), torch.full((1, ANSWER), MASK)], 1)
    for _ in range(ANSWER):
        without = x.clone()
        without[:, :PROMPT] = MASK
        with_prompt, alone = model(x).logits, model(without).logits
        found, token = (2 * with_prompt - alone)[..., 1:].softmax(-1).max(-1)
        best = found.masked_fill(x != MASK, -1).argmax(1)
        x[0, best] = token[0, best] + 1
    return x


LOOPS = [llada, several_tokens, threshold, random_times, guided]


@pytest.mark.parametrize("loop", LOOPS)
def test_full_decodes_the_same_tokens_in_every_loop(model, loop):
    wanted = loop(model)
    with diffcache.accelerated(model, "full:logits=masks,repeat=1"):
        assert torch.equal(loop(model), wanted)


@pytest.mark.parametrize("rule", ["dkv:refresh=4", "dual:block=8", "dllm:gen_interval_steps=3"])
@pytest.mark.parametrize("loop", [llada, threshold])
def test_other_rules_decode_the_same_tokens_as_without_the_option(model, loop, rule):
    with diffcache.accelerated(model, rule):
        wanted = loop(model)
    with diffcache.accelerated(model, f"{rule},logits=masks" if ":" in rule else f"{rule}:logits=masks"):
        assert torch.equal(loop(model), wanted)


@pytest.mark.parametrize("gamma", [0, 0.999, 1])
def test_elastic_projects_the_masks_of_its_last_layer(gamma):
    model = decoder()
    with diffcache.accelerated(model, f"elastic:window=4,gamma={gamma}"):
        wanted = llada(model)
    with diffcache.accelerated(model, f"elastic:window=4,gamma={gamma},logits=masks"):
        assert torch.equal(llada(model), wanted)
        report = diffcache.report(model)
    assert report.projected < report.computed


@pytest.mark.parametrize("form", ["logits=masks", "logits=masks,shift=1"])
def test_only_the_rows_that_decode_masks_are_projected(model, form):
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    shift = "shift" in form
    wanted, plain = decode(model, prompts(1), shift=shift)
    with diffcache.accelerated(model, f"full:{form}"):
        rows.clear()
        got, seen = decode(model, prompts(1), shift=shift)
        report = diffcache.report(model)
    hook.remove()
    assert torch.equal(got, wanted)
    masks = [ANSWER - step for step in range(ANSWER)]
    assert rows == masks
    assert (report.projected, report.computed) == (sum(masks), ANSWER * (PROMPT + ANSWER))
    assert f"{sum(masks):,} of" in str(report)
    x = torch.cat([prompts(1), torch.full((1, ANSWER), MASK)], 1)[0] == MASK
    read = torch.cat([x[1:], x[:1]]) if shift else x
    torch.testing.assert_close(seen[0][0, read], plain[0][0, read], atol=2e-6, rtol=0)
    assert not seen[0][0, ~read][:, 1:].any()  # rows that were never computed are zeros


def test_a_loop_that_reads_other_rows_sees_the_difference(model):
    """Plant the misuse that the option excludes: a loop that edits decoded tokens reads their logits."""

    @torch.no_grad()
    def editing(model):
        x = llada(model)
        for _ in range(3):
            x = torch.where(torch.arange(x.shape[1]) < PROMPT, x, model(x).logits[..., 1:].argmax(-1) + 1)
        return x

    wanted = editing(model)
    with diffcache.accelerated(model, "full:repeat=1"):
        assert torch.equal(editing(model), wanted)
    with diffcache.accelerated(model, "full:logits=masks"):
        assert not torch.equal(editing(model), wanted)


def test_steps_that_reveal_nothing_do_not_run(model):
    ran = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: ran.append(1))
    states = []
    undo = diffcache.patch.layer(model, "forward", lambda inner, x: (states.append(x.clone()), inner(x))[1])
    wanted = random_times(model)
    undo()
    same = sum(torch.equal(a, b) for a, b in zip(states[1:], states, strict=False))
    assert 0 < same < 39
    assert torch.equal(states[0], states[1])  # also before the first token
    with diffcache.accelerated(model, "full:repeat=1"):
        ran.clear()
        assert torch.equal(random_times(model), wanted)
        report = diffcache.report(model)
    hook.remove()
    assert (len(ran), report.repeated, report.forwards) == (40 - same, same, 40)


def test_the_pipeline_that_edits_tokens_writes_the_same_text():
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "LLaDA2Pipeline"):
        pytest.skip("this diffusers has no LLaDA2Pipeline")
    pipe = diffusers.LLaDA2Pipeline(decoder(BlockCausal), diffusers.BlockRefinementScheduler(block_length=8))
    pipe.set_progress_bar_config(disable=True)
    pipe.mask_token_id = MASK
    call = {
        "input_ids": prompts(2, 13),
        "gen_length": 27,
        "threshold": 0.3,
        "editing_threshold": 0.4,
        "max_post_steps": 4,
        "num_inference_steps": 8,
        "sampling_method": "greedy",
        "eos_token_id": 1,
        "output_type": "seq",
    }
    wanted = pipe(**call).sequences
    with diffcache.accelerated(pipe, "full:repeat=1"):
        assert torch.equal(pipe(**call).sequences, wanted)


@pytest.mark.parametrize("change", ["in place", "another tensor"])
@torch.no_grad()
def test_weights_that_change_are_seen(model, change):
    x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
    x[:, 12] = 5
    head = model.get_output_embeddings()
    with diffcache.accelerated(model, "full:repeat=1"):
        model(x)
        if change == "in place":
            head.weight.mul_(0.5)
        else:
            head.weight = torch.nn.Parameter(head.weight * 0.5, requires_grad=False)
        got = model(x).logits
        assert diffcache.report(model).repeated == 0
    assert torch.equal(got, model(x).logits)


@torch.no_grad()
def test_a_forward_that_does_not_run_is_not_a_step(model):
    seen = []

    def rule(view):
        seen.append(view.step)
        return Fresh(view.masked | view.changed)

    x = torch.cat([prompts(), torch.full((2, ANSWER), MASK)], 1)
    with diffcache.accelerated(model, TokenRule("own", rule, repeat=True)):
        for place in (9, 10, 11):
            model(x)
            model(x)
            x[:, place] = 5
    assert seen == [1, 2]


def test_logits_take_two_values():
    with pytest.raises(DiffCacheError, match="all, masks"):
        parse_token_rule("full:logits=block")
