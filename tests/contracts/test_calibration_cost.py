"""The minutes of a calibration in the README follow from the committed counts and seconds."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration_cost", ROOT / "benchmarks/calibration_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_states_the_committed_count_and_the_minutes_that_follow(script: ModuleType) -> None:
    count = json.loads((RESULTS / "calibration-cost.json").read_text())
    record = json.loads((RESULTS / script.GPU).read_text())
    seconds = sorted(next(row for row in record["rows"] if row["method"] == "full run")["seconds"])
    wanted = count["samples"] / 28 * sum(seconds) / len(seconds) / 60
    found = re.search(r"costs about (\d+) full runs[^.]*?\s(\d+)\sminutes", (ROOT / "README.md").read_text())
    assert found is not None
    assert int(found[1]) == round(count["samples"] / count["steps"])
    assert int(found[2]) == round(wanted)
    assert script.minutes(count, record) == pytest.approx(wanted)
    assert (RESULTS / "calibration-cost.md").read_text() == script.table(count, record) + "\n"


def test_a_record_of_other_steps_is_refused(script: ModuleType) -> None:
    record = json.loads((RESULTS / script.GPU).read_text())
    with pytest.raises(ValueError, match="28 steps"):
        script.seconds_of_full_run(record, 50)


def test_each_sample_of_a_batch_counts(script: ModuleType) -> None:
    network = nn.Linear(2, 2)
    counter = script.Counter(network)
    network(torch.zeros(3, 2))
    network(torch.zeros(1, 2))
    assert counter.samples == 4
