"""Bars are shown where a person reads them, and show how far the work is."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import TINY, shared

from diffcache import Budget, evaluate, measure, optimize
from diffcache.profiling.calibration.fit_bar import MOST_FITS, FitBar
from diffcache.settings import shows_progress

pytestmark = pytest.mark.fast


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_by_default_a_terminal_and_a_notebook_show_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    for stream, shown in ((io.StringIO(), False), (Terminal(), True), (None, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows_progress(None) is shown
        assert shows_progress(True) is True
        assert shows_progress(False) is False
    for shell, shown in ((SimpleNamespace(kernel=1), True), (SimpleNamespace(), False), (None, False)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert shows_progress(None) is shown


def call() -> dict[str, Any]:
    return TINY["flux"].call(shared("flux"))


def test_each_verb_shows_its_bar_on_a_terminal(tmp_path: Path) -> None:
    with contextlib.redirect_stderr(Terminal()) as terminal:
        pipe = shared("flux")
        calls = [call() | {"generator": torch.Generator().manual_seed(seed)} for seed in range(2)]
        measure(pipe, calls)
        assert "measure: 100%" in terminal.getvalue()
        evaluate(pipe, {"a": "uniform:every=2"}, calls, compare=(), metrics=("latent",), out=tmp_path)
        assert "evaluate: 100%" in terminal.getvalue()
        optimize(pipe, calls, 3, time_limit_s=0)
        seen = terminal.getvalue()
        assert "record: 100%" in seen
        assert f"/{MOST_FITS}" in seen
        for words in ("fit (search, next: budgets nearby)", "fit (final coefficients): 100%", "best ", " dB, 3 steps "):
            assert words in seen
        before = terminal.getvalue()
        measure(pipe, calls, progress=False)
        optimize(pipe, calls, 3, time_limit_s=0, progress=False)
        assert terminal.getvalue() == before


def fit(computed: int, score: float) -> Any:
    return SimpleNamespace(compute=np.arange(9) < computed, score=score)


def test_the_best_is_the_best_within_the_budget() -> None:
    with contextlib.redirect_stderr(Terminal()) as terminal:
        with FitBar(Budget(computed_steps=4), searches=True, disable=False) as bar:
            bar.began("search")
            for found, says in (
                (fit(4, 40.0), "best 40.0 dB, 4 steps 40.0 dB"),
                (fit(4, 30.0), "best 40.0 dB, 4 steps 30.0 dB"),
                (fit(6, 60.0), "best 40.0 dB, 6 steps 60.0 dB"),
                (fit(3, 45.0), "best 45.0 dB, 3 steps 45.0 dB"),
                (fit(4, 200.0), "best exact, 4 steps exact"),
            ):
                bar.tried(found)
                assert bar._bar.postfix == says
        assert (bar._bar.n, bar._bar.total) == (5, 5)
        assert "5/5" in terminal.getvalue()


def test_a_total_that_is_reached_grows_and_one_mask_has_fewer_phases() -> None:
    with contextlib.redirect_stderr(Terminal()):
        with FitBar(Budget(speedup=2), searches=False, disable=False) as bar:
            bar.began("search")
            assert bar._bar.desc == "fit (search, next: options): "
            for _ in range(3):
                bar.tried(fit(4, 40.0))
            assert bar._bar.total == 3
            bar.began("final coefficients")
            assert bar._bar.desc == "fit (final coefficients): "


def test_a_bar_that_is_broken_off_does_not_claim_the_end() -> None:
    with contextlib.redirect_stderr(Terminal()):
        bar = FitBar(Budget(speedup=2), searches=True, disable=False)
        with contextlib.suppress(KeyboardInterrupt), bar:
            bar.tried(fit(4, 40.0))
            raise KeyboardInterrupt
    assert bar._bar.total == MOST_FITS
