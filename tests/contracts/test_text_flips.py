"""The comparison of forecasts and real decodes: ranks, tables, and a run that is stopped and goes on."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def script(tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_flips", ROOT / "benchmarks/text_flips.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FILE, module.WORK, module.RULES = tmp_path / "flips.json", (2, 4), ("dkv:refresh=8",)
    return module


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 4], [1, 3, 2, 4], 0.9486832980505138),  # scipy.stats.spearmanr
        ([0.1, 5, 3, 4, 9], [2, 2, 2, 7, 1], -0.44721359549995787),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_the_rank_correlation_is_spearmans(script: ModuleType, one: Any, other: Any, wanted: float | None) -> None:
    found = script.spearman(one, other)
    assert found is wanted if wanted is None else found == pytest.approx(wanted)


def tiny(script: ModuleType) -> Any:
    """Return a text model of random weights, with the vocabulary of the one that comes with the package."""
    real = json.loads((script.FOLDER / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=real["vocab_size"],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.is_causal, config.mask_token_id = False, real["mask_token_id"]
    torch.manual_seed(0)
    return script.TextModel(LlamaForCausalLM(config).eval().requires_grad_(False))


def test_a_run_goes_on_where_it_was_stopped(script: ModuleType, tmp_path: Path) -> None:
    given = argparse.Namespace(prompts=1, calibration=1, length=64, batch=1, bf16=False, work=str(tmp_path / "work"))
    model, cells = tiny(script), {}
    script.run(model, "walk", given, cells)
    (key, cell), *others = cells.items()
    assert (key, others) == ("walk, 128 positions, batch 1", [])
    assert json.loads(script.FILE.read_text()) == cells
    names = list(cell["predicted"])
    assert names == ["plan, 1/2 of the work", "plan, 1/4 of the work", "dkv:refresh=8"]
    assert [list(batch) for batch in cell["batches"]] == [["full run", *names]]
    first = json.dumps(cell)
    script.run(model, "walk", given, cells)  # nothing is missing
    assert json.dumps(cells[key]) == first
    page = script.page(cells)
    for name in names:
        predicted, real = cell["predicted"][name], cell["batches"][0][name]
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert row.split(" | ")[3:7] == [
            f"{predicted['speedup']:.2f}x",
            f"{real['speedup']:.2f}x",
            f"{predicted['computed']:.1%}",
            f"{real['computed']:.1%}",
        ]
    cells[key]["made_of"] = "other weights"
    script.run(model, "walk", given, cells)
    assert cells[key]["made_of"] == json.loads(first)["made_of"]
    assert len(cells[key]["batches"]) == 1


def test_the_committed_page_is_that_of_the_committed_batches(script: ModuleType) -> None:
    cells = json.loads((RESULTS / "text-flips.json").read_text())
    assert (RESULTS / "text-flips.md").read_text() == script.page(cells)
