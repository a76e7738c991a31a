"""The sheet of pictures and the table of the demo, from a record that was not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffcache.demo import sheet, table

pytestmark = pytest.mark.fast
SAMPLES = 5


def method(name: str, kind: str, computed: int, steps: int, values: list[float] | None) -> dict[str, Any]:
    score = None if values is None else {"mean": float(np.mean(values)), "values": values}
    return {
        "name": name,
        "kind": kind,
        "computed_steps": float(computed),
        "steps": steps,
        "speedup": {"loop": 50 / computed},
        "seconds": {},
        "scores": {} if score is None else {"psnr": score, "ssim": {"mean": 0.97, "values": None}},
        "pictures": {f"s{n}": f"{name}/{n}.png" for n in range(SAMPLES)},
    }


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """Pictures of one grey; those of method k at sample n differ from the full run by 2 k + n."""
    methods = [
        method("full run", "full", 50, 50, None),
        method("diffcache, 12 computed", "ours", 12, 50, [50.0] * SAMPLES),
        method("diffcache, 8 computed", "ours", 8, 50, [33.0, 31.0, 35.0, 25.0, 34.0]),
        method("8 steps, DDIM", "fewer steps", 8, 8, [20.0] * SAMPLES),
        method("uniform reuse, 8 computed", "reuse", 8, 50, [20.0] * SAMPLES),
    ]
    for k, one in enumerate(methods):
        (tmp_path / one["name"]).mkdir()
        for n in range(SAMPLES):
            grey = 100 + (2 * k + n if k else 0)
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / one["pictures"][f"s{n}"])
    about = {"title": "PSNR", "unit": "dB", "better": "higher"}
    samples = [{"id": f"s{n}", "prompt": f"subject {n}", "seed": n} for n in range(SAMPLES)]
    return {"samples": samples, "methods": methods, "metrics": {"psnr": about}, "title": ""}


def test_columns_go_from_the_best_to_the_worst_sample_with_the_median(record: dict[str, Any], tmp_path: Path) -> None:
    found = sheet.content(record, tmp_path, 8, columns=8, differences=True, seconds=True)
    assert found.headings == [
        ("subject 2", "best"), ("subject 4", ""), ("subject 0", "median"), ("subject 1", ""), ("subject 3", "worst"),
    ]  # fmt: skip
    few = sheet.content(record, tmp_path, 8, columns=3, differences=True, seconds=True)
    assert [where for _, where in few.headings] == ["best", "median", "worst"]


def test_rows_are_the_methods_of_one_budget_with_their_numbers_and_differences(
    record: dict[str, Any], tmp_path: Path
) -> None:
    rows = sheet.content(record, tmp_path, 8, columns=8, differences=True, seconds=True).rows
    assert [list(row.lines) for row in rows[1::2]] == [
        ["DDIM", "8 steps", "6.2 x as fast", "20.0 dB"],
        ["uniform reuse", "8 of 50 steps", "6.2 x as fast", "20.0 dB"],
        ["diffcache", "8 of 50 steps", "6.2 x as fast", "31.6 dB"],
    ]
    assert rows[0].lines == ["full run", "50 steps"]
    assert rows[-1].lines == ["difference", "from the full run, 16 x"]
    assert [np.asarray(p)[0, 0, 0] for p in rows[-1].pictures] == [16 * (4 + n) for n in (2, 4, 0, 1, 3)]
    bare = sheet.content(record, tmp_path, 8, columns=8, differences=False, seconds=False).rows
    assert [row.lines[-1] for row in bare] == ["50 steps", "20.0 dB", "20.0 dB", "31.6 dB"]


def test_the_sheet_is_a_picture_of_all_rows(record: dict[str, Any], tmp_path: Path) -> None:
    style = sheet.Style()
    sheet.draw(record, tmp_path, 8, tmp_path / "sheet.png", style=style)
    drawn = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert drawn.shape[1] == style.label + SAMPLES * (style.cell + style.gap)
    middle = style.label + style.cell // 2
    assert (drawn[:, middle] == 100).all(axis=1).sum() >= style.cell  # the full run's picture
    assert (drawn[:, middle] == 16 * 6).all(axis=1).sum() >= style.cell  # the difference of the best sample


PLACES = [
    (16, 8, [0, 2, 4, 6, 8, 11, 13, 15]),
    (16, 7, [0, 2, 5, 8, 10, 12, 15]),
    (4, 8, [0, 1, 2, 3]),
    (1, 8, [0]),
    (2, 2, [0, 1]),
]


@pytest.mark.parametrize(("count", "columns", "places"), PLACES)
def test_places_hold_both_ends_and_the_middle(count: int, columns: int, places: list[int]) -> None:
    assert sheet.spread(count, columns) == places


def test_without_a_method_of_ours_the_first_samples_are_shown(record: dict[str, Any], tmp_path: Path) -> None:
    record["methods"] = [m for m in record["methods"] if m["kind"] != "ours"]
    found = sheet.content(record, tmp_path, 8, columns=3, differences=False, seconds=False)
    assert {place for _, place in found.headings} == {""}


def test_the_table_fits_a_terminal_and_holds_the_worst_sample(record: dict[str, Any]) -> None:
    lines = table(record).splitlines()
    assert max(map(len, lines)) <= 80
    (ours,) = (line for line in lines if line.startswith("diffcache, 8 computed"))
    assert ours.split() == ["diffcache,", "8", "computed", "8", "of", "50", "6.2x", "31.6", "25.0", "0.9700"]
    assert [line.split("  ")[0] for line in lines[2:10] if line] == [
        "full run", "diffcache, 12 computed", "diffcache, 8 computed", "8 steps, DDIM", "uniform reuse, 8 computed",
    ]  # fmt: skip
