"""Stacks whose host leaves out blocks or writes between them, and sites that lie inside one another."""

from __future__ import annotations

import pytest
import torch
from probes import hold
from small_loop import STEPS, Net, assert_fails_open, loop, noise
from torch import Tensor

from diffcache import CacheSchedule, accelerated, report
from diffcache.documents import DenoiserPlan
from diffcache.host import find_sites

pytestmark = pytest.mark.fast


def stack(mask: str) -> CacheSchedule:
    return CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites={"stack:blocks": hold(mask)})})


def test_a_host_that_writes_into_what_lies_between_blocks_does_not_change_a_prediction() -> None:
    """Cosmos adds ControlNet residuals in place. At a predicted step they are in the prediction already."""

    def add(block: int, x: Tensor) -> Tensor:
        return x.add_(0.1) if block < 2 else x

    pipe = loop()
    pipe.transformer.between = add
    with accelerated(pipe, stack("#.#.#.#.")):
        pipe(noise())
        found = [output for _, output in pipe.given]
    for i in range(1, STEPS, 2):
        assert torch.equal(found[i], found[i - 1])
    assert pipe.transformer.blocks[0].attn.calls == 4


def test_a_report_shows_the_sites_of_the_schedule_alone() -> None:
    """The network is called at every step, and parts of it are predicted: it has no line that says it was computed."""
    pipe = loop()
    plans = {"block:blocks.2": hold("##.#.#.#"), "block:blocks.0": hold("#.#.#.#.")}
    schedule = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=plans)})
    with accelerated(pipe, schedule):
        pipe(noise())
        found = report(pipe)
    assert "model" in {row.site for row in found.rows}
    lines = [line.split()[1:5] for line in str(found).splitlines() if line.startswith("transformer ")]
    assert lines == [["block:blocks.0", "0", "4", "4"], ["block:blocks.2", "0", "5", "3"]]
    assert " model" not in str(found)
    assert ">transformer model" not in found._repr_html_()


@pytest.mark.parametrize("left_out", [(0,), (1,), (0, 1)])
def test_a_host_that_leaves_out_blocks_is_followed(left_out: tuple[int, ...]) -> None:
    """SD3 has an option to skip layers, including the first."""
    pipe = loop()
    pipe.transformer.left_out = left_out
    plain = pipe(noise())
    with accelerated(pipe, stack("########")):
        assert torch.equal(pipe(noise()), plain)
    calls = pipe.transformer.blocks[2].attn.calls
    with accelerated(pipe, stack("#.#.#.#.")):
        pipe(noise())
        rows = {row.site: row for row in report(pipe).rows}
        assert rows["stack:blocks"].predicted == 4
    assert pipe.transformer.blocks[2].attn.calls == calls + 4


def test_a_stack_whose_last_block_is_left_out_has_no_anchor_and_is_computed() -> None:
    pipe = loop()
    pipe.transformer.left_out = (2,)
    plain = pipe(noise())
    found = assert_fails_open(pipe, stack("#.#.#.#."), "an anchor is missing", failed=4)
    assert torch.equal(found, plain)


def test_predicted_outside_means_nothing_runs_inside() -> None:
    """Model, stack, block and sublayer at once: what lies inside a predicted site is not asked."""
    pipe = loop()
    sites = {
        "model": hold("##.#####"),
        "stack:blocks": hold("##.#.###"),
        "block:blocks.1": hold("##.#..##"),
        "sublayer:blocks.1.attn": hold("##.#...#"),
    }
    schedule = CacheSchedule(steps=STEPS, denoisers={"transformer": DenoiserPlan(sites=sites)})
    with accelerated(pipe, schedule):
        pipe(noise())
        rows = {row.site: (row.computed, row.predicted) for row in report(pipe).rows}
    assert rows == {
        "model": (7, 1),
        "stack:blocks": (6, 1),
        "block:blocks.1": (5, 1),
        "sublayer:blocks.1.attn": (4, 1),
    }
    assert [block.attn.calls for block in pipe.transformer.blocks] == [6, 4, 6]


def test_the_sites_of_the_toy_are_found() -> None:
    assert list(find_sites(Net())) == [
        "model",
        "stack:blocks",
        *(name for i in range(3) for name in (f"block:blocks.{i}", f"sublayer:blocks.{i}.attn")),
    ]
