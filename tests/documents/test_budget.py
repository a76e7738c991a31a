"""A budget has one goal, and says what is wrong with any other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from diffcache.documents import Budget
from diffcache.documents.expected import MOST_DB, most_db
from diffcache.errors import BadOption

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(computed_steps=12), "computed_steps 12"),
        (Budget(computed_steps=7.5), "computed_steps 7.5"),
        (Budget(speedup=2.5), "speedup 2.5"),
        (Budget(min_psnr_db=40), "min_psnr_db 40"),
        (Budget(max_error_db=-3), "min_psnr_db -3"),
        (Budget(speedup=2, memory_bytes=65536), "speedup 2, memory_bytes 65536"),
        (Budget(computed_steps=np.int64(3), memory_bytes=np.int64(0)), "computed_steps 3, memory_bytes 0"),
    ],
)
def test_a_budget_says_what_it_is(budget: Budget, words: str) -> None:
    assert str(budget) == words


def test_a_bare_number_counts_computed_steps() -> None:
    assert Budget.of(12) == Budget(computed_steps=12)
    assert Budget.of(Budget(speedup=3)) == Budget(speedup=3)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, "nothing"),
        ({"memory_bytes": 9}, "memory_bytes 9"),
        ({"computed_steps": 5, "speedup": 2}, "computed_steps 5, speedup 2"),
        ({"computed_steps": "8", "speedup": 2}, "computed_steps 8, speedup 2"),
        ({"speedup": 2, "max_error_db": 40}, "speedup 2, min_psnr_db 40"),
        (
            {"computed_steps": 5, "speedup": 2, "max_error_db": 40},
            "computed_steps 5, speedup 2, min_psnr_db 40",
        ),
    ],
)
def test_no_goal_or_several_are_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(BadOption) as refused:
        Budget(**fields)
    assert str(refused.value) == (
        f"budget cannot be used: it sets {found}. Set exactly one of computed_steps, speedup, min_psnr_db. "
        "You may add memory_bytes."
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("computed_steps", 0.5, "1 or more"),
        ("computed_steps", -3, "1 or more"),
        ("computed_steps", float("nan"), "1 or more"),
        ("computed_steps", "12", "1 or more"),
        ("computed_steps", True, "1 or more"),
        ("speedup", 0.9, "1 or more; 1 is the full run"),
        ("speedup", float("inf"), "1 or more; 1 is the full run"),
        ("max_error_db", float("inf"), "a number of dB, such as 40"),
        ("min_psnr_db", float("inf"), "a number of dB, such as 40"),
        ("max_error_db", "forty", "a number of dB, such as 40"),
        ("memory_bytes", -1, "a whole number of bytes, 0 or more"),
        ("memory_bytes", 1.5, "a whole number of bytes, 0 or more"),
        ("memory_bytes", True, "a whole number of bytes, 0 or more"),
    ],
)
def test_a_value_that_no_plan_could_meet_is_refused(name: str, value: object, allowed: str) -> None:
    beside = {} if name != "memory_bytes" else {"speedup": 2}
    with pytest.raises(BadOption) as refused:
        Budget(**{name: value} | beside)  # type: ignore[arg-type]
    assert str(refused.value) == f"{name}={value!r} was given. Allowed: {allowed}."


def test_the_least_that_a_goal_may_be() -> None:
    assert Budget(computed_steps=1).computed_steps == 1
    assert Budget(speedup=1).speedup == 1
    assert Budget(computed_steps=1, memory_bytes=0).memory_bytes == 0


def test_the_former_name_is_an_alias() -> None:
    assert Budget(max_error_db=40) == Budget(min_psnr_db=40) == Budget(None, None, 40)
    assert Budget(min_psnr_db=40).max_error_db == 40
    assert Budget(computed_steps=3).max_error_db is None
    with pytest.raises(BadOption, match=r"max_error_db=40 was given\. Allowed: min_psnr_db alone"):
        Budget(min_psnr_db=40, max_error_db=40)
    assert dataclasses.replace(Budget(min_psnr_db=40), memory_bytes=8) == Budget(max_error_db=40, memory_bytes=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(min_psnr_db=40).min_psnr_db = 3  # type: ignore[misc]


def test_whole_numbers_are_asked_for_where_steps_are_whole() -> None:
    with pytest.raises(
        BadOption, match=r"computed_steps=2\.5 was given\. Allowed: whole numbers from 1 to 6, the steps"
    ):
        Budget.of(2.5).check(6, whole=True)
    Budget.of(2.5).check(6)
    with pytest.raises(BadOption, match=r"Allowed: whole numbers from 1 to 6, the steps of the loop\.$"):
        Budget.of(7).check(6, whole=True)


def test_a_made_up_number_is_not_shown() -> None:
    assert most_db(MOST_DB) == most_db(150.0) == "144.5 (exact)"
    assert most_db(144.0) == "144.0"
