"""Sizes in an estimate are stated in the largest unit."""

from __future__ import annotations

import pytest

from diffcache.executor.cost import shown

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (32768, "32.8 kB"),
        (5_240_000, "5.24 MB"),
        (2**31, "2.15 GB"),
    ],
)
def test_bytes_have_the_largest_unit(size: int, text: str) -> None:
    assert shown(size) == text
