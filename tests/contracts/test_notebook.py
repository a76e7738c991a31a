"""The notebook of the first tutorial is the tutorial, executed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "first-3x.ipynb"
PAGE = ROOT / "docs" / "tutorials" / "first-3x.md"
MOST_BYTES = 400_000


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_notebook", ROOT / "docs" / "draw_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def book() -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert isinstance(found, list)
    return found


def differences(cells: list[dict[str, Any]], page: str) -> list[str]:
    """Return what differs between the cells of the notebook and the tutorial, as one line per cell."""
    wanted = [("markdown" if kind == "markdown" else "code", text) for kind, text in script().cells(page)]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    wrong = [f"cell {n}: {a} instead of {b}" for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    return wrong + [f"{len(found)} cells instead of {len(wanted)}"] * (len(found) != len(wanted))


def test_the_notebook_holds_the_text_and_the_code_of_the_tutorial() -> None:
    wrong = differences(book(), PAGE.read_text(encoding="utf-8"))
    assert not wrong, f"run `python docs/draw_notebook.py`: {wrong}"


@pytest.mark.parametrize(
    "old", ["every=3,order=1", "STEPS, COMPUTED = 30, 10", "pipe = diffcache.restore(", "## 4. Skip"]
)
def test_a_change_of_the_tutorial_is_noticed(old: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert old in page
    assert differences(book(), page.replace(old, f"{old}9"))


def test_a_missing_block_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert differences(book(), page[: page.index("## 7. Remove it")])


def test_all_cells_were_run_in_order_without_errors_and_the_file_is_small() -> None:
    code = [cell for cell in book() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 2  # the schedule and the report
    results = [output for output in outputs if output["output_type"] == "execute_result"]
    assert len(results) == len(script().SHOWN)  # the two cards and the picture; nothing else is printed by accident
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
