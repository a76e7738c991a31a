"""What a site's tables are defined to be, in plain numpy and loops, to hold measured ones against."""

from __future__ import annotations

import numpy as np
import pytest

from diffcache.documents import SiteProfile, Tables


def check_tables(
    site: SiteProfile, inputs: np.ndarray, outputs: np.ndarray, modulated: np.ndarray | None = None
) -> None:
    """``inputs``, ``outputs`` and ``modulated`` float64 [branches, samples, T, tokens, channels]."""
    branches, _, steps = outputs.shape[:3]
    assert site.output.gram.shape == (branches, steps, steps)
    _check(site.output, outputs)
    shared = min(inputs.shape[-1], outputs.shape[-1])
    residual = outputs[..., :shared] - inputs[..., :shared]
    assert site.residual is not None
    assert site.residual_ratio is not None
    _check(site.residual, residual)
    for b in range(branches):
        for i in range(steps):
            expected = 1.0
            if i:
                now, before = (np.sqrt((residual[b, :, j] ** 2).sum(-1)) for j in (i, i - 1))
                expected = (now / before).mean()
            assert site.residual_ratio[b, i] == pytest.approx(expected, rel=1e-5)
            assert site.input_change[b, i] == pytest.approx(_change(inputs[b], i), rel=1e-5)
            if modulated is not None:
                assert site.modulated_change is not None
                assert site.modulated_change[b, i] == pytest.approx(_change(modulated[b], i), rel=1e-5)
    assert (site.modulated_change is None) == (modulated is None)


def _check(tables: Tables, series: np.ndarray) -> None:
    for b, i, j in np.ndindex(tables.l1.shape):
        f, g = (series[b, :, k].reshape(series.shape[1], -1) for k in (i, j))
        assert tables.l1[b, i, j] == pytest.approx(np.abs(f - g).mean(), rel=1e-5, abs=1e-9)
        relative = np.abs(f - g).sum(1) / np.abs(g).sum(1)
        assert tables.relative_l1[b, i, j] == pytest.approx(relative.mean(), rel=1e-5, abs=1e-9)
        assert tables.gram[b, i, j] == pytest.approx((f * g).mean(), rel=1e-5, abs=1e-9)


def _change(series: np.ndarray, i: int) -> float:
    """[samples, T, …] of one branch."""
    if i == 0:
        return 0.0
    apart = np.abs(series[:, i] - series[:, i - 1]).reshape(len(series), -1).sum(1)
    return float((apart / np.abs(series[:, i - 1]).reshape(len(series), -1).sum(1)).mean())
