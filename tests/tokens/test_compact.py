"""Keys and values in fewer bytes: errors, bytes, rows that are written later, and decoding with them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from decoders import MASK, decode, decoder, prompts

import diffcache
from diffcache.errors import UnknownName
from diffcache.kernels import format_of
from diffcache.tokens.compact import CompactRows

pytestmark = pytest.mark.fast
STEPS = {"bf16": 2**-7, "int8": 1 / 127, "int4": 1 / 7}  # the largest relative error of a group, times 2


def rows(batch=2, heads=4, n=256, size=32, seed=0):
    """Return keys with channels of very different sizes."""
    drawn = torch.randn(batch, heads, n, size, generator=torch.Generator().manual_seed(seed))
    drawn[:, 0, :, 3] = 40 + 5 * drawn[:, 0, :, 3]
    return drawn


def kept(x, how, *, by_channel):
    return CompactRows.of(x, format_of(how), by_channel=by_channel, backend="torch")


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("how", ["bf16", "int8", "int4"])
def test_rows_are_read_within_half_a_step(how, by_channel):
    x = rows()
    error = (kept(x, how, by_channel=by_channel).read() - x).abs()
    flat = x.transpose(1, 2).flatten(2)  # groups of 128 channels, all heads of a token
    if by_channel and how != "bf16":
        spread, centre = torch.std_mean(flat, dim=1, keepdim=True, correction=0)
        largest = ((flat - centre) / spread).abs().amax(-1, keepdim=True) * spread * 1.02 + 0.02 * spread
    else:
        largest = flat.abs().amax(-1, keepdim=True)
    bound = (largest * STEPS[how] / 2 * 1.01 + 1e-6).expand_as(flat).unflatten(-1, (4, 32)).transpose(1, 2)
    assert (error <= bound).all()
    assert error.max() > 1e-4


def test_channels_keep_a_large_one_from_spoiling_the_others():
    x = rows()
    others = torch.ones(4, 32, dtype=torch.bool)
    others[0, 3] = False
    plain, channels = (
        (kept(x, "int4", by_channel=c).read() - x).abs().transpose(1, 2)[..., others].mean() for c in (False, True)
    )
    assert channels < plain / 2


@pytest.mark.parametrize(("how", "share"), [("int8", 0.55), ("int4", 0.3)])
def test_bytes_are_counted_and_few(how, share):
    x = rows(n=256)
    keys, values = kept(x, how, by_channel=True), kept(x, how, by_channel=False)
    parts = [part for one in (keys, values) for part in (one.codes, one.scales, one.channels) if part is not None]
    assert keys.nbytes + values.nbytes == sum(t.numel() * t.element_size() for t in parts)
    assert keys.nbytes + values.nbytes <= share * 2 * x.numel() * 2  # bfloat16 has two bytes


@pytest.mark.parametrize("how", ["bf16", "int8", "int4"])
def test_rows_are_written_at_their_positions(how):
    x, more = rows(n=24), rows(n=4, seed=1)
    index = torch.tensor([[20, 3, 7, 3], [0, 1, 26, 27]])
    more[0, :, 3] = more[0, :, 1]  # a repeated position has the same row
    before = kept(x, how, by_channel=True)
    after = before.written(more, index, 28).read()
    assert after.shape == (2, 4, 28, 32)
    wide = torch.cat([x, torch.zeros(2, 4, 4, 32)], 2)
    for row in range(2):
        wide[row, :, index[row]] = more[row]
    written = torch.zeros(2, 28, dtype=torch.bool).scatter(1, index, torch.ones(2, 4, dtype=torch.bool))
    untouched = ~written
    untouched[:, 24:] = False
    old = before.read()
    for row in range(2):
        assert torch.equal(after[row][:, untouched[row]], old[row][:, untouched[row][:24]])
        close = (after[row] - wide[row])[:, written[row]].abs().mean()
        assert close < {"bf16": 0.01, "int8": 0.05, "int4": 0.8}[how]


@pytest.mark.parametrize(("how", "error"), [("bf16", 0.02), ("int8", 0.03), ("int4", 0.6)])
def test_logits_are_near_those_with_exact_keys_and_values(how, error):
    model = decoder()
    seen = {}
    for store in (None, how):
        with diffcache.accelerated(model, "dkv:refresh=8", store=store):
            x = torch.cat([prompts(), torch.full((2, 16), MASK)], 1)
            with torch.no_grad():
                model(x)
                x[:, 9] = 5
                seen[store] = model(x).logits
    off = (seen[how] - seen[None]).abs().mean() / seen[None].std()
    assert 0 < off < error


def test_a_step_that_computes_every_position_is_exact():
    model = decoder()
    wanted, plain = decode(model, prompts())
    with diffcache.accelerated(model, "full", store="int8"):
        got, seen = decode(model, prompts())
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, plain, strict=True))


@pytest.mark.parametrize("rule", ["dkv:refresh=4", "elastic:window=4"])
def test_rows_of_a_batch_do_not_depend_on_each_other(rule):
    model, together = decoder(), prompts(3)
    with diffcache.accelerated(model, rule, store="int8"):
        wanted, _ = decode(model, together)
        alone = [decode(model, together[row : row + 1])[0] for row in range(3)]
        report = diffcache.report(model)
    assert torch.equal(torch.cat(alone), wanted)
    assert report.kept_as == "int8"
    assert "kept as int8" in str(report)
    assert 0 < report.kv_bytes < report.bytes_held


def test_an_unknown_format_is_refused():
    model = decoder()
    with pytest.raises(UnknownName, match="int8"):
        diffcache.accelerate(model, "dkv", store="int3")
    assert "forward" not in vars(model)
