"""The figure of ``benchmarks/methods.py`` names every line, and no name hides another name or a line."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import methods_figure
from method_results import RESULTS, Record

DIT, FLUX = (Record.load(RESULTS / f"methods-{name}.json") for name in ("dit", "flux"))
# The rows of one model under the title of another: the figure is tested before the guided model is measured.
GUIDED = dataclasses.replace(FLUX, model="flux-guided")
SHORT = dataclasses.replace(FLUX, steps=28, rows=[row for row in FLUX.rows if row.speedup < 4.5])


def figure(*records: Record) -> Any:
    """The figure of records, drawn once so that the places of texts are known."""
    made = methods_figure.figure_of(records or (DIT, FLUX))
    made.canvas.draw()
    return made


def faults(made: Any) -> list[str]:
    """Return each name that is cut off, overlaps another name or covers a line, and each line without a name."""
    (caption,) = made.texts
    box = caption.get_window_extent()
    found = [] if made.bbox.contains(box.x1, box.y0) else ["the caption is cut off"]
    for axes in made.axes:
        if axes._left_title.get_window_extent().x1 > axes.bbox.x1:
            found.append("the title is cut off")
        boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
        lines = {line.get_label(): line for line in axes.lines if line.get_label() != "_leader"}
        found += [f"{name} has no name" for name in lines.keys() - boxes.keys()]
        found += [f"{name} names no line" for name in boxes.keys() - lines.keys()]
        for (a, first), (b, second) in itertools.combinations(boxes.items(), 2):
            if first.overlaps(second):
                found.append(f"{a} overlaps {b}")
        for name, box in boxes.items():
            if not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)):
                found.append(f"{name} is cut off")
            for line, drawn in lines.items():
                if drawn.get_transform().transform_path(drawn.get_path()).intersects_bbox(box, filled=False):
                    found.append(f"{name} covers the line of {line}")
    return found


def test_every_line_has_a_name_and_no_name_hides_anything() -> None:
    for records in ((DIT, FLUX), (DIT,), (FLUX,), (GUIDED,), (SHORT,), (DIT, FLUX, GUIDED)):
        made = figure(*records)
        assert len(made.axes) == len(records)
        assert all(len(axes.texts) >= 10 for axes in made.axes)
        assert faults(made) == []


def test_a_record_with_large_speed_ups_alone_is_drawn() -> None:
    rows = [dataclasses.replace(row, speedup=10 * row.speedup) for row in FLUX.rows if row.method == "optimize"]
    made = figure(dataclasses.replace(FLUX, rows=rows))
    assert [text.get_text() for text in made.axes[0].texts] == ["diffcache"]


def test_a_name_in_a_wrong_place_is_noticed() -> None:
    made = figure()
    first, second = made.axes[0].texts[-2:]
    second.set_position(first.get_position())
    assert any("overlaps" in fault for fault in faults(made))
    second.set_position((3, 38))
    assert any("covers the line" in fault for fault in faults(made))
    second.set_position((300, 38))
    assert any("is cut off" in fault for fault in faults(made))
    second.set_text("")
    assert any("has no name" in fault for fault in faults(made))
    made.axes[0].set_title("wide " * 20, loc="left")
    assert "the title is cut off" in faults(made)
    made.texts[0].set_text("wide " * 60)
    assert "the caption is cut off" in faults(made)


def test_two_lines_of_a_panel_have_different_styles() -> None:
    for axes in figure().axes:
        lines = [line for line in axes.lines if line.get_label() != "_leader"]
        assert len({line.get_color() for line in lines}) == len(lines)


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([5.0, 5.0, 5.0], [4.0, 5.0, 6.0]),
        ([1.0, 5.0, 5.2], [1.0, 4.6, 5.6]),
        ([-3.0, -3.0], [0.0, 1.0]),
        ([12.0, 12.0], [9.0, 10.0]),
        ([], []),
    ],
)
def test_heights_are_spread_as_little_as_needed(wanted: list[float], made: list[float]) -> None:
    assert np.allclose(methods_figure.spread(wanted, 1.0, 0.0, 10.0), made)
