"""Keys and values in two formats: masks far from every decoded token are kept in fewer bits than the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from decoders import MASK, LLaDALike, decode, decoder, prompts

import diffcache
from diffcache.errors import DiffCacheError
from diffcache.kernels import format_of
from diffcache.tokens.compact import CompactRows
from diffcache.tokens.mixed import Layout, MixedRows, far_masks, fresh_mask, parse_store, with_rows

pytestmark = pytest.mark.fast
FORMATS = format_of("int8"), format_of("int4")


def rows(n=64, seed=0, batch=2):
    return torch.randn(batch, 4, n, 32, generator=torch.Generator().manual_seed(seed))


def half_far(n=64):
    """Return the far positions of two rows: the second has fewer."""
    far = np.zeros((2, n), bool)
    far[0, n // 2 :] = far[1, -10:] = True
    return far


def mixed(x, far, by_channel=True):
    return MixedRows.of(x, FORMATS, Layout.of(far, x.device), by_channel=by_channel, backend="torch")


def test_a_mask_is_far_if_no_decoded_token_is_near():
    random = np.random.default_rng(0)
    for distance in (0, 1, 3):
        masked = random.random((6, 30)) < 0.8
        masked[0], masked[1] = True, False
        for row, got in zip(masked, far_masks(masked, distance), strict=True):
            decoded = np.flatnonzero(~row)
            wanted = [m and all(abs(place - d) > distance for d in decoded) for place, m in enumerate(row)]
            assert got.tolist() == wanted


@pytest.mark.parametrize("by_channel", [False, True])
def test_each_group_has_the_error_of_its_format(by_channel):
    x, far = rows(), torch.from_numpy(half_far())
    error = (mixed(x, far.numpy(), by_channel).read() - x).abs().mean((1, 3))
    for number, where in enumerate((~far, far)):
        alone = CompactRows.of(x, FORMATS[number], by_channel=by_channel, backend="torch").read()
        plain = (alone - x).abs().mean((1, 3))
        assert float(error[where].mean()) == pytest.approx(float(plain[where].mean()), rel=0.1)
    assert error[far].mean() > 5 * error[~far].mean()


def test_rows_of_a_batch_do_not_depend_on_each_other():
    x, far = rows(), half_far()
    together = mixed(x, far).read()
    for row in range(2):
        torch.testing.assert_close(mixed(x[row : row + 1], far[row : row + 1]).read()[0], together[row])


def test_positions_that_stay_keep_their_codes_and_others_are_encoded_again():
    x, more, far = rows(), rows(3, seed=1), half_far()
    before = mixed(x, far)
    index = torch.tensor([[40, 3, 60], [7, 55, 7]])
    more[1, :, 2] = more[1, :, 0]
    later = far.copy()
    later[0, 32:45] = False  # decoded near there; position 40 of row 0 is also new
    later[1, 0] = True  # masked again
    old = before.read()
    every = with_rows(old, more, index, 66)
    wide = np.pad(later, ((0, 0), (0, 2)))
    after = before.written(every, fresh_mask(index, 66), Layout.of(wide, x.device)).read()
    stay = np.pad(later == far, ((0, 0), (0, 2)))
    stay[:, 64:] = False
    for row in range(2):
        stay[row, index[row]] = False
        assert torch.equal(after[row][:, stay[row]], every[row][:, stay[row]])
        off = (after[row] - every[row]).abs().mean((0, 2))
        assert off[torch.from_numpy(~wide[row])].max() < 0.03  # int8
        assert off.max() < 0.3  # int4
    assert (after[0] - every[0])[:, 60].abs().mean() > 0.02  # new and far


def test_an_empty_group_takes_no_bytes():
    x = rows()
    for fill, how in ((False, FORMATS[0]), (True, FORMATS[1])):
        kept = mixed(x, np.full((2, 64), fill))
        alone = CompactRows.of(x, how, by_channel=True, backend="torch")
        assert kept.nbytes == alone.nbytes
        torch.testing.assert_close(kept.read(), alone.read())


def test_the_bytes_are_those_of_the_tensors():
    x, far = rows(), half_far()
    kept = mixed(x, far)
    tensors = [t for part in kept.parts for t in (part.codes, part.scales, part.channels)]
    assert kept.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    # 54 near positions in the longer row, 32 far ones, 128 channels; two channel tensors for each group
    assert kept.nbytes == 2 * (54 * (128 + 4) + 32 * (64 + 4)) + 2 * (2 * 2 * 128 * 2)


@torch.no_grad()
def second_step(model, store):
    """Return the logits of a step that reads kept masks (the block in progress alone is computed), and the bytes."""
    x = torch.cat([prompts(2, 32), torch.full((2, 224), MASK)], 1)
    with diffcache.accelerated(model, "dual:block=8", store=store):
        model(x)
        x[:, 32] = 5
        got = model(x).logits[:, 33:40]
        return got, diffcache.report(model).kv_bytes


@pytest.mark.parametrize("kind", ["with positions", "LLaDA"])
def test_error_and_bytes_lie_between_those_of_the_two_formats(kind):
    model = decoder() if kind == "with positions" else LLaDALike().eval()
    exact, _ = second_step(model, None)
    found = {}
    for store in ("int8", "int8:far=int4,distance=64", "int8:far=int4,distance=16", "int4"):
        logits, nbytes = second_step(model, store)
        found[store] = float((logits - exact).norm() / exact.norm()), nbytes
    errors, sizes = zip(*found.values(), strict=True)
    assert errors[0] < errors[1] < errors[3]
    assert errors[0] < errors[2] < errors[3]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


def test_the_report_counts_the_bytes_of_every_layer():
    _, got = second_step(decoder(), "int8:far=int4,distance=64")
    batch, size, near = 2, 256, 33 + 64  # 33 decoded tokens
    far, channels = size - near, 2 * 8  # 2 heads
    codes = near * (channels + 4) + far * (channels // 2 + 4)  # one float32 scale for each token
    centres = 2 * 2 * channels * 2  # of keys: centre and spread of each channel in bfloat16, for both groups
    layout = batch * size * (2 * (1 + 8) + 8 + 1)  # group and slot of each position for both groups; places, real
    assert got == 3 * batch * (2 * codes + centres) + layout


@pytest.mark.parametrize("rule", ["dkv:refresh=4", "dllm:gen_interval_steps=4", "elastic:window=4"])
def test_loops_decode_and_rows_do_not_depend_on_each_other(rule):
    model, together = decoder(), prompts(3)
    with diffcache.accelerated(model, rule, store="int8:far=int4,distance=3"):
        wanted, _ = decode(model, together)
        assert not (wanted == MASK).any()
        assert torch.equal(torch.cat([decode(model, together[row : row + 1])[0] for row in range(3)]), wanted)
        report = diffcache.report(model)
    assert report.kept_as == "int8:far=int4,distance=3"
    assert 0 < report.kv_bytes < report.bytes_held


@torch.no_grad()
def test_a_canvas_that_grows_is_kept():
    model = decoder()
    x = torch.cat([prompts(), torch.full((2, 8), MASK)], 1)
    y = x.clone()
    y[:, 8:] = 5
    longer = torch.cat([y, torch.full((2, 8), MASK)], 1)
    later = longer.clone()
    later[:, 16] = 6
    seen = []
    for store in (None, "int8:far=int4,distance=2"):
        with diffcache.accelerated(model, "block_causal:block=8", store=store):
            model(x)
            seen.append([model(longer).logits, model(later).logits])
            assert diffcache.report(model).computed == 2 * (16 + 16 + 8)
    for exact, kept in zip(*seen, strict=True):
        assert 0 < (kept - exact).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("int8:far=int3", "no store format called 'int3'"),
        ("int8:near=int4", "Known: far, distance"),
        ("int8:distance=4", "a format for each group"),
        ("exact:far=int4", "a format for each group"),
        ("int8:far=int4,distance=-1", "at least 0"),
        ("int8:far", "key=value"),
    ],
)
def test_a_wrong_store_is_refused(store, words):
    with pytest.raises(DiffCacheError, match=words):
        parse_store(store)
    model = decoder()
    with pytest.raises(DiffCacheError, match=words):
        diffcache.accelerate(model, "dkv", store=store)
    assert "forward" not in vars(model)
