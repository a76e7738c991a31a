"""The README's numbers are the committed results, and its rules exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffcache import CacheSchedule
from diffcache.schedulers import parse_rule

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"
MOST_WORDS, MOST_LINES = 900, 130  # one page, that a newcomer reads in a few minutes


def check(root: Path) -> int:
    return subprocess.run([sys.executable, root / "benchmarks/into_readme.py", "--check"], check=False).returncode


def test_the_tables_are_the_committed_results():
    assert check(ROOT) == 0


def test_a_changed_number_would_be_noticed(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/into_readme.py").write_text((ROOT / "benchmarks/into_readme.py").read_text())
    (tmp_path / "benchmarks/results").symlink_to(ROOT / "benchmarks/results")
    cell = re.search(r"\| \d+ of 50 \| (\d+\.\d+)x", README)
    assert cell is not None
    start, end = cell.span(1)
    (tmp_path / "README.md").write_text(README[:start] + "9.99" + README[end:])
    assert check(tmp_path) == 1


def test_links_of_a_table_lead_to_the_same_files_from_a_page() -> None:
    page = ROOT / "docs/benchmarks.md"
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert "../benchmarks/results/methods-flux.md" in links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("spec", re.findall(r'"((?:auto|uniform|taylorseer|full)[\w:=,]*)"', README))
def test_every_rule_in_it_can_be_used(spec):
    assert str(parse_rule(spec)).startswith(spec.partition(":")[0])


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https:)([^)#]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_the_example_in_contributing_makes_a_schedule() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(code, found)
    assert isinstance(found["schedule"], CacheSchedule)


def test_the_summary_of_auto_follows_from_its_record() -> None:
    rows = json.loads((RESULTS / "first-try.json").read_text())["rows"]
    (line,) = re.findall(r"^\| `taylorseer` \| (\d+) of (\d+) \| ([+-][\d.]+) dB \|$", README, re.MULTILINE)
    gains = [row["auto"][s] - row["taylorseer"][s] for row in rows.values() for s in row["auto"]]
    assert line == (str(sum(g > 0 for g in gains)), str(len(gains)), f"{sum(gains) / len(gains):+.1f}")


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS
    assert len(README.splitlines()) <= MOST_LINES


def test_the_speed_ups_of_language_models_in_the_first_line_are_measured_without_lost_answers() -> None:
    found = re.search(r"diffusion language models (\d)x to (\d)x", README)
    assert found is not None
    least, most = map(float, found.groups())
    cells = json.loads((RESULTS / "text.json").read_text())
    for task in ("walk", "sudoku"):
        parts = [{one["name"]: one for one in part} for part in cells[f"{task}, 256 positions, batch 8"]]
        for name, speedup in (("dKV-Cache, refresh 8", least), ("diffcache, target 5x", most)):
            full, rows = [part["full run"] for part in parts], [part[name] for part in parts]
            before, after = (np.concatenate([one["seconds"] for one in ones]) for ones in (full, rows))
            assert np.median(before / after) >= speedup
            assert sum(one["worse"] - one["better"] for one in rows) <= 0


LEAD = re.compile(
    r"runs (\d+\.\d)x faster at\s(\d+\.\d) dB \(PSNR against the full run\), and (\d+\.\d)x faster at (\d+\.\d) dB"
)


def test_the_speed_ups_in_the_first_paragraph_are_in_the_table() -> None:
    found = LEAD.search(README)
    assert found is not None
    for speedup, psnr in (found.group(1, 2), found.group(3, 4)):
        assert re.search(rf"^\| DiT, guided .*\| {speedup}x \|.*\*\*{psnr}\*\* \|$", README, re.MULTILINE)
