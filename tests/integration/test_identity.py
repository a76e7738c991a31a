"""The same bits where everything is computed, other bits and less work where something is predicted.

Each comparison has a twin at the end of the file that plants a fault and sees the comparison fail.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipelines import TINY, fresh, run, shared
from probes import BRANCHES, PLACES, leaf_calls, naive_reuse
from torch import Tensor

from diffcache import accelerated, report
from diffcache.executor import FailedOpen, Report, Store, stacks
from diffcache.executor import site as decide
from diffcache.host import find_sites

every = pytest.mark.parametrize("name", TINY)
everywhere = pytest.mark.parametrize(("name", "granularity"), PLACES)
# One of each kind: two streams, guidance in the batch and apart, a batch given as a list, two outputs.
INSIDE = ("flux", "sd3", "wan", "z_image", "ltx2")
inside = pytest.mark.parametrize(("name", "granularity"), [p for p in PLACES if p[0] in INSIDE and p[1] != "model"])

SKIPPING = {
    "model": "taylorseer:every=3,order=1",
    "stack": "uniform:every=2",
    "block": "taylorseer:every=2,order=1",
    "sublayer": "uniform:every=3",
}


def rule(granularity: str) -> str:
    return f"{SKIPPING[granularity]},sites={granularity}"


@functools.cache
def reference(name: str) -> Tensor:
    return run(shared(name), TINY[name].call(shared(name)))


@functools.cache
def leaves(name: str) -> Counter[tuple[str, str]]:
    """Calls of every leaf module in one untouched run."""
    pipe, tiny = shared(name), TINY[name]
    with leaf_calls(pipe, tiny.denoisers) as calls:
        run(pipe, tiny.call(pipe))
    return calls


@contextmanager
def skipping(name: str, spec: str) -> Iterator[Any]:
    """The pipeline, accelerated. A second denoiser that takes over in mid-run has no anchors at first, and says so."""
    with warnings.catch_warnings():
        if len(TINY[name].denoisers) > 1:
            warnings.simplefilter("ignore", FailedOpen)
        with accelerated(shared(name), spec) as pipe:
            yield pipe


def forwards(name: str, found: Report) -> dict[tuple[str, str], tuple[int, int]]:
    """(denoiser, path of the site) -> (computed, all) forwards, over branches, as reported."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in found.rows:
        key = row.denoiser, row.site.partition(":")[2]
        computed = row.computed + sum(row.failed_open.values())
        was = sums.get(key, (0, 0))
        sums[key] = was[0] + computed, was[1] + computed + row.predicted
    return sums


def lies_in(name: str, denoiser: str, site: str, path: str) -> bool:
    """Whether a leaf belongs to a site, whose path is given; those of a U-Net's deep branch lie in several lists."""
    network = getattr(shared(name), denoiser)
    if site == "up_blocks" and hasattr(network, "down_blocks"):
        paths = {id(module): place for place, module in network.named_modules()}
        parts = [paths[id(module)] for module in find_sites(network)["stack:up_blocks"]]
    else:
        parts = [site]
    return any(f"{path}.".startswith(f"{part}." if part else "") for part in parts)


def assert_skipped_as_reported(name: str, calls: Counter[tuple[str, str]], found: Report) -> None:
    """Every leaf ran in that fraction of its calls in which the report says that the sites around it computed."""
    reported = forwards(name, found)
    for (denoiser, path), untouched in leaves(name).items():
        if name == "dit" and path.startswith("transformer_blocks.0.norm1.emb."):
            continue  # the model itself calls this part of its first block a second time
        around = [site for d, site in reported if d == denoiser and lies_in(name, denoiser, site, path)]
        computed, total = min((reported[denoiser, site] for site in around), key=lambda c: c[0] / c[1])
        assert calls[denoiser, path] * total == untouched * computed, (denoiser, path, around)


