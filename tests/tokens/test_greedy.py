"""dKV-Cache-Greedy: a constant number of positions in each step, for loops that choose their positions in advance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from decoders import MASK, LLaDALike, decoder, prompts

import diffcache
from diffcache import tokens
from diffcache.errors import BadOption
from diffcache.tokens import View, parse_token_rule

pytestmark = pytest.mark.fast
PROMPT, ANSWER = 8, 16


@pytest.fixture(params=["with positions", "LLaDA"])
def model(request):
    return decoder() if request.param == "with positions" else LLaDALike().eval()


def released(masked, chosen, centres, window):
    """Return the fresh set of one row as the released code makes it: its pointers step left and right in turns."""
    found = chosen.copy()
    for centre in centres:
        left, right, count, turn = centre - 1, centre + 1, 0, True
        while count < window and not (left < 0 and right > len(found)):
            if turn:
                if left >= 0 and not found[left] and masked[left]:
                    found[left], count = True, count + 1
                left -= 1
            else:
                if right < len(found) and not found[right] and masked[right]:
                    found[right], count = True, count + 1
                right += 1
            turn = not turn
    return found


@pytest.mark.parametrize("announces", [False, True])
def test_the_positions_are_those_of_the_released_code(announces):
    random = np.random.default_rng(0)
    for window in (0, 1, 4, 6):
        rule = parse_token_rule(f"dkv:greedy=true,window={window},refresh=9")
        for _ in range(50):
            masked = random.random((2, 24)) < 0.6
            masked[:, 10:13] = True, False, True
            changed = ~masked & (random.random((2, 24)) < 0.2)
            changed[:, 11] = True
            following = masked & (random.random((2, 24)) < 0.2)
            following[:, 10] = True
            view = View(
                step=1,
                masked=masked,
                changed=changed,
                prompt=np.zeros_like(masked),
                announced=following if announces else None,
            )
            got = rule.fresh(view).positions
            for row in range(2):
                if announces:
                    chosen, centres = changed[row] | following[row], np.flatnonzero(following[row])
                else:
                    chosen, centres = changed[row], np.flatnonzero(changed[row])
                assert got[row].tolist() == released(masked[row], chosen, centres, window).tolist()


@torch.no_grad()
def decode_in_order(model, prompt, announces=True, per_step=1):
    """Decode in a random order that is known in advance. Return the tokens, and the logits of the positions decoded."""
    x = torch.cat([prompt, torch.full((len(prompt), ANSWER), MASK)], 1)
    draw = torch.Generator().manual_seed(3)
    order = PROMPT + torch.stack([torch.randperm(ANSWER, generator=draw) for _ in prompt])
    seen = []
    for places in order.split(per_step, 1):
        if announces:
            tokens.announce(model, places)
        logits = model(x).logits
        rows = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
        seen.append(rows)
        x.scatter_(1, places, rows[..., 1:].argmax(-1) + 1)
    return x, seen


@pytest.mark.parametrize("per_step", [1, 2])
def test_a_constant_number_of_positions_is_computed(model, per_step):
    with diffcache.accelerated(model, "dkv:greedy=true,window=4,refresh=2"):
        decode_in_order(model, prompts(1), per_step=per_step)
        report = diffcache.report(model)
    steps = ANSWER // per_step
    size = PROMPT + ANSWER
    # the last commits, those to decode, and 4 masks for each of them while there are so many
    wanted = [
        size if step % 2 == 0 else per_step + min(5 * per_step, ANSWER - step * per_step) for step in range(steps)
    ]
    assert [round(share * size) for share in report.shares] == wanted
    assert (report.computed, report.refreshes) == (sum(wanted), steps // 2)


def test_announced_positions_are_computed(model):
    """A decoded position has new logits at every step, and old ones in a loop that announces none."""
    _, plain = decode_in_order(model, prompts())
    errors = []
    for announces in (True, False):
        with diffcache.accelerated(model, "dkv:greedy=true,window=0,refresh=2"):
            tokens_seen, seen = decode_in_order(model, prompts(), announces)
        assert not (tokens_seen == MASK).any()
        errors.append(float((seen[1] - plain[1]).abs().mean()))
    assert errors[0] < errors[1]


def test_a_window_of_all_masks_is_decode(model):
    wanted = []
    for spec in ("dkv:refresh=3", "dkv:greedy=true,window=16,refresh=3"):
        with diffcache.accelerated(model, spec):
            wanted.append(decode_in_order(model, prompts()))
    assert torch.equal(wanted[0][0], wanted[1][0])
    assert all(torch.equal(a, b) for a, b in zip(wanted[0][1], wanted[1][1], strict=True))


def test_rows_of_a_batch_do_not_depend_on_each_other(model):
    together, draw = prompts(3), torch.Generator().manual_seed(3)
    order = PROMPT + torch.stack([torch.randperm(ANSWER, generator=draw) for _ in together])

    @torch.no_grad()
    def run(rows):
        x = torch.cat([together[rows], torch.full((len(rows), ANSWER), MASK)], 1)
        for step in range(ANSWER):
            places = order[rows, step : step + 1]
            tokens.announce(model, places)
            logits = model(x).logits[torch.arange(len(rows))[:, None], places]
            x.scatter_(1, places, logits[..., 1:].argmax(-1) + 1)
        return x

    with diffcache.accelerated(model, "dkv:greedy=true,refresh=2"):
        wanted = run([0, 1, 2])
        assert torch.equal(torch.cat([run([row]) for row in range(3)]), wanted)


@torch.no_grad()
def test_an_announcement_is_for_one_forward(model):
    seen = []

    def rule(view):
        seen.append(None if view.announced is None else np.argwhere(view.announced).tolist())
        return tokens.Fresh(view.masked | view.changed)

    x = torch.cat([prompts(1), torch.full((1, ANSWER), MASK)], 1)
    tokens.announce(model, torch.tensor([[9]]))  # without a rule it does nothing
    with diffcache.accelerated(model, tokens.TokenRule("own", rule)):
        model(x)
        x[:, 12] = 5
        tokens.announce(model, torch.tensor([[9, 20]]))
        model(x)
        x[:, 13] = 5
        model(x)
        tokens.announce(model, x == 5)
        x[:, 14] = 7
        model(x)
    fives = [[0, place] for place in range(24) if x[0, place] == 5]
    assert seen == [[[0, 9], [0, 20]], None, fives]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.tensor([[0.5]]), "whole numbers"),
        (torch.tensor([3]), "bool"),
        (torch.tensor([[24]]), "whole numbers below 24"),
        (torch.tensor([[1], [2]]), "1 rows"),
        (torch.zeros(1, 9, dtype=torch.bool), r"bool \[1, 24\]"),
    ],
)
@torch.no_grad()
def test_other_positions_are_refused(model, given, words):
    x = torch.cat([prompts(1), torch.full((1, ANSWER), MASK)], 1)
    with diffcache.accelerated(model, "dkv:greedy=true"):
        model(x)

        def announced():
            tokens.announce(model, given)
            model(x)

        with pytest.raises(BadOption, match=words):
            announced()
        model(x)  # the announcement is gone


@pytest.mark.parametrize(
    ("spec", "words"), [("dkv:greedy=yes", "true or false"), ("dkv:greedy=true,window=-1", "at least 0")]
)
def test_an_option_out_of_range_is_refused(spec, words):
    with pytest.raises(BadOption, match=words):
        parse_token_rule(spec)
