"""A token cache gives the logits of the model where it computes, and rows of a batch do not depend on each other."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import MASK, LLaDALike, decode, decoder, prompts  # noqa: E402

from diffcache import registry  # noqa: E402
from diffcache.errors import DiffCacheError  # noqa: E402
from diffcache.tokens import Fresh, TokenRule, View, parse_token_rule, rules  # noqa: E402
from diffcache.tokens.canvas import Canvas  # noqa: E402
from diffcache.tokens.engine import TokenCache  # noqa: E402
from diffcache.tokens.store import PlacedCache  # noqa: E402

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module", params=["with positions", "LLaDA"])
def model(request):
    return decoder() if request.param == "with positions" else LLaDALike().eval()


@contextlib.contextmanager
def cached(model, rule):
    cache = TokenCache(model, parse_token_rule(rule) if isinstance(rule, str) else TokenRule("own", rule), MASK)
    cache.attach()
    try:
        yield cache
    finally:
        cache.detach()


def test_full_gives_the_same_bits(model):
    wanted, plain = decode(model, prompts())
    with cached(model, "full") as cache:
        got, seen = decode(model, prompts())
        assert cache.canvas.counts.computed == cache.canvas.counts.full > 0
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


@pytest.mark.parametrize("rule", ["dkv:refresh=1", "vicinity:block=8,refresh=1", "vicinity:block=8,around=99"])
def test_a_rule_that_names_every_position_gives_the_same_bits(model, rule):
    _, plain = decode(model, prompts())
    with cached(model, rule):
        _, seen = decode(model, prompts())
    assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


def scattered(view: View) -> Fresh:
    """Name other positions in each row, in no order, and a different number of them; all at step 1."""
    if view.step == 1:
        return Fresh(np.ones_like(view.masked))
    random = np.random.default_rng(view.step)
    return Fresh(random.random(view.masked.shape) < np.array([[0.3], [0.6]]))


@pytest.fixture
def never_repeats(monkeypatch):
    """Compute every forward, changed input or not."""
    monkeypatch.setattr(Canvas, "repeats", lambda self, view, inputs: False)


@pytest.mark.usefixtures("never_repeats")
@pytest.mark.parametrize("form", [None, "padding", "block causal"])
def test_a_subset_of_unchanged_tokens_equals_the_full_rows(model, form):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    n = x.shape[1]
    mask = None
    if form == "padding":
        mask = torch.ones(2, n, dtype=torch.long)
        mask[1, :3] = 0
    if form == "block causal":
        blocks = torch.arange(n) // 4
        mask = (blocks[:, None] >= blocks[None])[None, None].expand(2, 1, n, n)
    begun = x.clone()
    x[:, 12] = 5
    with torch.no_grad():
        wanted = model(x, attention_mask=mask).logits
        with cached(model, scattered) as cache:
            model(begun, attention_mask=mask)
            for _ in range(4):
                got = model(x, attention_mask=mask).logits
                torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
            assert 0 < cache.canvas.counts.computed < cache.canvas.counts.full


@pytest.mark.usefixtures("never_repeats")
@torch.no_grad()
def test_rows_written_at_the_wrong_place_are_seen(model, monkeypatch):
    """Plant the fault that the test above must find: keys and values in the places of others."""
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    begun = x.clone()
    x[:, 12] = 5
    wanted = model(x).logits
    update = PlacedCache.update

    def shifted(self, keys, values, *args, **kwargs):
        index = self.index
        self.index = None if index is None else (index + 1) % self.size
        try:
            return update(self, keys, values, *args, **kwargs)
        finally:
            self.index = index

    monkeypatch.setattr(PlacedCache, "update", shifted)
    with cached(model, scattered):
        model(begun)
        model(x)
        assert (model(x).logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["dkv:refresh=4", "prefix:block=8", "dual:block=8", "vicinity:block=8,around=2"])
def test_rows_of_a_batch_do_not_depend_on_each_other(model, rule):
    together = prompts(3)
    with cached(model, rule):
        wanted, _ = decode(model, together)
    with cached(model, rule):
        alone = [decode(model, together[row : row + 1])[0] for row in range(3)]
    assert torch.equal(torch.cat(alone), wanted)


def test_dkv_computes_masks_and_the_last_commits(model):
    with cached(model, "dkv:refresh=4") as cache:
        decode(model, prompts(1, 8), answer=16, block=16)
        # 16 masks at step 0; step t has 16 - t masks and 1 token that step t - 1 committed
        partial = sum(17 - t for t in range(16) if t % 4)
        assert cache.canvas.counts.computed == 4 * 24 + partial
        assert (cache.canvas.counts.refreshes, cache.canvas.counts.forwards) == (4, 16)


def test_dual_computes_the_block_and_all_positions_when_one_begins(model):
    with cached(model, "dual:block=8") as cache:
        decode(model, prompts(1, 8), answer=16, block=8)
        assert cache.canvas.counts.computed == 2 * 24 + 2 * 7 * 8


def test_prefix_computes_the_block_and_the_suffix(model):
    with cached(model, "prefix:block=8") as cache:
        decode(model, prompts(1, 8), answer=16, block=8)
        assert cache.canvas.counts.computed == 2 * 24 + 7 * 16 + 7 * 8


@pytest.mark.parametrize("then", ["the same prompt", "another prompt", "another length", "an interrupted run"])
def test_a_second_canvas_begins_anew(model, then):
    first, second = prompts(), prompts(seed=2) if then == "another prompt" else prompts()
    if then == "another length":
        second = prompts(length=11, seed=2)
    with cached(model, "dkv:refresh=4"):
        wanted, _ = decode(model, second)
    with cached(model, "dkv:refresh=4"):
        if then == "an interrupted run":
            with torch.no_grad():
                model(torch.cat([first, torch.full((2, 16), MASK)], 1))
        else:
            decode(model, first)
        got, _ = decode(model, second)
    assert torch.equal(got, wanted)


def test_a_committed_token_that_changes_is_computed(model):
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    seen = []

    def rule(view: View) -> Fresh:
        seen.append(view.changed.copy())
        return Fresh(view.masked | view.changed)

    with torch.no_grad(), cached(model, rule):
        model(x)
        x[:, 10] = 5
        model(x)
        x[:, 10] = 6
        model(x)
    assert [np.flatnonzero(c[0]).tolist() for c in seen] == [[10], [10]]


def test_detach_leaves_no_attribute(model):
    before = dict(vars(model))
    with cached(model, "dkv"):
        pass
    assert vars(model) == before


@pytest.mark.parametrize("name", registry.names(rules.__name__))
def test_every_rule_names_its_source_and_returns_positions(name):
    module = registry.load(rules.__name__, name)
    assert isinstance(module.SOURCE, str)
    masked = np.array([[0, 0, 1, 1, 0, 1]], bool)
    found = np.broadcast_to(module.fresh(View.of(masked)).positions, masked.shape)
    assert found.dtype == bool
    assert found[0, 2:4].all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("dkw", "Did you mean 'dkv'?"),
        ("dkv:every=3", "Known: refresh, prompt, greedy, window, mask, shift"),
        ("dkv:refresh=0", "refresh=0 was given. Allowed: a whole number of at least 1"),
        ("dkv:refresh=2.5", "refresh=2.5 was given"),
        ("dkv:prompt=never", "Allowed: refresh, keep"),
        ("dual:block", "key=value"),
    ],
)
def test_a_wrong_spec_is_refused_before_a_run(spec, words):
    with pytest.raises(DiffCacheError) as error:
        parse_token_rule(spec)
    assert words in str(error.value)
