"""Results of single methods, the best of them, and all as a table."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluations import small_record

from diffcache.errors import BadOption, UnknownName
from diffcache.eval import Evaluation
from diffcache.eval.requirements import MissingPackageError

pytestmark = pytest.mark.fast

FOUND = Evaluation(small_record(), Path("made"))


def test_a_method_is_found_by_its_name() -> None:
    ours = FOUND["ours"]
    assert (ours.name, ours.psnr, ours.latent) == ("ours", 50.0, 0.2)
    assert (ours.seconds, ours.speedup, ours.computed_steps) == (2.0, 2.0, 4.0)
    assert repr(ours) == "<MethodResult 'ours': 2 s, 2.00x, psnr 50, latent 0.2>"
    assert {"psnr", "seconds", "record"} <= set(dir(ours))
    assert copy.deepcopy(ours).psnr == pickle.loads(pickle.dumps(ours)).psnr == 50.0


def test_names_are_iterated_over() -> None:
    assert list(FOUND) == ["full run", "ours", "fast", "<script>"]
    assert "ours" in FOUND
    assert "our" not in FOUND


def test_a_wrong_name_lists_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"no method of this evaluation called 'our'\. Known: full run, ours, fast"):
        FOUND["our"]
    with pytest.raises(AttributeError, match=r"the result of 'ours' has no 'ssim'\. It has: .*speedup, psnr, latent\."):
        _ = FOUND["ours"].ssim
    assert not hasattr(FOUND["ours"], "ssim")


def test_the_best_is_that_of_the_metric() -> None:
    assert FOUND.best().name == "ours"
    assert FOUND.best("latent").name == "fast"  # less is better, and the full run does not count
    assert FOUND.best(min_speedup=3).name == "<script>"  # of equal means, the faster one
    assert FOUND.best("latent", min_speedup=5).name == "<script>"
    with pytest.raises(BadOption, match=r"min_speedup=9 was given\. Allowed: up to 8\.00"):
        FOUND.best(min_speedup=9)
    with pytest.raises(UnknownName, match="Known: psnr, latent"):
        FOUND.best("ssim")
    bare = small_record()
    for method in bare["methods"]:
        method["scores"] = {}
    with pytest.raises(UnknownName, match="Known: none"):
        Evaluation(bare, Path("made")).best()


def test_a_table_for_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    pandas = SimpleNamespace(
        DataFrame=lambda rows, index: made.update(rows=rows, index=index) or made,
        Index=lambda names, name: (list(names), name),
    )
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert FOUND.to_pandas() is made
    assert made["index"] == (["full run", "ours", "fast", "<script>"], "method")
    assert made["rows"][1] == {
        "kind": "ours",
        "steps": 8,
        "computed_steps": 4.0,
        "seconds": 2.0,
        "speedup": 2.0,
        "cache_bytes": 4,
        "psnr": 50.0,
        "latent": 0.2,
    }


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="needs the package 'pandas', which is not installed: pip install"):
        FOUND.to_pandas()
