"""The branches of guidance: their number, their names, and which of them a forward holds."""

from __future__ import annotations

import pytest
import torch
from documents import schedule

from diffcache.documents import BranchLayout, Guidance
from diffcache.documents.branches import BRANCH_NAMES, names_in, provenance_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("layout", "mode", "forwards", "uniform"),
    [
        (BranchLayout(), "none", 1, True),
        (BranchLayout(2), "separate", 2, True),
        (BranchLayout(3, 3), "batched", 1, True),
        (BranchLayout(4, 2), "batched", 2, False),
    ],
)
def test_the_form_follows_from_the_numbers(layout: BranchLayout, mode: str, forwards: int, uniform: bool) -> None:
    assert (layout.mode, layout.forwards, layout.uniform) == (mode, forwards, uniform)


@pytest.mark.parametrize("mode", ["none", "separate", "batched"])
def test_a_layout_is_that_of_its_guidance(mode: str) -> None:
    guidance = Guidance(mode=mode, branches=1 if mode == "none" else 2)  # type: ignore[arg-type]
    assert guidance.layout.mode == mode
    assert guidance.layout.count == guidance.branches


def test_a_batch_is_split_into_its_branches() -> None:
    x = torch.arange(6.0)
    assert [part.tolist() for part in BranchLayout(2, 2).split(x)] == [[0, 1, 2], [3, 4, 5]]
    (whole,) = BranchLayout(2).split(x)
    assert whole is x


def test_a_forward_holds_all_branches_or_its_own() -> None:
    assert [list(BranchLayout(2, 2).held_by(n)) for n in range(3)] == [[0, 1]] * 3
    assert [list(BranchLayout(2).held_by(n)) for n in range(3)] == [[0], [1], [1]]
    assert [BranchLayout(2, 2).row(1), BranchLayout(2).row(1), BranchLayout().row(0)] == [None, 1, 0]


def test_names_go_into_the_provenance_and_come_back() -> None:
    assert names_in(provenance_of(["cond", "uncond"])) == ("cond", "uncond")
    assert provenance_of(["cond"]) == provenance_of(["cond", ""]) == {}
    assert names_in({}) == names_in({BRANCH_NAMES: "{"}) == names_in({BRANCH_NAMES: "3"}) == ()
    assert names_in({BRANCH_NAMES: '["cond", 3]'}) == ("cond",)


def test_a_schedule_knows_its_branches() -> None:
    made = schedule().with_provenance(**provenance_of(["cond", "uncond"]))
    guidance = made.guidance
    assert made.layout.names == ("cond", "uncond")
    assert made.layout.count == (1 if guidance is None else guidance.branches)
