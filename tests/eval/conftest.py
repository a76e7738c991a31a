"""An evaluation that is written down without having been run, for the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluations import evaluation, paint

from diffcache.eval.report import write_html


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the pictures of the evaluation."""
    made = tmp_path_factory.mktemp("pictures")
    paint(evaluation(), made)
    return made


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of the evaluation, as a page."""
    return write_html(evaluation(), folder, tmp_path_factory.mktemp("report") / "report.html")
