"""Other people's caches in ``benchmarks/peers``: they really skip, are counted honestly, and come off without trace."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probes import dicts, names

pytest.importorskip("diffusers", minversion="0.42")  # the first with all the caches that are measured
pytest.importorskip("cache_dit")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peers import cache_dit_peers as cd
from peers import diffusers_peers as df
from peers.adapters import PEERS
from peers.measure import PeerRow, behind, frontier, measure_peers, table
from peers.work import counted

from diffcache.assets import load

STEPS = 8
# Each cache, at a setting that must skip within eight steps.
EAGER = [
    cd.dbcache(0.9, warmup=2),
    cd.dbcache(0.9, warmup=2, taylor=1),
    cd.dbcache(0.9, warmup=2, back=1),
    cd.masked(20),
    cd.masked(20, taylor=2),
    cd.masked("ultra"),
    cd.dbprune(0.9, warmup=2),
    df.first_block(0.9),
    df.mag(5.0, in_a_row=4, retention=0.2),
    df.taylor("attention", 3, 1),
    df.taylor("sublayers", 3, 1),
    df.taylor("lite", 3, 1),
    df.sea(5.0, in_a_row=4),
    df.pyramid(4, (0, 1000)),
    df.faster(2, 4, (-1, 950)),
]
NEVER = [cd.dbcache(0.0), cd.dbcache(0.0, taylor=1), cd.dbprune(0.0), df.first_block(0.0), df.sea(0.0, in_a_row=4)]
NEVER.append(df.mag(-1.0, in_a_row=4, retention=0.2))  # an accumulated error cannot fall below zero


class Shown:
    """A demo model, its full run of one picture, and the work that was."""

    def __init__(self, name):
        self.model = load(name)
        self.pipe = self.model.pipe
        self.full, self.work = self.run()

    def run(self):
        with counted(self.pipe.transformer) as work:
            call = self.model.call(self.model.subjects[:1], [1], steps=STEPS, output_type="latent")
            return self.pipe(**call).images, work

    def with_peer(self, peer):
        with peer.on(self.pipe, STEPS, separate_cfg=self.model.about.separate_cfg):
            return self.run()


@pytest.fixture(scope="module")
def flux():
    return Shown("flux")


@pytest.fixture(scope="module")
def dit():
    return Shown("dit")


@pytest.fixture(scope="module")
def guided():
    return Shown("flux-guided")


def ident(peer):
    return f"{peer.name} {peer.setting}"


def same(a, b):
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_each_cache_has_an_eager_setting_here():
    assert {(p.package, p.name) for p in EAGER} == {(p.package, p.name) for p in PEERS}


def test_no_setting_stands_twice():
    keys = [(p.package, p.name, p.setting) for p in PEERS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("peer", EAGER, ids=ident)
def test_a_peer_skips_on_flux_and_comes_off(flux, peer):
    images, work = flux.with_peer(peer)
    assert work.computed(flux.work, STEPS) < STEPS
    assert work.complete(flux.work, STEPS) < STEPS
    assert not same(images, flux.full)
    again, work = flux.run()
    assert same(again, flux.full)
    assert work == flux.work


ONE_OF_EACH = {p.name: p for p in EAGER if p.name != "DBPrune"}  # cache-dit's DBPrune does not run on DiT


@pytest.mark.parametrize("peer", ONE_OF_EACH.values(), ids=ident)
def test_a_peer_skips_on_dit_and_comes_off(dit, peer):
    _, work = dit.with_peer(peer)
    assert work.computed(dit.work, STEPS) < STEPS
    again, work = dit.run()
    assert same(again, dit.full)
    assert work == dit.work


BY_BRANCH = [
    p for name, p in ONE_OF_EACH.items() if name not in ("PAB", "FasterCache")
]  # these keep one state for both


def with_one_prompt(guided, peer):
    """Return the result and the work of a guided run in which both branches get the same prompt."""
    call = guided.model.call(guided.model.subjects[:1], [1], steps=STEPS, output_type="latent")
    same_prompt = {f"negative_{name}": call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with peer.on(guided.pipe, STEPS, separate_cfg=True), counted(guided.pipe.transformer) as work:
        return guided.pipe(**call | same_prompt).images, work


@pytest.mark.parametrize("peer", BY_BRANCH, ids=ident)
def test_a_peer_keeps_the_branches_of_guidance_apart(flux, guided, peer):
    """If both branches get the same prompt, guidance changes nothing, unless a branch gets outputs of the other."""
    images, work = with_one_prompt(guided, peer)
    unguided, once = flux.with_peer(peer)
    assert work.calls == {layer: 2 * calls for layer, calls in once.calls.items()}
    assert same(images, unguided)
    again, work = guided.run()
    assert same(again, guided.full)
    assert work == guided.work


@pytest.mark.parametrize("name", ["PAB", "FasterCache"])
def test_one_state_for_both_branches_is_noticed(flux, guided, name):
    images, work = with_one_prompt(guided, ONE_OF_EACH[name])
    unguided, once = flux.with_peer(ONE_OF_EACH[name])
    assert work.calls != {layer: 2 * calls for layer, calls in once.calls.items()} or not same(images, unguided)


def test_magcache_is_calibrated_on_the_guided_model_by_branch():
    assert df.magnitudes("flux", True, STEPS) != df.magnitudes("flux", False, STEPS)


@pytest.mark.parametrize("peer", NEVER, ids=ident)
def test_an_unreachable_threshold_computes_everything(flux, peer):
    images, work = flux.with_peer(peer)
    assert work == flux.work
    assert same(images, flux.full)


def test_every_setting_switches_on_and_leaves_no_trace(flux):
    before, kind = dicts(flux.pipe), dict(vars(type(flux.pipe)))
    for peer in PEERS:
        if "flux" in peer.models:
            with peer.on(flux.pipe, STEPS):
                assert dicts(flux.pipe) != before, ident(peer)
            assert dicts(flux.pipe) == before, ident(peer)
            assert dict(vars(type(flux.pipe))) == kind, ident(peer)


def test_a_peer_that_breaks_down_comes_off_too(dit):
    before = names(dit.pipe)
    with pytest.raises(TypeError), cd.dbcache(0.5).on(dit.pipe, STEPS):
        dit.pipe(class_labels=None)
    assert names(dit.pipe) == before
    assert same(dit.run()[0], dit.full)


def test_a_mask_of_half_the_steps_is_counted_as_those_and_a_first_block_at_the_others(flux):
    _, work = flux.with_peer(cd.masked(25))
    first = sum(n for name, n in flux.work.madds.items() if name.startswith("block:transformer_blocks.0."))
    expected = STEPS / 2 * (1 + first / flux.work.madds.total())
    assert work.computed(flux.work, STEPS) == pytest.approx(expected)
    assert work.complete(flux.work, STEPS) == STEPS / 2


def test_a_layer_whose_forward_was_replaced_is_not_counted(flux):
    layer = flux.pipe.transformer.transformer_blocks[0].ff.net[2]
    layer.forward = lambda x: x[..., : layer.out_features]
    try:
        _, work = flux.run()
    finally:
        del layer.forward
    assert work.complete(flux.work, STEPS) == 0
    assert work.computed(flux.work, STEPS) < STEPS


def test_rows_report_peers_that_do_not_run(flux):
    def broken(pipe, steps, separate_cfg):
        raise RuntimeError("no such model\nand more")

    bad = replace(cd.dbcache(0.9), name="Broken", switch=broken)
    peers = [bad, cd.masked(25), df.taylor("lite", 3, 1)]
    rows = measure_peers(flux.model, flux.model.subjects[:2], [1, 2], 1, steps=STEPS, peers=peers, batch=1)
    assert [r.name for r in rows] == ["Broken", "DBCache, mask", "TaylorSeer"]
    assert rows[0].failed == "RuntimeError: no such model"
    assert rows[0].psnr_db is None
    for row in rows[1:]:
        assert not row.failed
        assert row.speedup > 0
        assert 0 < row.computed < STEPS
        assert 10 < row.psnr_db < 100
    assert "did not run: RuntimeError: no such model |" in table(rows)
    assert behind(rows[:1], peers) == [bad]


def row(package, computed, psnr_db):
    return PeerRow(
        model="flux", package=package, version="1", name="a", setting="b", steps=8, computed=computed, psnr_db=psnr_db
    )


def test_the_frontier_holds_what_its_own_package_does_not_beat():
    best = [row("p", 8.0, 60.0), row("p", 4.0, 50.0), row("q", 6.0, 40.0)]
    beaten = [row("p", 8.0, 55.0), row("p", 6.0, 50.0), row("p", None, None)]
    assert frontier(beaten + best) == best