@everywhere
def test_with_every_step_computed_the_bits_are_those_of_the_untouched_pipeline(name: str, granularity: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    with accelerated(pipe, f"full:sites={granularity}"):
        output = run(pipe, tiny.call(pipe))
        found = report(pipe)
    assert torch.equal(output, reference(name))
    assert found.computed == tiny.steps * BRANCHES[tiny.guidance]
    assert not any(row.predicted or row.failed_open for row in found.rows)


@everywhere
def test_what_is_reported_as_skipped_did_not_run(name: str, granularity: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    with skipping(name, rule(granularity)), leaf_calls(pipe, tiny.denoisers) as calls:
        output = run(pipe, tiny.call(pipe))
        found = report(pipe)
    assert bool(output.isfinite().all())
    assert not torch.equal(output, reference(name))
    assert sum(row.predicted for row in found.rows) > 0
    assert_skipped_as_reported(name, calls, found)
    assert sum(calls.values()) < sum(leaves(name).values())


@every
def test_two_accelerated_runs_with_one_seed_give_the_same_bits(name: str) -> None:
    assert_repeats(name, rule("model"))


@inside
def test_two_accelerated_runs_with_one_seed_give_the_same_bits_inside_the_model(name: str, granularity: str) -> None:
    assert_repeats(name, rule(granularity))


def assert_repeats(name: str, spec: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    with skipping(name, spec):
        one = run(pipe, tiny.call(pipe))
        run(pipe, tiny.call(pipe), seed=7)
        other = run(pipe, tiny.call(pipe))
    with skipping(name, spec):
        anew = run(pipe, tiny.call(pipe))
    assert torch.equal(one, other)
    assert torch.equal(one, anew)


@every
def test_reuse_is_bit_for_bit_what_a_loop_that_counts_calls_does(name: str) -> None:
    pipe, tiny = shared(name), TINY[name]
    with naive_reuse(pipe, tiny.denoisers, BRANCHES[tiny.guidance], every=2):
        expected = run(pipe, tiny.call(pipe))
    with skipping(name, "uniform:every=2"):
        assert torch.equal(run(pipe, tiny.call(pipe)), expected)
    assert not torch.equal(reference(name), expected)


@every
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    assert_mates_do_not_matter(name, rule("model"))


@inside
def test_a_sample_does_not_depend_on_its_batch_mates_inside_the_model(name: str, granularity: str) -> None:
    assert_mates_do_not_matter(name, rule(granularity))


def assert_mates_do_not_matter(name: str, spec: str) -> None:
    """Torch promises no equal bits at another batch size, so a sample is compared alone only where they are equal."""
    pipe, tiny = shared(name), TINY[name]
    call = tiny.call(pipe, batch=2)
    untouched = run(pipe, call, seed=[0, 1])[0]
    with skipping(name, spec):
        pair = run(pipe, call, seed=[0, 1])
        other_mate = run(pipe, call, seed=[0, 2])
        alone = run(pipe, tiny.call(pipe), seed=[0])
    assert torch.equal(pair[0], other_mate[0])
    assert not torch.equal(pair[1], other_mate[1])
    if torch.equal(untouched, run(pipe, tiny.call(pipe), seed=[0])[0]):
        assert torch.equal(pair[0], alone[0])


def test_training_mode_of_autograd_does_not_change_what_is_predicted() -> None:
    pipe = shared("flux")
    with accelerated(pipe, "uniform:every=2"):
        expected = run(pipe, TINY["flux"].call(pipe))
        with torch.enable_grad():
            assert torch.equal(run(pipe, TINY["flux"].call(pipe)), expected)


# --- the comparisons can fail ----------------------------------------------------------------------------------------


def test_an_output_altered_at_a_computed_step_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = decide.store_output

    def keep_and_spoil(call: Any, site: str, x: Any, value: Any) -> None:
        keep(call, site, x, value)
        value[0].mul_(1 + 2**-20)

    monkeypatch.setattr(decide, "store_output", keep_and_spoil)
    with pytest.raises(AssertionError):
        test_with_every_step_computed_the_bits_are_those_of_the_untouched_pipeline("flux", "model")


@pytest.mark.parametrize("granularity", ["model", "stack", "block", "sublayer"])
def test_a_forward_that_runs_although_it_is_predicted_would_be_noticed(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves("flux")
    try_predict = decide.try_predict

    def predict_and_compute(call: Any, site: str, x: Any) -> Any:
        try_predict(call, site, x)  # counts a prediction

    for module in (decide, stacks):
        monkeypatch.setattr(module, "try_predict", predict_and_compute)
    pipe = shared("flux")
    with accelerated(pipe, rule(granularity)), leaf_calls(pipe, TINY["flux"].denoisers) as calls:
        run(pipe, TINY["flux"].call(pipe))
        with pytest.raises(AssertionError):
            assert_skipped_as_reported("flux", calls, report(pipe))


def test_an_anchor_left_over_from_the_last_run_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    put, first = Store.put, {}

    def put_the_first_ever(self: Store, key: Any, step: int, anchor: Any) -> None:
        put(self, key, step, first.setdefault((key, step), anchor))

    pipe, call = shared("flux"), TINY["flux"].call(shared("flux"))
    monkeypatch.setattr(Store, "put", put_the_first_ever)
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, call, seed=7)
        one = run(pipe, call)
        first.clear()
        assert not torch.equal(one, run(pipe, call))


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_a_stale_anchor_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    get = Store.get
    monkeypatch.setattr(Store, "drop", lambda self, key, step: None)
    monkeypatch.setattr(Store, "get", lambda self, key, step: get(self, key, 0))
    with pytest.raises(AssertionError):
        test_reuse_is_bit_for_bit_what_a_loop_that_counts_calls_does(name)


def test_branches_that_share_anchors_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    get, put = Store.get, Store.put
    monkeypatch.setattr(Store, "get", lambda self, key, step: get(self, key[:2], step))
    monkeypatch.setattr(Store, "put", lambda self, key, step, anchor: put(self, key[:2], step, anchor))
    with pytest.raises(AssertionError):
        test_reuse_is_bit_for_bit_what_a_loop_that_counts_calls_does("wan")


def test_a_prediction_that_mixes_samples_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    predict_output = decide.predict_output

    def mixed(*args: Any) -> Any:
        output = predict_output(*args)
        output[0].add_(output[0].mean(0, keepdim=True), alpha=1e-3)
        return output

    monkeypatch.setattr(decide, "predict_output", mixed)
    with pytest.raises(AssertionError):
        assert_mates_do_not_matter("flux", rule("model"))


def test_a_schedule_that_computes_all_is_not_mistaken_for_one_that_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SKIPPING, "model", "uniform:every=1")
    with pytest.raises(AssertionError):
        test_what_is_reported_as_skipped_did_not_run("flux", "model")


def test_every_step_count_works_down_to_one() -> None:
    pipe = fresh("flux")
    for steps in (1, 2, 3):
        plain = run(pipe, TINY["flux"].call(pipe), num_inference_steps=steps)
        with accelerated(pipe, "taylorseer:every=2,order=3"):
            output = run(pipe, TINY["flux"].call(pipe), num_inference_steps=steps)
            assert report(pipe).computed == (steps + 1) // 2
        assert torch.equal(output, plain) == (steps == 1)
