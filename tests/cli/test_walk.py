"""The commands of a first day, one after the other, on a tiny pipeline: each file is read by the next command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import command_of

from diffcache.documents import CacheSchedule, Profile, ScheduleSet

MODULE = """
import torch
from pipelines import TINY, fresh

def pipe():
    made = fresh("flux")
    call = TINY["flux"].call(made, batch=2) | {"num_inference_steps": 6, "output_type": "pt"}
    return made, [call | {"generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)]
"""


def test_every_file_is_read_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walk.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    command = command_of(monkeypatch, capsys)

    def run(line: str) -> str:
        code, out, complaint = command(*line.split())
        assert code == 0, complaint
        assert "Traceback" not in complaint
        return out

    assert "written to profile.safetensors" in run("profile walk:pipe")
    assert Profile.load("profile.safetensors").steps == 6
    for computed, name in ((3, "three"), (2, "two")):
        assert f"{computed} of 6 steps" in run(
            f"plan profile.safetensors --computed {computed} --out {name}.safetensors"
        )
    assert run("plan profile.safetensors --computed 3 --compare").startswith("scheduler")
    three = CacheSchedule.load("three.safetensors")
    assert run("show three.safetensors --profile profile.safetensors --plot three.png").startswith(three.describe())
    assert Path("three.png").read_bytes().startswith(b"\x89PNG")
    ScheduleSet.of(three).save("set.json")
    out = run("eval run walk:pipe ours=set.json two.safetensors --metrics psnr,latent --alone --out made")
    assert "| ours | 3 of 6 |" in out
    assert "| two | 2 of 6 |" in out
    assert Path("made/report.html").is_file()
    (pictures,) = Path("made/pictures").glob("ours-*")
    assert len(list(pictures.glob("*.png"))) == 4
