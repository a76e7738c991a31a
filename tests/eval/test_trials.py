"""The interval of a rate of successes."""

from __future__ import annotations

import pytest

from diffcache.eval.trials import wilson

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("won", "low", "high"), [(10, 0.7225, 1.0), (8, 0.4902, 0.9433), (0, 0.0, 0.2775)])
def test_the_interval_of_successes_is_wilsons(won: int, low: float, high: float) -> None:
    found = wilson([1.0] * won + [0.0] * (10 - won))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
